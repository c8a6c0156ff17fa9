"""The checks before a submission, and SLURM's commands as functions, on a real private cluster."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_cluster import SlurmCluster
from tiny_project import EXPERIMENT, ROOT, make_project, write_experiment

from prunelib.cluster import slurm
from prunelib.cluster.doctor import FAIL, OK, SKIP, WARN, Check, Profile, Setup, examine
from prunelib.cluster.settings import Cluster
from prunelib.errors import InputError, PrunelibError
from prunelib.experiment.experiment import Experiment

PARTITIONS = """\
PartitionName=small Nodes=n1 MaxTime=10 MaxMemPerNode=1000 State=UP
PartitionName=whole Nodes=n2 MaxTime=1-02:00:00 OverSubscribe=EXCLUSIVE State=UP
"""
GPU = {"slurm_partition": "gpu", "gpu_type": "h100"}
ON_GPU = {**EXPERIMENT, "compute": {**EXPERIMENT["compute"], "device": "cuda"}}

Doctor = Callable[..., list[Check]]


def write_profile(directory: Path, defaults: Any, **options: Any) -> Path:
    content = {
        "executor": "slurm",
        "default-resources": defaults,
        "slurm-status-command": "squeue",
        "slurm-init-seconds-before-status-checks": 20,
        "retries": 2,
        **options,
    }
    path = directory / "profile.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("doctor")
    make_project(directory)
    return directory


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that node n2 of the plain cluster sees empty, where that can be done (root)."""
    return tmp_path_factory.mktemp("hidden")


@pytest.fixture(scope="module")
def plain(hidden: Path) -> Iterator[SlurmCluster]:
    """A cluster without accounting; each node has 16 GB to give."""
    hide = f"n2:{hidden}" if os.getuid() == 0 else ""
    with SlurmCluster(mem=16000, extra=PARTITIONS, hide_from=hide) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def accounting() -> Iterator[SlurmCluster]:
    extra = "AccountingStorageEnforce=associations"
    with SlurmCluster(accounting=True, extra=extra) as cluster:
        yield cluster


@pytest.fixture
def doctor(project: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Ask for all checks of a cluster, in this process and in the project's directory."""

    def ask(
        cluster: SlurmCluster,
        defaults: Any = GPU,
        directory: Path = project,
        wait: float = 30,
        **options: Any,
    ) -> list[Check]:
        enter(cluster, monkeypatch)
        monkeypatch.chdir(directory)
        setup = Setup(
            experiment=Experiment.load(Path("experiment.yaml"), Path("catalogue")),
            cluster=Cluster.load(ROOT / "config" / "cluster.yaml"),
            profile=Profile.load(write_profile(directory, defaults, **options)),
            wait_seconds=wait,
        )
        return list(examine(setup))

    return ask


def enter(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])


def only(checks: list[Check], name: str) -> Check:
    (found,) = (check for check in checks if check.name == name)
    assert "\n" not in str(found)
    return found


def failures(checks: list[Check], *apart_from: str) -> list[str]:
    return [str(c) for c in checks if c.status == FAIL and c.name not in apart_from]


# ------------------------------------------------------------- without a cluster


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:01", 1),
        ("12:03", 723),
        ("1:00:00", 3600),
        ("1-02:00:00", 93600),
        ("infinite", None),
        ("UNLIMITED", None),
        ("n/a", None),
    ],
)
def test_durations_as_slurm_prints_them(text: str, seconds: int | None) -> None:
    assert slurm.parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}),
        ("gpu:4", {"": 4}),
        ("gpu:h100:2(S:0-1)", {"h100": 2}),
        ("gpu:h100:2(S:0,1),gpu:a100:4(S:0-1),shard:8", {"h100": 2, "a100": 4}),
        ("gpu:nvidia_a100-sxm4-80gb:8", {"nvidia_a100-sxm4-80gb": 8}),
        ("craynetwork:4,gpu:v100:1", {"v100": 1}),
    ],
)
def test_gpus_of_a_node(gres: str, gpus: dict[str, int]) -> None:
    assert slurm.parse_gpus(gres) == gpus


