"""What of an experiment lies where: in git, in DVC, or only on this machine.

Metrics are whole artefacts in git. Of a checkpoint or an adapter git holds ``<key>.record/``, a
copy of its provenance and of what a report reads, and, if DVC has the files, ``<key>.dvc``. A
record without a pointer is the light form: the checkpoint is made again from its plan.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunelib.errors import InputError, IntegrityError, PrunelibError
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import RESULTS, Node, closure, report_key
from prunelib.plan import FILE_NAME as PLAN
from prunelib.provenance import artefact, lock
from prunelib.provenance.fingerprint import ROOT

# Step -> what its record holds beside provenance.json: all that a report reads of it.
HELD: dict[str, tuple[str, ...]] = {
    "prune": (PLAN,),
    "recover": ("meta.json", "loss.jsonl"),
    "merge": (PLAN,),
}
IN_GIT = ("perplexity", "tasks", "efficiency")
REPORT = (RESULTS / "summary.json", RESULTS / "benchmark.csv", RESULTS / "plots")
"""Written anew from the artefacts, never merged."""
LOCK = RESULTS / ".sharing.lock"
MERGE_DRIVER = "results"
"""Name of the merge driver in .gitattributes."""


def pointer_of(directory: Path) -> Path:
    """Return the ``.dvc`` file of an artefact."""
    return directory.with_name(f"{directory.name}.dvc")


def record_of(directory: Path) -> Path:
    """Return the directory in git that holds an artefact's provenance and what reports read."""
    return directory.with_name(f"{directory.name}.record")


def has_record(node: Node) -> bool:
    """Whether git's copy of a checkpoint's or adapter's provenance is here and is this step's."""
    if node.step not in HELD:
        return False
    record = record_of(node.directory)
    # Mostly nobody has shared it; the workflow asks this of every step.
    if not os.path.exists(record / artefact.RECORD):  # noqa: PTH110
        return False
    try:
        found: str = artefact.read(record)["key"]
    except IntegrityError:
        return False
    return found == node.key


def is_shared(node: Node) -> bool:
    """Whether a checkpoint or adapter can be had from others: pulled, or made from its plan."""
    if not has_record(node):
        return False
    return node.step == "prune" or pointer_of(node.directory).is_file()


def is_here(directory: Path) -> bool:
    """Whether an artefact, whole or broken, lies in this tree (a step's empty target does not)."""
    return (directory / artefact.RECORD).is_file()


def awaited(nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes without the checkpoints and adapters that are shared and not here.

    A finished experiment needs no checkpoint: the report reads plans and metrics, which git has.
    """
    return [node for node in nodes if is_here(node.directory) or not is_shared(node)]


def readable(directory: Path) -> Path:
    """Return where a report reads an artefact: its directory, or git's record where that is all."""
    record = record_of(directory)
    return record if not is_here(directory) and is_here(record) else directory


def steps_of(experiment: Experiment) -> list[Node]:
    """Return what the rows of the report are made of, each once, in their order."""
    nodes = (node for cell in experiment.cells for node in cell.steps.values())
    return list({node.key: node for node in nodes}.values())


def report_stamp(experiment: Experiment) -> Path:
    """Return the file that stands while the report under ``results/`` is this experiment's."""
    return RESULTS / f".report-{report_key(experiment.report(), closure(steps_of(experiment)))}"


def write_report(experiment: Experiment, *, partial: bool) -> Path:
    """Write the report anew: what lies there may be another experiment's, or another clone's.

    Returns:
        The path of its page.

    Raises:
        PrunelibError: it cannot be written; carries what the script says.
    """
    for stamp in RESULTS.glob(".report-*"):
        stamp.unlink()
    arguments = ["--experiment", str(experiment.path), "--catalogue", str(experiment.config)]
    arguments += ["--out", str(RESULTS), *(["--partial"] if partial else [])]
    run_script("report", arguments)
    if not partial:
        # By this the workflow knows that it stands.
        report_stamp(experiment).touch()
    return RESULTS / "report.html"


def run_script(name: str, arguments: Iterable[str]) -> None:
    """Run one of the workflow's scripts.

    Raises:
        PrunelibError: it fails; carries its last line.
    """
    script = ROOT / "workflow_scripts" / f"{name}.py"
    command = [sys.executable, "-P", str(script), *arguments]
    # The library beside the script, as in the workflow, also where another one is installed.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["it does not say why"])[-1]
        raise PrunelibError(f"{script.name} failed: {words}")


@contextmanager
def sharing() -> Iterator[None]:
    """Hold the lock under which results are published or obtained.

    Raises:
        InputError: another process of this directory holds it; names it. Or this is not the root
            of a git repository with DVC.
    """
    check_place()
    RESULTS.mkdir(exist_ok=True)
    with lock.acquire(LOCK, command=shlex.join(sys.argv)):
        yield


# ------------------------------------------------------------------------------------------- git


def git(
    *arguments: str,
    paths: Iterable[Path | str] | None = None,
    check: bool = True,
    literal: bool = True,
) -> str:
    """Run git and return what it prints.

    Args:
        arguments: the command.
        paths: if given, handed over on standard input (there may be thousands), taken literally.
        check: whether a failure is an error.
        literal: whether paths mean themselves, not patterns.

    Raises:
        PrunelibError: git fails or is not there; carries its first line.
    """
    command, given = ["git", *arguments], None
    if paths is not None:
        command += ["--pathspec-from-file=-", "--pathspec-file-nul"]
        given = "\0".join(map(str, paths))
    try:
        done = subprocess.run(
            command,
            input=given,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"GIT_LITERAL_PATHSPECS": str(int(literal))},
        )
    except FileNotFoundError as error:
        raise PrunelibError("git is not installed") from error
    if check and done.returncode:
        words = " ".join((done.stderr or done.stdout).split())
        raise PrunelibError(f"git {arguments[0]}: {words}")
    return done.stdout


