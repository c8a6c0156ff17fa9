"""Faults that a run has to survive: full disks, flipped bits, kills, hostile names, lost metadata.

The commit protocol alone is tested in test_commit_protocol.py, jobs on a cluster in test_slurm.py.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from forged_project import (
    PARSED,
    copy_code,
    experiment,
    forge,
    in_process,
    stamp,
    terminal,
    would_run,
    write_forgeable,
)
from tiny_project import (
    CATALOGUES,
    EXPERIMENT,
    ROOT,
    make_project,
    snakemake,
    snakemake_command,
    start,
    write_experiment,
)

from prunelib.errors import InputError, IntegrityError, PrunelibError
from prunelib.experiment.graph import SCRIPTS, Node, closure
from prunelib.provenance import artefact, step
from prunelib.provenance.step import StepRequest, execute
from prunelib.sharing.explain import explain

METHODS = {"methods": ["wanda_sp"], "baseline": "wanda_sp"}
SECRETS = {
    "HF_TOKEN": "hf_plantedPlantedPlanted",
    "HUGGING_FACE_HUB_TOKEN": "hf_anotherOneThatIsPlanted",
    "WANDB_API_KEY": "0123456789abcdefplanted0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": "aws/planted+secret",
}


@pytest.fixture(scope="module")
def forged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("faults") / "project"
    write_forgeable(directory, METHODS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        forge()
    return directory


@pytest.fixture
def project(forged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(forged, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def graph() -> dict[str, Node]:
    return closure(terminal(experiment()))


def never(request: StepRequest, out: Path) -> None:
    raise AssertionError(f"{request.step} began with a damaged input")


def run_step(node: Node, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a step's own script, as the workflow does."""
    return subprocess.run(
        [sys.executable, "-P", str(ROOT / SCRIPTS[node.step]), "--request", node.request()],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().splitlines()[-1]


# --- damaged inputs ------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_input_of_any_step_is_found_before_work_begins(
    project: Path,
) -> None:
    tried = set()
    # The last of each step: pruned, and with an adapter where there are any.
    ordered = sorted(graph().values(), key=lambda n: (len(n.inputs), "wanda_sp" in n.labels))
    steps = {node.step: node for node in ordered}
    for node in steps.values():
        shutil.rmtree(node.directory)
        for upstream in node.inputs.values():
            path = upstream.directory / "forged.json"
            if not path.exists():
                execute(StepRequest.from_json(upstream.request()), copy_forged)
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            with pytest.raises(IntegrityError, match=f"{path}: sha256 is ") as found:
                execute(StepRequest.from_json(node.request()), never)
            assert found.value.permanent
            path.write_bytes(content)
            tried.add((node.step, upstream.step))
        execute(StepRequest.from_json(node.request()), copy_forged)
    assert tried == {
        ("calibration", "fetch_text"),
        ("calibration", "fetch_model"),
        ("statistics", "calibration"),
        ("statistics", "fetch_model"),
        ("scores", "fetch_model"),
        ("scores", "statistics"),
        ("prune", "fetch_model"),
        ("prune", "scores"),
        ("recover", "fetch_text"),
        ("recover", "prune"),
        ("perplexity", "prune"),
        ("perplexity", "recover"),
        ("perplexity", "fetch_text"),
        ("efficiency", "prune"),
    }


@pytest.mark.parametrize(
    ("name", "at_start"),
    [
        ("statistics.safetensors", True),
        ("articles.jsonl", True),
        ("model-00001-of-00002.safetensors", False),
    ],
)
def test_of_large_inputs_only_weights_wait_for_their_reader(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str, at_start: bool
) -> None:
    monkeypatch.setattr(step, "_SMALL_BYTES", 3)
    node = next(node for node in graph().values() if node.step == "scores" and len(node.inputs) > 1)
    upstream = node.inputs["activations"]
    for directory in (node.directory, upstream.directory):
        shutil.rmtree(directory)

    def write(request: StepRequest, out: Path) -> None:
        (out / name).write_text("large")

    execute(StepRequest.from_json(upstream.request()), write)
    (upstream.directory / name).write_text("Large")
    if at_start:
        with pytest.raises(IntegrityError, match=f"{name}: sha256 is "):
            execute(StepRequest.from_json(node.request()), never)
    else:
        assert execute(StepRequest.from_json(node.request()), copy_forged)