def test_of_a_repeated_key_the_first_counts() -> None:
    line = "JobId=7 JobState=FAILED Reason=None WorkDir=/data/a b JobState=COMPLETED Comment=x=y z"
    fields = slurm.parse_fields(line)
    assert (fields["JobState"], fields["WorkDir"]) == ("FAILED", "/data/a b")


@pytest.mark.parametrize(
    "defaults",
    [
        {"slurm_partition": "gpu", "gpu_type": "h100", "mem_mb": 500, "slurm_account": ""},
        ["slurm_partition=gpu", "gpu_type='h100'", "mem_mb=500"],
    ],
)
def test_both_forms_of_default_resources(defaults: Any, tmp_path: Path) -> None:
    profile = Profile.load(write_profile(tmp_path, defaults))
    assert profile.defaults == {"slurm_partition": "gpu", "gpu_type": "h100", "mem_mb": "500"}
    assert (profile.first_look_seconds, profile.retries) == (20, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"default-resources": "slurm_partition=gpu"}, "default-resources: a mapping, or a list"),
        ({"default-resources": ["gpu"]}, "default-resources: name=value is needed, got 'gpu'"),
        ({"default-resources": ["a=1", "a=2"]}, "default-resources: a is given twice"),
        ({"default-resources": {"a": ["b"]}}, "default-resources: a: one text or number"),
        ({"slurm-status-command": "sstat"}, "slurm-status-command: 'sstat'; allowed: sacct, sq"),
        ({"retries": "two"}, "retries: a whole number from 0 is needed, got 'two'"),
    ],
)
def test_a_profile_of_unknown_form_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_profile(tmp_path, **{"defaults": {}, **options})
    with pytest.raises(InputError, match=r"profile\.yaml: ") as error:
        Profile.load(path)
    assert message in str(error.value)


