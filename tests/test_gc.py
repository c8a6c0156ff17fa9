"""What is live, what is dead, and that removing the dead harms nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from forged_project import experiment, forge, terminal, write_forgeable
from tiny_project import EXPERIMENT, ROOT, write_experiment

from prunelib.errors import InputError, PrunelibError
from prunelib.experiment.graph import Node, closure
from prunelib.provenance import artefact, attempt, lock
from prunelib.sharing import gc

METHODS = {"methods": ["magnitude_l2", "wanda_sp"], "baseline": "wanda_sp"}
CATALOGUE = Path("catalogue")
FILE = Path("experiment.yaml")


@pytest.fixture(scope="module")
def forged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose experiment dropped magnitude_l2 after a run: its artefacts are dead."""
    directory = tmp_path_factory.mktemp("gc") / "project"
    write_forgeable(directory, METHODS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        forge()
        write_experiment(directory, EXPERIMENT | METHODS | {"methods": ["wanda_sp"]})
        Path("experiments").mkdir()
    return directory


@pytest.fixture
def project(forged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(forged, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    # The queue of a cluster that happens to be here is no business of these tests.
    monkeypatch.setattr(gc, "workflow_jobs", lambda: None)
    return tmp_path / "project"


def census(older_than: float | None = None, *files: Path) -> gc.Census:
    return gc.take_census(files or [FILE], CATALOGUE, older_than)


def paths(found: list[gc.Found]) -> set[str]:
    return {one.path.as_posix() for one in found}


def all_artefacts() -> set[str]:
    return {path.parent.as_posix() for path in Path("results").glob("*/**/provenance.json")}


def planned() -> dict[str, Node]:
    return closure(terminal(experiment()))


def dead_prune() -> Path:
    parent = Path("results/prune/tiny/magnitude_l2/groups-0.34-protect-1-0")
    (found,) = (path for path in parent.iterdir() if re.fullmatch("[0-9a-f]{16}", path.name))
    return found


def remove_all(found: gc.Census) -> None:
    assert [fault for _, fault in gc.delete(found)] == [None] * (
        len(found.dead) + len(found.leftovers)
    )


# --- live and dead -------------------------------------------------------------------------------


def test_what_no_experiment_plans_is_dead_and_nothing_else(project: Path) -> None:
    found = census()
    live = {node.directory.as_posix() for node in planned().values()}
    assert len(paths(found.dead)) == 6
    assert all("/magnitude_l2/" in path for path in paths(found.dead))
    assert paths(found.live) == live
    assert paths(found.dead) | live == all_artefacts()
    assert found.objections == []
    size = sum(f.stat().st_size for f in dead_prune().iterdir())
    assert {one.size for one in found.dead if one.path == dead_prune()} == {size}


def test_another_experiment_that_plans_it_keeps_it(project: Path) -> None:
    other = Path("experiments") / "other.yaml"
    other.write_text(yaml.safe_dump(EXPERIMENT | METHODS))
    files = gc.experiment_files(Path("experiments"), [FILE])
    assert files == [other, FILE]
    found = census(None, *files)
    assert found.dead == []
    (why,) = gc.why(dead_prune().name, found)[:1]
    assert why == "experiments/other.yaml plans it: prune of " + "/".join(dead_prune().parts[2:-1])


def test_all_that_a_live_artefact_was_made_from_is_live(project: Path) -> None:
    adapter = next(Path("results/recover/tiny/magnitude_l2").glob("**/provenance.json")).parent
    Path(f"{adapter}.dvc").write_text("outs: []\n")
    found = census()
    # Adapter, checkpoint, scores; not their evaluations.
    assert len(found.dead) == 3
    assert {path.split("/")[1] for path in paths(found.dead)} == {"perplexity", "efficiency"}
    assert gc.why(adapter.name, found) == [f"{adapter}.dvc stands for it"]
    assert f"{adapter.name} was made from it (checkpoint)" in gc.why(dead_prune().name, found)


def git(*arguments: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *who, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize("tracked", ["provenance.json", ".dvc"])
def test_what_git_holds_or_a_tag_names_is_live(project: Path, tracked: str) -> None:
    path = dead_prune() / tracked if tracked != ".dvc" else Path(f"{dead_prune()}.dvc")
    path.touch()
    git("init", "-q")
    git("add", "-f", str(path))
    git("commit", "-qm", "one")
    # What git holds is not lost by a removal, but it would be a change to the repository.
    assert dead_prune().as_posix() not in paths(census().dead)
    assert f"git holds {path}" in gc.why(dead_prune().name, census())
    git("tag", "v1")
    git("rm", "-q", "--cached", str(path))
    git("commit", "-qm", "two")
    if tracked == ".dvc":
        path.unlink()
    found = census()
    assert dead_prune().as_posix() not in paths(found.dead)
    assert f"git tag v1 names {path}" in gc.why(dead_prune().name, found)


def test_git_that_cannot_answer_is_no_licence_to_delete(project: Path) -> None:
    git("init", "-q")
    Path(".git", "HEAD").write_text("garbage")
    with pytest.raises(PrunelibError, match="git may name artefacts, but git ls-files says: "):
        census()


def test_an_experiment_that_cannot_be_loaded_forbids_any_removal(project: Path) -> None:
    Path("experiments", "broken.yaml").write_text("name: x\n")
    found = census(None, FILE, Path("experiments/broken.yaml"))
    assert len(found.dead) == 6
    (objection,) = found.objections
    assert "experiments/broken.yaml" in objection
    before = all_artefacts()
    with pytest.raises(PrunelibError, match="nothing was removed: an experiment cannot be loaded"):
        next(gc.delete(found))
    assert all_artefacts() == before


def test_without_any_experiment_nothing_is_removed(project: Path) -> None:
    found = gc.take_census([], CATALOGUE)
    with pytest.raises(PrunelibError, match="no experiment file was found"):
        next(gc.delete(found))


def test_only_what_is_older(project: Path) -> None:
    path = dead_prune() / "provenance.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"finished": "2020-01-01T00:00:00+00:00"}))
    # File times say nothing.
    os.utime(path, (time.time(), time.time()))
    assert paths(census(7.0).dead) == {dead_prune().as_posix()}
    assert len(census(0.0).dead) == 6


# --- work that goes on ---------------------------------------------------------------------------


def note_of_live_process(out: Path, **changes: Any) -> None:
    running = attempt.begin(out, "prune", out.name)
    note = asdict(running.attempt) | changes
    running.succeed()
    attempt.attempt_path(out).write_text(json.dumps(note))


def test_nothing_is_removed_while_somebody_makes_what_is_not_planned(project: Path) -> None:
    out = dead_prune().with_name("0" * 16)
    note_of_live_process(out)
    found = census()
    assert len(found.objections) == 1
    assert f"process {os.getpid()} on " in found.objections[0]
    assert out.name in found.reasons
    # Elsewhere, or by other code whose notes cannot be read, and seen lately.
    for changes in ({"host": "elsewhere"}, {"started": "today", "earlier": None}):
        note_of_live_process(out, **changes)
        assert census().objections
        os.utime(attempt.attempt_path(out), (time.time() - 7 * 3600,) * 2)
        assert not census().objections


def test_work_on_what_is_planned_is_left_alone(project: Path) -> None:
    node = next(node for node in planned().values() if node.step == "recover")
    shutil.rmtree(node.directory)
    state = node.directory.with_name(f"{node.key}.state")
    state.mkdir()
    scratch = node.directory.with_name(f"{node.key}.tmp-{gc.host_name()}-{os.getpid()}")
    scratch.mkdir()
    note_of_live_process(node.directory)
    remove_all(census())
    assert state.exists()
    assert scratch.exists()
    assert attempt.read_attempt(node.directory)


def test_jobs_in_the_queue_count(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prunelib.cluster.slurm import Job

    comment = f"rule_prune_wildcards_tiny_{dead_prune().name}"
    job = Job("7", "PENDING", Path.cwd(), comment, "x", "", 0)
    monkeypatch.setattr(gc, "workflow_jobs", lambda: [job])
    assert "SLURM job 7 makes " in census().objections[0]

    def silent() -> None:
        raise PrunelibError("squeue: no answer")

    monkeypatch.setattr(gc, "workflow_jobs", silent)
    assert census().objections == []
    Path("logs", "slurm").mkdir(parents=True)
    assert "squeue: no answer" in census().objections[0]


def test_no_removal_during_a_run_and_no_run_during_a_removal(project: Path) -> None:
    with (
        lock.acquire(gc.LAUNCH_LOCK, command="snakemake"),
        pytest.raises(InputError, match="snakemake"),
    ):
        gc.no_launches()
    with gc.no_launches(), pytest.raises(InputError, match="gc --delete"):
        lock.acquire(gc.LAUNCH_LOCK, command="snakemake")


# --- leftovers -----------------------------------------------------------------------------------


def test_leftovers_of_dead_work_are_found_and_those_of_live_work_stay(project: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    live = next(node for node in planned().values() if node.step == "recover")
    absent = live.directory.with_name("1" * 16)
    shutil.rmtree(live.directory)
    dead, host = dead_prune(), gc.host_name()
    leftovers = [
        f"{dead}.state",
        f"{dead}.tmp-{host}-{gone.pid}",
        f"{live.directory}.tmp-{host}-{gone.pid}",
        f"{live.directory}.old-{host}-{gone.pid}",
        f"{absent}.state",
    ]
    stay = [f"{live.directory}.state", f"{dead}.tmp-{host}-{os.getpid()}"]
    for name in (*leftovers, *stay):
        Path(name).mkdir()
        Path(name, "weights").write_text("x" * 100)
    note_of_live_process(dead, ended=1.0, error="no")
    note_of_live_process(live.directory, ended=1.0, error="no")
    leftovers.append(f"{dead}.attempt.json")
    stay.append(f"{live.directory}.attempt.json")
    draft = Path(f"{live.directory}.attempt.json.{host}-{gone.pid}")
    draft.touch()
    stay.append(str(draft))
    for node in (live, next(iter(planned().values()))):
        stamp = Path("results/.broken", f"{node.key}-123")
        stamp.parent.mkdir(exist_ok=True)
        stamp.touch()
        leftovers.append(str(stamp))
    for node_log, kept in ((Path("logs/prune", dead.name), False), (live.log, True)):
        log = node_log.with_suffix(".log")
        log.parent.mkdir(parents=True)
        log.touch()
        (stay if kept else leftovers).append(str(log))
    slurm = Path("logs/slurm/rule_prune", f"tiny_x_{dead.name}")
    slurm.mkdir(parents=True)
    leftovers.append(str(slurm))
    found = census()
    assert paths(found.leftovers) == set(leftovers)
    assert {one.size for one in found.leftovers if one.path.name.endswith(".state")} == {100}
    os.utime(draft, (1, 1))
    found = census()
    assert paths(found.leftovers) == {*leftovers, str(draft)}
    remove_all(found)
    assert not any(os.path.lexists(name) for name in leftovers)
    assert all(os.path.lexists(name) for name in stay if name != str(draft))


def test_a_stamp_that_a_damaged_artefact_still_asks_for_stays(project: Path) -> None:
    node = next(node for node in planned().values() if node.step == "recover")
    (node.directory / "forged.json").unlink()
    stamp = Path("results/.broken", f"{node.key}-{Path(node.target).stat().st_mtime_ns}")
    stamp.parent.mkdir()
    stamp.touch()
    assert census().leftovers == []
    shutil.rmtree(node.directory)
    assert paths(census().leftovers) == {stamp.as_posix()}


# --- removal -------------------------------------------------------------------------------------


def test_removal_takes_what_was_listed_and_the_run_has_nothing_to_do(project: Path) -> None:
    live = {node.directory.as_posix() for node in planned().values()}
    remove_all(census())
    assert all_artefacts() == live
    assert not list(Path("results").rglob("*magnitude_l2*"))
    assert all(artefact.is_valid(node.directory, key) for key, node in planned().items())
    assert census().dead == []


def test_a_link_goes_and_what_it_points_at_stays(project: Path) -> None:
    elsewhere = Path("elsewhere")
    shutil.move(dead_prune(), elsewhere)
    place = Path("results/prune/tiny/magnitude_l2/groups-0.34-protect-1-0") / ("a" * 16)
    place.symlink_to(elsewhere.resolve())
    remove_all(census())
    assert not os.path.lexists(place)
    assert (elsewhere / "provenance.json").exists()


def test_a_kill_at_any_moment_leaves_no_half_artefact(forged: Path, project: Path) -> None:
    found = census()
    # Two are enough: one that is removed, and one that comes after it.
    found = replace(found, dead=found.dead[:2])
    whole = all_artefacts()
    killed = 0
    for count in range(1, 60):
        shutil.rmtree("results")
        shutil.copytree(forged / "results", "results")
        code = remove_in_child(found, count)
        for path in whole:
            directory = Path(path)
            # A directory of that name is whole, or it is not there.
            assert not directory.exists() or artefact.is_valid(directory, directory.name), path
        remains = census()
        remove_all(remains)
        assert not list(Path("results").rglob("*.old-*"))
        if code == 0:
            break
        killed += 1
    assert code == 0
    assert killed >= 8


def remove_in_child(found: gc.Census, count: int) -> int:
    """Remove in a process that kills itself before its ``count``-th call that changes the disk."""
    pid = os.fork()
    if pid == 0:
        left = [count]

        def wrap(call: Any) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return wrapped

        for name in ("rename", "rmdir", "unlink"):
            setattr(os, name, wrap(getattr(os, name)))
        try:
            remove_all(found)
        except BaseException:
            os._exit(99)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code


# --- as a command --------------------------------------------------------------------------------

WHERE = ("--experiments", "experiments", "--catalogue", "catalogue")
THIS = ("--experiment", "experiment.yaml")


def main(*options: str) -> int:
    """Call the command's function in this process."""
    path = ROOT / "workflow_scripts" / "gc.py"
    spec = importlib.util.spec_from_file_location("script_gc", path)
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    code: int = script.main([*WHERE, *options])
    return code


def test_the_command_lists_and_only_removes_when_told(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = all_artefacts()
    assert main(*THIS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dead artefacts:"
    assert len(lines) == 8
    assert any(line.endswith(str(dead_prune())) for line in lines)
    assert lines[-1].startswith("dead: 6, ")
    assert main(*THIS, "--why", dead_prune().name) == 0
    assert capsys.readouterr().out == "nothing refers to it\n"
    with lock.acquire(gc.LAUNCH_LOCK, command="snakemake"):
        assert main(*THIS, "--delete") == 2
    assert "snakemake" in capsys.readouterr().err
    assert all_artefacts() == before
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "workflow_scripts" / "gc.py"), *WHERE, *THIS, "--delete"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert all(line.startswith("removed ") for line in lines[:6])
    assert len(all_artefacts()) == len(before) - 6
    assert not gc.LAUNCH_LOCK.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--experiment", "gone.yaml"), "gone.yaml: there is no such experiment file"),
        (("--experiments", "gone"), "gone: there is no such directory of experiments"),
        (("--why", "x", "--delete"), "--why and --delete do not go together"),
        ((*THIS, "--why", "x"), "'x' is not a key of an artefact here"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    project: Path, options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: gc: ")
    assert words in line