def copy_forged(request: StepRequest, out: Path) -> None:
    (out / "forged.json").write_text(f"{request.step}\n")


# --- full disks ----------------------------------------------------------------------------------


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own in memory; skips where one may not be made."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here: a full disk was not tried")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int) -> Path:
    """Fill a disk but for ``leave`` bytes."""
    filler = place / "filler"
    filler.write_bytes(b"")
    free = shutil.disk_usage(place).free
    filler.write_bytes(b"x" * max(0, free - leave))
    return filler


FULL = re.compile(r"no space left on device while writing \S+ after (\d+) bytes: (\d+) bytes free")


def commit_or_message(out: Path, write: Callable[[Path], None]) -> str | None:
    try:
        artefact.commit(out, write, {"key": out.name})
    except PrunelibError as error:
        return str(error)
    return None


def test_a_disk_that_fills_up_anywhere_in_a_commit_leaves_nothing(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        (directory / "weights").mkdir()
        for number in range(3):
            (directory / "weights" / f"{number}.bin").write_bytes(b"x" * 10_000)

    with small_disk(tmp_path / "disk", "256k") as disk:
        failed = 0
        for pages in range(20):
            out = disk / "results" / "prune" / ("0" * 16)
            filler = fill(disk, 4096 * pages)
            message = commit_or_message(out, write)
            if message:
                failed += 1
                told = FULL.fullmatch(message)
                assert told, message
                assert int(told[1]) <= 4096 * pages
                assert not out.parent.exists() or not list(out.parent.iterdir())
                filler.unlink()
                assert artefact.commit(out, write, {"key": out.name})
            filler.unlink(missing_ok=True)
            artefact.verify(out)
            shutil.rmtree(disk / "results")
        assert failed >= 8


def test_a_step_on_a_full_disk_says_so_and_the_next_run_repairs(project: Path) -> None:
    node = next(node for node in graph().values() if node.step == "fetch_text")
    shutil.rmtree("results")
    with small_disk(project / "results", "1m") as disk:
        # No room for the first note, and none for the whole text.
        for leave in (0, 8192):
            filler = fill(disk, leave)
            done = run_step(node)
            assert done.returncode == 1, done.stderr
            assert "Traceback" not in done.stderr
            assert re.match(
                r"error: fetch_text: no space left on device while writing results/fetch_text/"
                r"\S+ after \d+ bytes: \d+ bytes free$",
                last_line(done),
            )
            left = [path for path in disk.rglob("*") if path.is_file() and path != filler]
            assert all(path.name.endswith(".attempt.json") for path in left), left
            filler.unlink()
        done = run_step(node)
        assert done.returncode == 0, done.stderr
        artefact.verify(node.directory)
        assert not list(node.directory.parent.glob("*.*"))


@pytest.mark.long
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(tmp_path: Path) -> None:
    make_project(tmp_path, EXPERIMENT | {"methods": ["magnitude_l2"], "baseline": "magnitude_l2"})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        nodes = graph().values()
    pruned = next(n for n in nodes if n.step == "prune" and "parameters-0" not in n.labels)
    size = (tmp_path / "tiny" / "model.safetensors").stat().st_size
    # The model fits and the pruned one beside it does not.
    with small_disk(tmp_path / "results", str(int(1.3 * size) + 200_000)) as disk:
        run = snakemake(tmp_path, pruned.target)
        assert run.returncode != 0
        assert "error: prune: no space left on device while writing results/prune/" in run.stderr
        made = {path.parent for path in disk.glob("*/**/provenance.json")}
        assert {path.relative_to(disk).parts[0] for path in made} == {"fetch_model", "scores"}
        for directory in made:
            artefact.verify(directory)
        assert not list(disk.rglob("*.tmp-*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        before = {path: path.read_bytes() for path in disk.glob("*/**/provenance.json")}
        run = snakemake(tmp_path, pruned.target)
        assert run.returncode == 0, run.stderr[-3000:]
        artefact.verify(tmp_path / pruned.directory)
        assert all(path.read_bytes() == content for path, content in before.items())


# --- hostile names -------------------------------------------------------------------------------

HOSTILE = [
    "; rm -rf x",
    "$(touch sprung)",
    "`touch sprung`",
    "{wildcards.key}",
    "{input}",
    "<img src=x onerror=alert(1)>",
    "../../etc",
    "/etc",
    ".hidden",
    "-rf",
    "two words",
    "wanda_sp\n",
    "wanda\n_sp",
    "wanda_sp\x00",
    "w" * 300,
    "w\u0430nda_sp",  # a Cyrillic a
    "wanda\u2024sp",  # a dot leader
    "\uff57anda_sp",  # a full-width w
    "",
]


@pytest.mark.parametrize("catalogue", ["methods", "models", "calibration", "evaluation"])
def test_hostile_names_are_refused_in_one_line(project: Path, catalogue: str) -> None:
    """In the experiment, and in the catalogue even where no experiment asks for the entry."""
    old = {"methods": "wanda_sp", "models": "tiny"}.get(catalogue, "small")
    for name in HOSTILE:
        asked = [name] if catalogue in ("methods", "models") else name
        changes: dict[str, Any] = {catalogue: asked}
        if catalogue == "methods":
            changes["baseline"] = name
        write_experiment(project, EXPERIMENT | METHODS | changes)
        assert "experiment.yaml: " in refusal(), name
        write_experiment(project, EXPERIMENT | METHODS)
        entries = CATALOGUES[catalogue] | {name: CATALOGUES[catalogue][old]}
        path = Path("catalogue", f"{catalogue}.yaml")
        path.write_text(yaml.safe_dump(entries))
        assert f"{catalogue}.yaml: " in refusal(), name
        path.write_text(yaml.safe_dump(CATALOGUES[catalogue]))


def refusal() -> str:
    with pytest.raises(InputError) as refused:
        experiment()
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


@pytest.mark.parametrize("name", ["tiny\n", "ti ny", "t" * 65, "\u0442iny"])
def test_a_hostile_name_of_the_experiment_is_refused(project: Path, name: str) -> None:
    write_experiment(project, EXPERIMENT | METHODS | {"name": name})
    with pytest.raises(InputError, match=r"experiment\.yaml: name: "):
        experiment()


@pytest.mark.long
def test_paths_with_blanks_quotes_and_braces_are_passed_as_they_are(
    forged: Path, tmp_path: Path
) -> None:
    """Where people put the repository, and how they call their experiment, is their own affair."""
    name = 'it\'s a {label} $(touch sprung) "one"'
    code = copy_code(ROOT, tmp_path / f"code {name}")
    project = tmp_path / name
    shutil.copytree(forged, project)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        (node,) = (node for node in graph().values() if node.step == "fetch_text")
    shutil.rmtree(project / node.directory)
    (shown,) = (project / "results").glob(".report-*")
    shown.unlink()
    (project / "experiment.yaml").rename(project / f"{name}.yaml")
    (project / "catalogue").rename(project / "my 'own' catalogue")

    def run(*targets: str) -> subprocess.CompletedProcess[str]:
        command = snakemake_command(*targets)
        command[command.index(str(ROOT / "Snakefile"))] = str(code / "Snakefile")
        command[-2:] = [f"experiment={name}.yaml", "catalogue=my 'own' catalogue"]
        environment = os.environ | {"PYTHONPATH": str(code)}
        return subprocess.run(
            command, cwd=project, env=environment, capture_output=True, text=True, check=False
        )

    done = run(node.target)
    assert done.returncode == 0, done.stderr[-3000:]
    artefact.verify(project / node.directory)
    # The report's command names experiment and catalogue. It gets as far as the forged figures.
    done = run()
    assert done.returncode != 0
    (log,) = (project / "logs").glob("report-*.log")
    assert re.match(
        r"error: report: (\d+ of \d+ cells are not finished|nothing to report)", log.read_text()
    )
    assert not list(tmp_path.rglob("sprung"))


# --- secrets -------------------------------------------------------------------------------------


def assert_no_secret(directory: Path, *texts: str) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            for name, secret in SECRETS.items():
                assert secret.encode() not in content, (name, path)
    for text in texts:
        assert not any(secret in text for secret in SECRETS.values())


def test_secrets_of_the_environment_are_in_no_file_of_a_step(project: Path) -> None:
    (node,) = (node for node in graph().values() if node.step == "fetch_text")
    shutil.rmtree(node.directory)
    done = run_step(node, **SECRETS)
    assert done.returncode == 0, done.stderr
    assert artefact.read(node.directory)["environment"] is not None
    assert_no_secret(project, done.stdout, done.stderr)
    # Nor are they in what a failure leaves.
    shutil.rmtree(node.directory)
    Path("text", "articles.jsonl").write_text("{")
    done = run_step(node, **SECRETS)
    assert done.returncode != 0
    assert list(node.directory.parent.glob("*.attempt.json"))
    assert_no_secret(project, done.stdout, done.stderr)


# --- lost and damaged metadata -------------------------------------------------------------------


def test_a_flipped_bit_in_the_cache_of_parsed_code_changes_no_key(project: Path) -> None:
    """Well-formed, but wrong: every key would be, and no step would agree with its plan."""
    assert in_process(ROOT, project, "would_run") == []
    whole = PARSED.read_text()
    content = json.loads(whole)
    digest = next(parts[0][0][1] for parts in content["files"].values() if parts[0])
    PARSED.write_text(whole.replace(digest, f"{int(digest[0], 16) ^ 1:x}{digest[1:]}"))
    assert in_process(ROOT, project, "would_run") == []
    assert json.loads(PARSED.read_text()) == content


def snapshot(directory: Path) -> dict[str, str]:
    """The sha256 of every file and the target of every link; directories by their names."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "directory"
    return found


@pytest.mark.long
def test_results_survive_the_loss_of_all_metadata(project: Path) -> None:
    before = snapshot(project / "results")
    for damage in ("gone", "garbage"):
        shutil.rmtree(".snakemake", ignore_errors=True)
        PARSED.unlink(missing_ok=True)
        if damage == "garbage":
            for name in ("metadata", "incomplete", "locks"):
                (project / ".snakemake" / name).mkdir(parents=True)
                (project / ".snakemake" / name / "0.input.lock").write_text("\0garbage")
            PARSED.write_text("garbage")
            Path("results/.launch.lock").write_text("\0garbage")
            os.utime("results/.launch.lock", (1, 1))
        run = snakemake(project)
        assert run.returncode == 0, run.stderr[-3000:]
        assert "Nothing to be done" in run.stdout + run.stderr
        Path("results/.launch.lock").unlink(missing_ok=True)
        PARSED.unlink()
        assert snapshot(project / "results") == before
    # With something to do, the lock is looked at: garbage of long ago is taken over.
    Path("results/.launch.lock").write_text("\0garbage")
    os.utime("results/.launch.lock", (1, 1))
    (node,) = (node for node in graph().values() if node.step == "fetch_text")
    record = (project / node.target).read_text()
    shutil.rmtree(node.directory)
    run = snakemake(project, node.target)
    assert run.returncode == 0, run.stderr[-3000:]
    assert not Path("results/.launch.lock").exists()
    assert json.loads((project / node.target).read_text())["key"] == json.loads(record)["key"]


@pytest.mark.long
def test_looking_changes_nothing(project: Path) -> None:
    write_experiment(project, EXPERIMENT | METHODS | {"seeds": [0, 1]})
    shutil.rmtree("results/perplexity")
    arguments = ["--experiment", "experiment.yaml", "--catalogue", "catalogue"]
    looks = [
        snakemake_command("-n"),
        *(
            [sys.executable, "-P", str(ROOT / "workflow_scripts" / f"{name}.py"), *arguments]
            for name in ("status", "explain")
        ),
        [
            *(sys.executable, "-P", str(ROOT / "workflow_scripts" / "gc.py"), *arguments),
            *("--experiments", "."),
        ],
    ]
    before = snapshot(project)
    for look in looks:
        subprocess.run(
            look, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False
        )
        after = snapshot(project)
        # A cache that saves parsing, and what Snakemake keeps for itself.
        own = {name for name in after if name.startswith(".snakemake")} | {PARSED.as_posix()}
        assert {n: s for n, s in after.items() if n not in own} == {
            n: s for n, s in before.items() if n not in own
        }, look


# --- records of other versions -------------------------------------------------------------------


@pytest.mark.parametrize("schema", [0, 2])
def test_a_record_of_another_schema_is_made_anew_and_never_read(project: Path, schema: int) -> None:
    nodes = graph().values()
    node = next(n for n in nodes if n.step == "recover" and n.labels[1] == "wanda_sp")
    record = json.loads(Path(node.target).read_text())
    Path(node.target).write_text(json.dumps(record | {"schema": schema}))
    # The evaluation of it stands, and the report reads no such record.
    assert would_run() == [f"recover {'/'.join(node.labels)}"]
    (reason,) = explain([node])
    assert reason.causes[0].text == f"{node.target}: is not a record of schema version 1"
    above = next(n for n in nodes if node in n.inputs.values())
    shutil.rmtree(above.directory)
    with pytest.raises(
        InputError, match=r"input 'adapter': .* is not a record of schema version 1"
    ):
        execute(StepRequest.from_json(above.request()), never)


# --- one name for two things ---------------------------------------------------------------------


def test_another_model_under_the_same_name_shares_nothing_but_texts(project: Path) -> None:
    before = graph()
    shutil.copytree("tiny", "other")
    models = copy.deepcopy(CATALOGUES["models"])
    models["tiny"]["source"] = "dir:other"
    Path("catalogue", "models.yaml").write_text(yaml.safe_dump(models))
    after = graph()
    shared = before.keys() & after.keys()
    assert {before[key].step for key in shared} == {"fetch_text"}
    assert {n.name for n in before.values()} == {n.name for n in after.values()}
    assert not stamp(experiment()).exists()


# --- kills ---------------------------------------------------------------------------------------


def records(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        path.parent.name: json.loads(path.read_text())
        for path in (directory / "results").glob("*/**/provenance.json")
    }


def figures(directory: Path) -> dict[str, Any]:
    """All that was computed, by key: hashes of files; of perplexities, without their times."""
    found: dict[str, Any] = {}
    for key, record in records(directory).items():
        found[key] = {name: facts["sha256"] for name, facts in record["files"].items()}
        if record["step"] == "perplexity":
            (place,) = (directory / "results" / "perplexity").glob(f"**/{key}")
            metrics = json.loads((place / "metrics.json").read_text())
            found[key] = [metrics["perplexity"], metrics["window_nll"]]
    return found


@pytest.mark.long
def test_kills_at_random_moments_change_no_figure_and_redo_no_finished_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of everything, again and again; ``PRUNELIB_KILLS`` says how often (10)."""
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    small = EXPERIMENT | {"methods": ["element1"]}
    make_project(unbroken, small)
    # Times are measured, and no two measurements are equal.
    evaluation = {"small": {"perplexity": CATALOGUES["evaluation"]["small"]["perplexity"]}}
    (unbroken / "catalogue" / "evaluation.yaml").write_text(yaml.safe_dump(evaluation))
    shutil.copytree(unbroken, killed)
    run = snakemake(unbroken)
    assert run.returncode == 0, run.stderr[-3000:]
    # All of its files were made with secrets in the environment.
    assert_no_secret(unbroken, run.stdout, run.stderr)
    expected = figures(unbroken)
    rng, left = random.Random(20), int(os.environ.get("PRUNELIB_KILLS", "10"))
    survivors: dict[str, dict[str, Any]] = {}
    while left:
        process = start(killed)
        try:
            # From the start of Snakemake to well into the steps.
            process.wait(timeout=rng.uniform(3, 14))
        except subprocess.TimeoutExpired:
            left -= 1
        else:
            assert process.returncode == 0
            # It got to the end: from the start again.
            shutil.rmtree(killed / "results")
            survivors = {}
            continue
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = records(killed)
        assert {key: found[key] for key in survivors} == survivors
        survivors = found
    run = snakemake(killed)
    assert run.returncode == 0, run.stderr[-3000:]
    final = records(killed)
    assert {key: final[key] for key in survivors} == survivors
    assert figures(killed) == expected
    remains = [path.name for path in (killed / "results").rglob("*.*-*")]
    assert not [name for name in remains if re.search(r"\.(tmp|old|state|attempt)", name)]
    assert not list((killed / "results").rglob("*.state"))