def test_without_slurm_the_rest_is_checked_still(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("PATH", str(tmp_path))
    setup = Setup(
        Experiment.load(Path("experiment.yaml"), Path("catalogue")),
        Cluster.load(ROOT / "config" / "cluster.yaml"),
        Profile.load(write_profile(project, GPU, executor="local")),
        wait_seconds=1,
    )
    checks = list(examine(setup))
    assert only(checks, "commands").message.startswith("not on PATH: sbatch, squeue, scontrol, ")
    assert only(checks, "executor").status == FAIL
    assert only(checks, "experiment").status == OK
    assert checks[-1].status == SKIP


# -------------------------------------------------------- a cluster without sacct


def test_models_that_are_not_fetched_and_then_all_is_right(
    plain: SlurmCluster, doctor: Doctor, project: Path
) -> None:
    """First of the tests that look at the project: it fetches by the command that it is told."""
    before = doctor(plain)
    assert failures(before, "fetched") == []
    fetched = only(before, "fetched")
    assert fetched.status == FAIL
    assert fetched.message.startswith("not here yet: made-up, tiny; ")
    command = fetched.message.split("this machine: ")[1].split(" (")[0]
    assert "--until fetch_model fetch_text fetch_analogies" in command
    # `snakemake` of this environment, whatever is on PATH.
    words = [sys.executable, "-m", *shlex.split(command)]
    subprocess.run(words, cwd=project, check=True, capture_output=True)

    write_profile(project, GPU)
    script = [sys.executable, "-P", str(ROOT / "workflow_scripts" / "doctor.py")]
    script += ["--experiment", "experiment.yaml", "--catalogue", "catalogue"]
    script += ["--cluster", str(ROOT / "config" / "cluster.yaml"), "--profile", "profile.yaml"]
    done = plain.run(*script, cwd=project, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "nothing stands against a start"
    assert not [line for line in lines if line.startswith((FAIL, SKIP)) and "gpu type" not in line]
    seen = next(line for line in lines if "work directory" in line)
    assert seen.startswith(OK)
    assert seen.endswith("partition gpu, n1, n2")
    assert next(line for line in lines if "device" in line).startswith(WARN)
    assert not list((project / "results").glob(".doctor-*"))
    # Nothing of it stays in the queue.
    assert plain.run("squeue", "-h").stdout == ""


def test_no_database_behind_sacct(plain: SlurmCluster, doctor: Doctor) -> None:
    checks = doctor(plain, **{"slurm-status-command": "sacct"})
    failed = only(checks, "status command")
    assert failed.status == FAIL
    assert "no slurmdbd answers" in failed.message
    assert failed.message.endswith("profile.yaml: slurm-status-command: squeue")
    # Snakemake's own choice is sacct wherever the command is installed.
    silent = only(doctor(plain, **{"slurm-status-command": None}), "status command")
    assert silent.status == FAIL


def test_a_controller_that_forgets_too_early(plain: SlurmCluster, doctor: Doctor) -> None:
    slow = {"slurm-init-seconds-before-status-checks": 1300}
    failed = only(doctor(plain, **slow), "status command")
    assert failed.status == FAIL
    assert "is 3600 s; at least 3900 s are needed" in failed.message
    assert "slurm-init-seconds-before-status-checks to 1200 or less" in failed.message


def test_wrong_partition(plain: SlurmCluster, doctor: Doctor) -> None:
    checks = doctor(plain, {"slurm_partition": "gpus"})
    failed = only(checks, "partition")
    assert failed.status == FAIL
    assert failed.message == (
        f"{Path.cwd() / 'profile.yaml'}: default-resources: slurm_partition is gpus, but there is "
        "no partition gpus; there are: gpu, small, whole"
    )
    assert only(checks, "work directory").status == SKIP
    both = doctor(plain, {**GPU, "cpu_partition": "cpu"})
    assert [c.status for c in both if c.name == "partition"] == [FAIL, OK]


def test_limits_of_a_partition(plain: SlurmCluster, doctor: Doctor) -> None:
    checks = doctor(plain, {**GPU, "cpu_partition": "small"})
    limits = [check for check in checks if check.name == "limits"]
    assert {check.status for check in limits} == {FAIL}
    texts = [check.message for check in limits]
    assert any("(runtime), partition small allows 10; name a partition" in text for text in texts)
    assert any("MiB (mem_mb), partition small allows 1000; name a" in text for text in texts)
    assert all("default-resources: cpu_partition" in text for text in texts)


def test_a_try_that_outgrows_the_partition(plain: SlurmCluster, doctor: Doctor) -> None:
    checks = doctor(plain, retries=6)
    (warned,) = (check for check in checks if check.name == "limits" and "mem_mb" in check.message)
    assert warned.status == WARN
    assert "at try 7, partition gpu allows 16000" in warned.message
    assert warned.message.endswith("config/cluster.yaml: limits: mem_mb: 16000")


def test_account_where_there_is_no_accounting(plain: SlurmCluster, doctor: Doctor) -> None:
    failed = only(doctor(plain, {**GPU, "slurm_account": "test"}), "account")
    assert failed.status == FAIL
    assert failed.message.endswith("would fail; remove slurm_account")


def test_gpu_types(plain: SlurmCluster, doctor: Doctor, project: Path) -> None:
    write_experiment(project, ON_GPU)
    try:
        right = doctor(plain)
        wrong = doctor(plain, {**GPU, "gpu_type": "a100"})
        unsaid = doctor(plain, {"slurm_partition": "gpu"})
        # CPU steps elsewhere: the small job in the GPUs' partition asks for a GPU, too.
        apart = doctor(plain, {**GPU, "cpu_partition": "whole"})
    finally:
        write_experiment(project, EXPERIMENT)
    assert only(right, "gpu type").status == OK
    assert only(right, "device").status == OK
    assert failures(right, "fetched") == []
    failed = only(wrong, "gpu type")
    assert failed.status == FAIL
    assert "gpu_type is a100, but partition gpu offers h100; set it to h100" in failed.message
    assert only(wrong, "limits").status == SKIP
    assert only(unsaid, "gpu type").status == OK
    assert [c.status for c in apart if c.name == "work directory"] == [OK, OK]


@pytest.mark.skipif(os.getuid() != 0, reason="hiding a directory from a node needs root")
def test_work_directory_that_a_node_does_not_see(
    plain: SlurmCluster, doctor: Doctor, project: Path, hidden: Path
) -> None:
    for name in ("catalogue", "text", "tiny"):
        shutil.copytree(project / name, hidden / name, dirs_exist_ok=True)
    write_experiment(hidden, EXPERIMENT)
    found = [c for c in doctor(plain, directory=hidden) if c.name == "work directory"]
    assert [check.status for check in found] == [OK, FAIL]
    assert found[0].message.endswith("partition gpu, n1")
    assert f"{hidden} is not visible from partition gpu, n2: run in" in found[1].message


def test_a_full_queue_is_no_success(
    plain: SlurmCluster, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [
        plain.run("sbatch", "--parsable", "--exclusive", *where, "--wrap=sleep 60", cwd=Path("/"))
        for where in (("-wn1", "-o/dev/null"), ("-wn2", "-o/dev/null"))
    ]
    try:
        enter(plain, monkeypatch)
        wait_for_state(jobs[1].stdout.strip(), "RUNNING")
        found = only(doctor(plain, wait=1), "work directory")
    finally:
        slurm.cancel(job.stdout.strip() for job in jobs)
    assert found.status == SKIP
    assert "did not start within 1 s (" in found.message
    assert plain.run("squeue", "-h", "-ndoctor").stdout == ""


def test_disk_and_texts(
    plain: SlurmCluster, doctor: Doctor, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(project)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    text = project / "text" / "articles.jsonl"
    text.rename(text.with_suffix(".away"))
    try:
        checks = doctor(plain)
    finally:
        text.with_suffix(".away").rename(text)
    assert only(checks, "disk space").status == FAIL
    assert "0.0 GB free" in only(checks, "disk space").message
    assert only(checks, "experiment").message == (
        "catalogue/texts.yaml: made-up: dir:text/articles.jsonl does not exist"
    )


# ----------------------------------------------------------- the typed wrapper


def wait_for_state(job_id: str, *states: str, seconds: float = 20) -> slurm.JobEnd:
    end = time.monotonic() + seconds
    while True:
        found = slurm.job_state(job_id)
        if found and found.state in states:
            return found
        assert time.monotonic() < end, f"job {job_id} is {found}, not {states}"
        time.sleep(0.1)


def test_partitions_as_they_are(plain: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(plain, monkeypatch)
    # A user's own settings do not change what is read.
    monkeypatch.setenv("SINFO_PARTITION", "small")
    found = slurm.partitions()
    gpu, small, whole = found["gpu"], found["small"], found["whole"]
    assert (gpu.default, gpu.up, gpu.max_seconds, gpu.memory_mb) == (True, True, None, 16000)
    assert [node.name for node in gpu.nodes] == ["n1", "n2"]
    assert gpu.gpus == {"h100": 1}
    assert gpu.cpus == 4
    assert (small.default, small.max_seconds, small.memory_mb) == (False, 600, 1000)
    assert (whole.whole_nodes, gpu.whole_nodes, whole.max_seconds) == (True, False, 93600)


def test_jobs_and_their_ends(
    plain: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    enter(plain, monkeypatch)
    directory = tmp_path / "a work=dir | x"
    directory.mkdir()

    def submit(*words: str) -> str:
        command = ("sbatch", "--parsable", "--output=/dev/null", "--mem=100", *words)
        return plain.run(*command, cwd=directory).stdout.strip()

    comment = "rule_prune_wildcards_tiny/a b|JobState=FAILED"
    shared = submit("--wrap=sleep 60", "--nodelist=n1", f"--comment={comment}")
    failed = submit("--wrap=exit 7", "--nodelist=n1")
    alone = submit("--wrap=sleep 60", "--nodelist=n2", "--exclusive")
    wait_for_state(shared, "RUNNING")
    wait_for_state(alone, "RUNNING")

    jobs = {job.job_id: job for job in slurm.jobs_of(directory)}
    assert {shared, alone} <= jobs.keys()
    assert jobs[shared].comment == comment
    assert (jobs[shared].state, jobs[shared].nodes) == ("RUNNING", "n1")
    assert slurm.jobs_of(tmp_path) == []
    assert slurm.has_node_alone(alone)
    assert not slurm.has_node_alone(shared)

    end = wait_for_state(failed, "FAILED")
    assert (end.exit_code, end.signal, end.nodes, end.ended) == (7, 0, "n1", True)
    # One that has ended does no harm among those to cancel.
    slurm.cancel([shared, failed, alone])
    assert wait_for_state(shared, "CANCELLED").cancelled_by is None
    assert wait_for_state(alone, "CANCELLED").ended
    assert slurm.job_state("99999") is None
    slurm.cancel([])


def test_all_cpus_of_a_node_are_a_node_alone(
    plain: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(plain, monkeypatch)
    words = ("--parsable", "--output=/dev/null", "--ntasks=4", "--nodes=1", "--wrap=sleep 60")
    job = plain.run("sbatch", *words, cwd=Path("/")).stdout.strip()
    wait_for_state(job, "RUNNING")
    assert slurm.has_node_alone(job)
    slurm.cancel([job])


def test_a_command_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "squeue"
    fake.write_text("#!/bin/sh\nexec sleep 30\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(PrunelibError, match=r"^squeue -h: no answer in 0\.2 s$"):
        slurm.run("squeue", "-h", timeout=0.2)
    with pytest.raises(InputError, match="command nosuchcommand is not on PATH"):
        slurm.run("nosuchcommand")


# ------------------------------------------------------ a cluster with accounting


@pytest.mark.long
def test_accounts(accounting: SlurmCluster, doctor: Doctor) -> None:
    right = doctor(
        accounting, {**GPU, "slurm_account": "test"}, **{"slurm-status-command": "sacct"}
    )
    assert failures(right, "fetched", "limits") == []
    assert only(right, "status command").message == "sacct answers"
    assert only(right, "account").message.startswith("test is an account of user ")
    assert only(right, "work directory").status == OK
    wrong = only(doctor(accounting, {**GPU, "slurm_account": "tset"}), "account")
    assert wrong.status == FAIL
    assert "slurm_account is tset, which is no account of user" in wrong.message
    assert "test" in wrong.message.rpartition("allowed: ")[2]
    # SLURM charges the default account.
    assert only(doctor(accounting), "account").status == OK


@pytest.mark.long
def test_who_cancelled_a_job(accounting: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(accounting, monkeypatch)
    words = ("--parsable", "--output=/dev/null", "--wrap=sleep 60")
    job = accounting.run("sbatch", *words, cwd=Path("/")).stdout.strip()
    wait_for_state(job, "RUNNING")
    slurm.cancel([job])
    end = time.monotonic() + 20
    # The database comes after the controller.
    while (found := slurm.job_state(job)) is None or found.cancelled_by is None:
        assert time.monotonic() < end, found
        time.sleep(0.2)
    assert (found.state, found.cancelled_by) == ("CANCELLED", str(os.getuid()))


@pytest.mark.long
def test_nobody_and_nothing_to_charge(accounting: SlurmCluster, doctor: Doctor) -> None:
    """Last on this cluster: it takes the user and then the database away."""
    user = accounting.run("id", "-un").stdout.strip()
    accounting.run("sacctmgr", "-i", "delete", "user", user)
    failed = only(doctor(accounting), "account")
    assert failed.status == FAIL
    assert "has no default account, and this cluster refuses jobs without one" in failed.message
    os.kill(int((accounting.directory / "run" / "slurmdbd.pid").read_text()), signal.SIGKILL)
    time.sleep(0.5)
    checks = doctor(accounting, **{"slurm-status-command": "sacct"})
    assert "database does not answer" in only(checks, "account").message
    assert only(checks, "status command").status == FAIL
