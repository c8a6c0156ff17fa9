"""The workflow on a real private SLURM cluster: whole runs, GPU limits, and a night of faults."""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_cluster import SlurmCluster
from tiny_project import CATALOGUES, EXPERIMENT, ROOT, make_project, snakemake

PROFILE = ROOT / "profiles" / "slurm" / "config.yaml"
# Computed on the CPU, but GPUs are asked for.
AUTO = EXPERIMENT["compute"] | {"device": "auto"}
SHORT = EXPERIMENT | {
    "methods": ["magnitude_l2"],
    "baseline": "magnitude_l2",
    "recovery": [],
    "evaluation": "quick",
    "compute": AUTO,
}
SLOW_STEPS = 72
SLOW = SHORT | {"recovery": ["slow"]}
SLOW_RECIPE = {
    "batch": 48,
    "micro_batch": 1,
    "max_steps": SLOW_STEPS,
    "warmup_steps": 0,
    "length": 64,
    "save_every": 2,
}


def write_profile(directory: Path, changes: Mapping[str, Any], accounting: bool) -> None:
    """The project's own profile with what a person edits, and short waits."""
    profile = yaml.safe_load(PROFILE.read_text(encoding="utf-8"))
    profile |= {
        "slurm-init-seconds-before-status-checks": 2,
        "slurm-status-command": "sacct" if accounting else "squeue",
        "latency-wait": 10,
        **changes,
    }
    if accounting:
        profile["default-resources"]["slurm_account"] = "test"
    (directory / "slurm").mkdir(exist_ok=True)
    (directory / "slurm" / "config.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")


def make_slurm_project(
    directory: Path,
    experiment: Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
    accounting: bool = False,
) -> Path:
    """A tiny project with a profile; ``slow`` recovers for most of a minute."""
    make_project(directory, experiment)
    recovery = copy.deepcopy(CATALOGUES["recovery"])
    recovery["slow"] = recovery["lora"] | {"recipe": SLOW_RECIPE}
    (directory / "catalogue" / "recovery.yaml").write_text(yaml.safe_dump(recovery))
    evaluation = copy.deepcopy(CATALOGUES["evaluation"])
    evaluation["quick"] = {"perplexity": evaluation["small"]["perplexity"]}
    (directory / "catalogue" / "evaluation.yaml").write_text(yaml.safe_dump(evaluation))
    write_profile(directory, changes or {}, accounting)
    return directory


def command(*options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(ROOT / "Snakefile"),
        "--profile",
        "slurm",
        "--config",
        "experiment=experiment.yaml",
        "catalogue=catalogue",
        *options,
    ]


def run(cluster: SlurmCluster, directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*options),
        cwd=directory,
        env=cluster.env,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@contextmanager