def _names(text: str) -> list[str]:
    return [name for name in text.split("\0") if name]


def check_place() -> None:
    """Refuse a working directory that is not the root of a git repository with DVC.

    Raises:
        InputError: names what is missing.
    """
    here = Path.cwd()
    top = git("rev-parse", "--show-toplevel", check=False).strip()
    if not top or Path(top).resolve() != here.resolve():
        raise InputError(f"{here}: not the root of a git repository; go to the root of your clone")
    if not (here / ".dvc" / "config").is_file():
        raise InputError(f"{here / '.dvc'}: missing; `dvc init` makes it")


def committed() -> set[str]:
    """Return the paths under ``results/`` that the last commit holds; none before the first."""
    listing = ("ls-tree", "-r", "-z", "--name-only", "HEAD", "--", str(RESULTS))
    return set(_names(git(*listing, check=False)))


def changed() -> set[str]:
    """Return the paths under ``results/`` that differ here from the last commit, or are gone."""
    listing = ("diff", "--name-only", "--no-renames", "-z", "HEAD", "--", str(RESULTS))
    return set(_names(git(*listing, check=False)))


def restore_held() -> None:
    """Bring pointers and records back to what the last commit says of them.

    They never change once they are committed: who publishes a key first decides its bytes.
    """
    differing = committed() & changed()
    held = sorted(p for p in differing if p.endswith(".dvc") or ".record" in Path(p).parent.name)
    if held:
        git("checkout", "-q", "HEAD", paths=held)


def staged() -> set[str]:
    """Return the paths that are staged for the next commit."""
    return set(_names(git("diff", "--cached", "--name-only", "--no-renames", "-z")))


def restore_deleted() -> int:
    """Bring back what git holds under ``results/`` and was deleted here; returns how many files."""
    gone = _names(git("ls-files", "--deleted", "-z", "--", str(RESULTS)))
    if gone:
        git("checkout", "-q", paths=gone)
    return len(gone)


def set_merge_driver() -> None:
    """Tell this clone how to merge results: what both sides have stays as it is here.

    An artefact's path says what it holds, so both sides of a conflict are right, and the report is
    written anew after a merge.
    """
    name = f"merge.{MERGE_DRIVER}"
    if git("config", "--local", f"{name}.driver", check=False).strip() != "true":
        git("config", "--local", f"{name}.name", "results: keep ours, they are keyed or remade")
        git("config", "--local", f"{name}.driver", "true")


def write_record(node: Node) -> list[Path]:
    """Write git's copy of an artefact's provenance and of what reports read; return the files.

    Files are replaced as a whole and provenance.json comes last, so that a record that has it is
    whole.
    """
    record = record_of(node.directory)
    record.mkdir(exist_ok=True)
    written = []
    for name in (*HELD[node.step], artefact.RECORD):
        content = (node.directory / name).read_bytes()
        path = record / name
        if not path.is_file() or path.read_bytes() != content:
            draft = record / f".{name}.draft"
            draft.write_bytes(content)
            draft.replace(path)
        written.append(path)
    return written


def size_of(node: Node) -> int:
    """Return the bytes of an artefact's files, from its own record or git's."""
    return _listed_bytes(node, None)


def record_size_of(node: Node) -> int:
    """Return the bytes of what git's record of a checkpoint or adapter holds besides provenance."""
    return _listed_bytes(node, HELD[node.step])


def _listed_bytes(node: Node, names: Iterable[str] | None) -> int:
    files: dict[str, Any] = artefact.read(readable(node.directory))["files"]
    return sum(files[name]["size"] for name in (files if names is None else names))


def in_words(size: int) -> str:
    """Return a number of bytes as people read it."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