def running(
    cluster: SlurmCluster, directory: Path, *options: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A run in the background with its output in ``run.log``; killed at the end."""
    with (directory / "run.log").open("wb") as log:
        process = subprocess.Popen(
            command(*options),
            cwd=directory,
            env=cluster.env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def log_of(directory: Path) -> str:
    return (directory / "run.log").read_text(errors="replace")


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)
    return found


def records(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        path.parent.name: json.loads(path.read_text())
        for path in (directory / "results").glob("*/**/provenance.json")
    }


def computed(directory: Path) -> dict[str, dict[str, str]]:
    """The sha256 of all that was computed, by key; measured times are left out."""
    return {
        key: {name: facts["sha256"] for name, facts in record["files"].items()}
        for key, record in records(directory).items()
        if record["step"] in ("statistics", "scores", "prune", "recover")
    }


def submitted(cluster: SlurmCluster, directory: Path) -> list[dict[str, str]]:
    """Every job of the directory that has ended, as SLURM's own completion log has it."""
    log = cluster.directory / "log" / "jobcomp.txt"
    lines = log.read_text().splitlines() if log.exists() else []
    jobs = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
    return [job for job in jobs if job["WorkDir"] == str(directory)]


def attempts(directory: Path, step: str) -> list[dict[str, Any]]:
    """The notes on unfinished steps; os.walk, since a glob raises where files come and go."""
    found = []
    for parent, _, names in os.walk(directory / "results" / step):
        for name in names:
            if name.endswith(".attempt.json"):
                found.append(json.loads((Path(parent) / name).read_text()) | {"parent": parent})
    return found


def recovering(directory: Path) -> list[dict[str, Any]]:
    """Attempts at recovery that have saved a step to go on from."""
    found = []
    for note in attempts(directory, "recover"):
        state = Path(note["parent"]) / f"{note['key']}.state"
        _, saved, _ = next(os.walk(state), ("", [], []))
        if any(name.startswith("step-") for name in saved):
            found.append(note)
    return found


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[SlurmCluster]:
    with SlurmCluster(nodes=1, cpus=8, mem=24000, gpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[SlurmCluster]:
    with SlurmCluster(nodes=2, cpus=4, mem=10000, gpus=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def slow_reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What an unbroken run on this machine computes for the slow experiment."""
    directory = tmp_path_factory.mktemp("reference")
    make_slurm_project(directory, SLOW)
    done = snakemake(directory)
    assert done.returncode == 0, done.stderr[-3000:]
    return computed(directory)


def test_a_run_on_slurm_uses_its_gpus_and_leaves_nothing_to_do_for_a_local_one(
    two_gpus: SlurmCluster, tmp_path: Path
) -> None:
    make_slurm_project(tmp_path, SHORT)
    done = run(two_gpus, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    # Same keys: here, without SLURM, everything is there.
    again = snakemake(tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "Nothing to be done" in again.stderr
    found = list(records(tmp_path).values())
    evaluated = [record for record in found if record["step"] == "perplexity"]
    assert len(evaluated) == 3
    assert all(record["environment"].get("SLURM_JOB_ID") for record in evaluated)
    # What needs a network, or would be over before a job starts, ran here.
    assert not any(
        "SLURM_JOB_ID" in record["environment"]
        for record in found
        if record["step"] != "perplexity"
    )
    assert_gpus_held(evaluated, 2)


def assert_gpus_held(jobs: list[dict[str, Any]], limit: int) -> None:
    """Never more jobs at a time than GPUs, and each with a GPU of its own."""
    assert len(jobs) > limit
    spans = []
    for record in jobs:
        environment = record["environment"]
        gpu = (environment["SLURMD_NODENAME"], environment["CUDA_VISIBLE_DEVICES"])
        assert re.fullmatch(r"\d", gpu[1])
        begin, end = (datetime.fromisoformat(record[name]) for name in ("started", "finished"))
        spans.append((begin, end, gpu))
    for begin, _, _ in spans:
        # Times are whole seconds: a job that ends in the second in which another begins is over.
        now = [gpu for first, last, gpu in spans if first <= begin < last]
        assert len(now) <= limit
        assert len(set(now)) == len(now)


@pytest.mark.long
def test_a_run_with_accounting(tmp_path: Path) -> None:
    with SlurmCluster(nodes=2, cpus=4, mem=10000, gpus=1, accounting=True) as cluster:
        # With the light steps in the queue too, and latencies, which want a node for themselves.
        experiment = SHORT | {"methods": ["element1", "shortgpt"], "baseline": "element1"}
        make_slurm_project(tmp_path, experiment | {"evaluation": "small"}, accounting=True)
        settings = yaml.safe_load((ROOT / "config" / "cluster.yaml").read_text())
        settings["local_below_seconds"] = 0
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(settings))
        done = run(cluster, tmp_path, "cluster=cluster.yaml")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "No SLURM account given" not in done.stderr
        accounted = cluster.run("sacct", "-X", "-n", "-P", "-o", "Account,State").stdout.split()
        assert set(accounted) == {"test|COMPLETED"}
    found = list(records(tmp_path).values())
    assert all(
        record["environment"].get("SLURM_JOB_ID")
        for record in found
        if not record["step"].startswith(("fetch", "calibration"))
    )
    on_gpus = [record for record in found if "gpus" in record]
    assert {record["step"] for record in on_gpus} == {"statistics", "perplexity", "efficiency"}
    assert_gpus_held(on_gpus, 2)
    measured = list((tmp_path / "results" / "efficiency").glob("**/metrics.json"))
    assert len(measured) == 3
    for path in measured:
        assert json.loads(path.read_text())["conditions"]["node_alone"] is True
    assert "Nothing to be done" in snakemake(tmp_path).stderr


@pytest.mark.long
def test_sacct_without_accounting_is_refused_at_once(
    two_gpus: SlurmCluster, tmp_path: Path
) -> None:
    make_slurm_project(tmp_path, SHORT, {"slurm-status-command": "sacct"})
    begin = time.monotonic()
    done = run(two_gpus, tmp_path)
    assert done.returncode != 0
    assert time.monotonic() - begin < 60
    assert "set slurm-status-command: squeue in the profile" in done.stderr
    assert submitted(two_gpus, tmp_path) == []


@pytest.mark.long
def test_a_step_over_its_memory_is_named_and_tried_again_with_more(
    two_nodes: SlurmCluster, tmp_path: Path
) -> None:
    make_slurm_project(tmp_path, SHORT)
    little = ("--set-resources", "perplexity:mem_mb=300*attempt*attempt*attempt")
    done = run(two_nodes, tmp_path, *little, "--retries", "0")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert len(lines) == 3, done.stderr[-3000:]
    assert all(
        re.fullmatch(
            r"failed: perplexity of tiny/\S+: out of memory, killed by SLURM job \d+ on n\d: "
            r"it used \d+ of 300 MiB; log logs/perplexity/\S+\.log",
            line,
        )
        for line in lines
    ), lines
    done = run(two_nodes, tmp_path, *little, "--retries", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Trying to restart job" in done.stderr
    states = [job["JobState"] for job in submitted(two_nodes, tmp_path)]
    assert (states.count("FAILED"), states.count("COMPLETED")) == (6, 3), states
    assert "Nothing to be done" in snakemake(tmp_path).stderr


@pytest.mark.long
def test_a_step_over_its_time_goes_on_from_its_last_saved_step(
    two_nodes: SlurmCluster, tmp_path: Path, slow_reference: dict[str, dict[str, str]]
) -> None:
    make_slurm_project(tmp_path, SLOW)
    # More steps than fit into a minute.
    slow = SLOW_RECIPE | {"max_steps": SLOW_STEPS * 2}
    recovery = CATALOGUES["recovery"]["lora"] | {"recipe": slow}
    (tmp_path / "catalogue" / "recovery.yaml").write_text(yaml.safe_dump({"slow": recovery}))
    done = run(two_nodes, tmp_path, "--set-resources", "recover:runtime=attempt*attempt*attempt")
    assert done.returncode == 0, done.stderr[-3000:]
    states = [job["JobState"] for job in submitted(two_nodes, tmp_path)]
    assert "TIMEOUT" in states, states
    assert "SLURM status is: 'TIMEOUT'" in done.stderr
    logs = [path.read_text() for path in (tmp_path / "logs" / "recover").rglob("*.log")]
    assert any("resumed after step" in log for log in logs), logs
    local = tmp_path / "local"
    local.mkdir()
    make_slurm_project(local, SLOW)
    (local / "catalogue" / "recovery.yaml").write_text(yaml.safe_dump({"slow": recovery}))
    assert snakemake(local).returncode == 0
    assert computed(local) == computed(tmp_path)


@pytest.mark.long
def test_a_killed_node_and_a_cancelled_job_are_replaced(
    two_nodes: SlurmCluster, tmp_path: Path, slow_reference: dict[str, dict[str, str]]
) -> None:
    make_slurm_project(tmp_path, SLOW)
    with running(two_nodes, tmp_path) as process:
        both = wait_until(
            lambda: len(found := recovering(tmp_path)) == 2 and found, 240, "two recoveries"
        )
        two_nodes.run("scancel", both[0]["slurm_job"])
        node = two_nodes.run("squeue", "-h", "-j", both[1]["slurm_job"], "-o", "%N").stdout.strip()
        two_nodes.kill_node(node)
        code = process.wait(timeout=600)
    two_nodes.start_node(node)
    said = log_of(tmp_path)
    assert code == 0, said[-3000:]
    assert "SLURM status is: 'CANCELLED'" in said
    assert "SLURM status is: 'NODE_FAIL'" in said
    jobs = submitted(two_nodes, tmp_path)
    assert {"CANCELLED", "NODE_FAIL", "COMPLETED"} <= {job["JobState"] for job in jobs}
    assert computed(tmp_path) == slow_reference
    assert not attempts(tmp_path, "recover")


@pytest.mark.long
def test_after_a_kill_of_the_main_process_the_jobs_are_waited_for(
    two_nodes: SlurmCluster, tmp_path: Path, slow_reference: dict[str, dict[str, str]]
) -> None:
    make_slurm_project(tmp_path, SLOW)
    with running(two_nodes, tmp_path) as process:
        both = wait_until(
            lambda: len(found := recovering(tmp_path)) == 2 and found, 240, "two recoveries"
        )
        # They shall still be at it when the run is started again, however slow this machine is.
        for note in both:
            os.kill(note["pid"], signal.SIGSTOP)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    survivors = records(tmp_path)
    refused = run(two_nodes, tmp_path, "orphans=refuse")
    assert refused.returncode != 0
    with running(two_nodes, tmp_path) as process:
        wait_until(lambda: "waiting for them" in log_of(tmp_path), 240, "the second start")
        for note in both:
            os.kill(note["pid"], signal.SIGCONT)
        assert process.wait(900) == 0, log_of(tmp_path)[-3000:]
    for said in (refused.stderr, log_of(tmp_path)):
        (line,) = (line for line in said.splitlines() if " of an earlier run in this dir" in line)
        assert all(f"{note['slurm_job']} (running, recover)" in line for note in both), line
    after = records(tmp_path)
    assert all(after[key] == record for key, record in survivors.items())
    jobs = submitted(two_nodes, tmp_path)
    # One job a step: nothing was submitted twice.
    on_slurm = [r for r in after.values() if r["environment"].get("SLURM_JOB_ID")]
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}
    assert len(jobs) == len(on_slurm) == len({r["environment"]["SLURM_JOB_ID"] for r in on_slurm})
    assert computed(tmp_path) == slow_reference


@pytest.mark.long
def test_one_broken_method_stops_no_other_and_is_not_tried_again(
    two_nodes: SlurmCluster, tmp_path: Path
) -> None:
    make_slurm_project(tmp_path, SHORT | {"methods": ["magnitude_l2", "element1"]})
    prepared = run(two_nodes, tmp_path, "--until", "calibration")
    assert prepared.returncode == 0, prepared.stderr[-3000:]
    # A calibration set that was damaged after it was made: only element1 reads it.
    (windows,) = (tmp_path / "results" / "calibration").glob("**/*.safetensors")
    damaged = bytearray(windows.read_bytes())
    damaged[-1] ^= 1
    windows.write_bytes(damaged)
    done = run(two_nodes, tmp_path)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("failed: "))
    assert line.startswith("failed: statistics of tiny/gradients")
    assert "sha256" in line
    assert "log logs/statistics/" in line
    with (tmp_path / "results" / "benchmark.csv").open(encoding="utf-8") as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    assert table["magnitude_l2"]["perplexity"]
    page = (tmp_path / "results" / "report.html").read_text(encoding="utf-8")
    assert "statistics of tiny/gradients" in page
    (note,) = attempts(tmp_path, "statistics")
    assert (note["permanent"], note["number"]) == (True, 1)
    # Three tries were allowed; the two others ended at once, with the same line.
    (log,) = (tmp_path / "logs" / "statistics").glob("**/*.log")
    assert log.read_text().rstrip().endswith("(not tried again)")
    states = [job["JobState"] for job in submitted(two_nodes, tmp_path)]
    assert states.count("FAILED") == 3
    status = subprocess.run(
        [
            sys.executable,
            str(ROOT / "workflow_scripts" / "status.py"),
            "--experiment",
            "experiment.yaml",
            "--catalogue",
            "catalogue",
        ],
        cwd=tmp_path,
        env=two_nodes.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert status.returncode == 1
    lines = status.stdout.splitlines()
    assert any(line.startswith("failed") and "sha256" in line for line in lines), status.stdout
    assert any(line.startswith("done") and "magnitude_l2" in line for line in lines)


@pytest.mark.long
def test_code_that_changes_during_a_run_is_noticed(two_nodes: SlurmCluster, tmp_path: Path) -> None:
    """A job reads the code when it starts, so it must see that it is not what was planned."""
    code = tmp_path / "code"
    ignored = shutil.ignore_patterns(".git", ".venv", "results", "logs", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, code, symlinks=True, ignore=ignored)
    directory = tmp_path / "work"
    directory.mkdir()
    make_slurm_project(directory, SHORT)
    changed = command("--retries", "0")
    changed[changed.index("--snakefile") + 1] = str(code / "Snakefile")
    with (directory / "run.log").open("wb") as log:
        process = subprocess.Popen(
            changed, cwd=directory, env=two_nodes.env, stdout=log, stderr=subprocess.STDOUT
        )
        wait_until(lambda: "has been submitted" in log_of(directory), 120, "a submission")
        evaluator = code / "prunelib" / "evaluation" / "perplexity.py"
        evaluator.write_text(evaluator.read_text() + "\n\ndef added() -> None:\n    return\n")
        assert process.wait(timeout=300) != 0
    text = log_of(directory) + "".join(p.read_text() for p in (directory / "logs").rglob("*.log"))
    assert "start the run again" in text
    made = [r for r in records(directory).values() if r["step"] == "perplexity"]
    keys = {hashlib.sha256(json.dumps(r["files"]).encode()).hexdigest() for r in made}
    # Jobs that had read the old code may have finished under the old key; none has a mixture.
    assert len(keys) == len(made)
