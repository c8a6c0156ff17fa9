"""What under ``results/`` nothing needs any more, and its removal.

Keys pile up: every change of code, parameters or packages makes new ones and leaves the old
artefacts where they are, so that changing back costs nothing. Dead is what no experiment file
plans, no live artefact was made from, no ``.dvc`` file, no file in git and no tag names, and
nobody works on.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath

from prunelib.cluster.progress import SLURM_LOGS, workflow_jobs
from prunelib.cluster.slurm import Job
from prunelib.errors import InputError, IntegrityError, PrunelibError
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import RESULTS, SCRIPTS, Node, closure
from prunelib.provenance import artefact, lock
from prunelib.provenance.attempt import attempt_path, read_attempt
from prunelib.provenance.liveness import host_name, is_same_process

LOGS = Path("logs")
LAUNCH_LOCK = RESULTS / ".launch.lock"
_KEY = re.compile(r"[0-9a-f]{16}")
_KEY_INSIDE = re.compile(r"(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])")
_BESIDE = re.compile(r"(?P<key>[0-9a-f]{16})\.(?P<what>tmp-.+|old-.+|state|attempt\.json.*)")
_BROKEN = re.compile(r"(?P<key>[0-9a-f]{16})-(?P<time>\d+)")
_HOUR, _DAY = 3600.0, 86400.0
_SILENT_SECONDS = 6 * 3600.0
"""A try elsewhere, which cannot be asked, is given up after this long without a sign of life."""


@dataclass(frozen=True)
class Found:
    """One directory or file under ``results/`` or ``logs/``: where, how large, how old."""

    path: Path
    size: int
    made: float


@dataclass(frozen=True)
class Tree:
    """What lies under ``results/`` and ``logs/``.

    Attributes:
        artefacts: key to its directories; a key has more than one if labels were renamed.
        beside: scratch directories, states and attempts, with the key they belong to.
        pointers: ``.dvc`` files, with the key they stand for.
        upstream: key to the keys that its record names, by input name.
    """

    artefacts: Mapping[str, list[Path]]
    beside: list[tuple[str, Path]]
    pointers: list[tuple[str, Path]]
    upstream: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Census:
    """What is live and why, what is dead, and what stands against removing it.

    Attributes:
        reasons: live key to what refers to it, one line each.
        dead: artefacts that nothing refers to.
        leftovers: what ended or dead work left behind.
        live: artefacts that are kept.
        objections: why nothing may be removed now, one line each.
    """

    reasons: Mapping[str, list[str]]
    dead: list[Found]
    leftovers: list[Found]
    live: list[Found]
    objections: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------ looking around


def _size(path: Path) -> int:
    total = 0
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    for parent, _, names in os.walk(path):
        for name in names:
            total += (Path(parent) / name).lstat().st_size
    return total


def _made(path: Path) -> float:
    """When an artefact was finished; for what has no record, when it was last changed."""
    try:
        return datetime.fromisoformat(str(artefact.read(path)["finished"])).timestamp()
    except (IntegrityError, KeyError, ValueError):
        return path.lstat().st_mtime


def _found(path: Path) -> Found:
    return Found(path, _size(path), _made(path) if path.is_dir() else path.lstat().st_mtime)


def read_tree() -> Tree:
    """Look through ``results/``; directories that are no steps of ours count by their records."""
    artefacts: dict[str, list[Path]] = {}
    beside: list[tuple[str, Path]] = []
    pointers: list[tuple[str, Path]] = []
    upstream: dict[str, Mapping[str, str]] = {}
    for top in sorted(RESULTS.iterdir()) if RESULTS.is_dir() else ():
        if top.name.startswith(".") or not top.is_dir():
            continue
        for parent, directories, files in os.walk(top):
            place = Path(parent)
            for name in sorted((*directories, *files)):
                if match := _BESIDE.fullmatch(name):
                    beside.append((match["key"], place / name))
                elif name.endswith(".dvc") and _KEY.fullmatch(key := name.removesuffix(".dvc")):
                    pointers.append((key, place / name))
            keys = [name for name in directories if _KEY.fullmatch(name)]
            for key in sorted(keys):
                if top.name in SCRIPTS or (place / key / artefact.RECORD).is_file():
                    artefacts.setdefault(key, []).append(place / key)
                    upstream[key] = _upstream(place / key) or upstream.get(key, {})
            # Nothing of ours lies inside an artefact or a scratch directory.
            directories[:] = [
                name for name in directories if name not in keys and not _BESIDE.fullmatch(name)
            ]
    return Tree(artefacts, beside, pointers, upstream)


def _upstream(directory: Path) -> Mapping[str, str]:
    try:
        found = artefact.read(directory).get("upstream")
    except IntegrityError:
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def planned(paths: Iterable[Path], catalogue: Path) -> tuple[dict[str, dict[str, Node]], list[str]]:
    """Return the nodes of every experiment by key, by path, and why some could not be loaded."""
    found: dict[str, dict[str, Node]] = {}
    problems = []
    for path in paths:
        try:
            cells = Experiment.load(path, catalogue).cells
            found[str(path)] = closure(node for cell in cells for node in cell.steps.values())
        except PrunelibError as error:
            problems.append(f"an experiment cannot be loaded, and may plan anything: {error}")
    return found, problems


def experiment_files(directory: Path, more: Iterable[Path]) -> list[Path]:
    """Return the experiment files of a directory, and those named one by one.

    Raises:
        InputError: the directory or a file is not there.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such directory of experiments")
    for path in more:
        if not path.is_file():
            raise InputError(f"{path}: there is no such experiment file")
    return [*sorted((*directory.glob("*.yaml"), *directory.glob("*.yml"))), *more]


def named_by_git() -> dict[str, list[str]]:
    """Return, by key, where this directory's git repository names it: its index, and its tags.

    Raises:
        PrunelibError: git cannot be asked although there is a repository.
    """
    # Not git's own word: it takes a damaged repository for none.
    if not any((place / ".git").exists() for place in (Path.cwd(), *Path.cwd().parents)):
        return {}
    listings = {"git holds": _git("ls-files", "-z", "--full-name", RESULTS.name)}
    for tag in _git("tag", "--list").splitlines():
        listing = _git("ls-tree", "-r", "-z", "--name-only", "--full-tree", tag)
        listings[f"git tag {tag} names"] = listing
    found: dict[str, list[str]] = {}
    for whose, listing in listings.items():
        for path in listing.split("\0"):
            if RESULTS.name in (parts := PurePosixPath(path).parts):
                for part in parts:
                    if _KEY.fullmatch(key := part.partition(".")[0]):
                        found.setdefault(key, []).append(f"{whose} {path}")
    return found


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise PrunelibError("git may name artefacts, but git is not installed") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise PrunelibError(
            f"git may name artefacts, but git {arguments[0]} says: {lines[0]}"
        ) from error
    return done.stdout


def worker(out: Path) -> str | None:
    """Say who may be making the artefact ``out`` now, None if nobody is; in doubt somebody is."""
    attempt = read_attempt(out)
    if attempt and attempt.ended is not None:
        return None
    if attempt and attempt.host == host_name():
        alive = is_same_process(attempt.pid, attempt.process_start)
    else:
        # A process elsewhere, or a note of another version: its file is touched while it lives.
        try:
            silent = time.time() - attempt_path(out).stat().st_mtime
        except FileNotFoundError:
            return None
        alive = silent < _SILENT_SECONDS
    if not alive:
        return None
    return (
        f"process {attempt.pid} on {attempt.host}" if attempt else f"{attempt_path(out)}: somebody"
    )


# ----------------------------------------------------------------------------- live and dead


def take_census(
    experiments: Iterable[Path], catalogue: Path, older_than: float | None = None
) -> Census:
    """Decide for every artefact, and all that was left beside them, whether something needs it.

    Args:
        experiments: files whose keys are live.
        catalogue: the directory of the catalogues.
        older_than: days; what is younger is not listed as dead.

    Raises:
        PrunelibError: git cannot be asked although there is a repository.
    """
    experiments = list(experiments)
    tree = read_tree()
    plans, objections = planned(experiments, catalogue)
    if not plans and not objections:
        objections.append("no experiment file was found: everything would be dead")
    reasons: dict[str, list[str]] = {}

    def live(key: str, why: str) -> None:
        reasons.setdefault(key, []).append(why)

    for path, nodes in plans.items():
        for key, node in nodes.items():
            live(key, f"{path} plans it: {node.name}")
    for key, pointer in tree.pointers:
        live(key, f"{pointer} stands for it")
    for key, whys in named_by_git().items():
        reasons.setdefault(key, []).extend(whys)
    at_work = _at_work(tree, _jobs(objections))
    for key, who in at_work.items():
        # Its inputs are needed as well, and which they are only a plan tells.
        if not any(key in nodes for nodes in plans.values()):
            objections.append(f"{who} makes {key}, which no experiment here plans; wait for it")
        live(key, f"{who} makes it")
    _add_upstream(reasons, tree.upstream)
    return _sort(tree, reasons, objections, set(at_work), older_than)


def _jobs(objections: list[str]) -> list[Job]:
    """Jobs of this directory in SLURM's queue; silence is an objection where there may be some."""
    try:
        return workflow_jobs() or []
    except PrunelibError as error:
        # A machine may have SLURM's commands and no cluster; then nothing here ever ran on one.
        if SLURM_LOGS.is_dir():
            objections.append(f"SLURM may hold jobs of this directory: {error}")
        return []


def _at_work(tree: Tree, jobs: Iterable[Job]) -> dict[str, str]:
    """Keys that somebody makes now, or is queued to make, and who."""
    found = {}
    for key, path in tree.beside:
        if path.name == f"{key}.attempt.json" and (who := worker(path.with_name(key))):
            found[key] = who
    for job in jobs:
        for key in _KEY_INSIDE.findall(job.comment):
            found[key] = f"SLURM job {job.job_id}"
    return found


def _add_upstream(reasons: dict[str, list[str]], upstream: Mapping[str, Mapping[str, str]]) -> None:
    """Add what live artefacts were made from, all the way up."""
    waiting = list(reasons)
    while waiting:
        key = waiting.pop()
        for name, above in upstream.get(key, {}).items():
            if above not in reasons:
                waiting.append(above)
            reasons.setdefault(above, []).append(f"{key} was made from it ({name})")


def _sort(
    tree: Tree,
    reasons: Mapping[str, list[str]],
    objections: list[str],
    at_work: set[str],
    older_than: float | None,
) -> Census:
    latest = time.time() - (older_than or 0.0) * _DAY
    kept: list[Found] = []
    dead: list[Found] = []
    for key, directories in tree.artefacts.items():
        (kept if key in reasons else dead).extend(_found(path) for path in directories)
    leftovers = [_found(path) for path in _leftovers(tree, reasons, at_work)]
    if older_than is not None:
        dead = [found for found in dead if found.made < latest]
        leftovers = [found for found in leftovers if found.made < latest]
    return Census(reasons, dead, leftovers, kept, objections)


def _leftovers(tree: Tree, live: Mapping[str, object], at_work: set[str]) -> Iterator[Path]:
    for key, path in tree.beside:
        out = path.with_name(key)
        if path.name.startswith((f"{key}.tmp-", f"{key}.old-")):
            if artefact.is_left_by_dead_writer(path, out):
                yield path
        elif path.name not in (f"{key}.state", f"{key}.attempt.json"):
            # Half a note; whole ones are written in an instant.
            if time.time() - path.lstat().st_mtime > _HOUR:
                yield path
        # A failed try at a live key is told about, and its state goes on, until it succeeds.
        elif key not in at_work and (key not in live or artefact.is_valid(out, key)):
            yield path
    broken = RESULTS / ".broken"
    for path in sorted(broken.iterdir()) if broken.is_dir() else ():
        match = _BROKEN.fullmatch(path.name)
        if match and not _is_asked_for(match["key"], int(match["time"]), tree):
            yield path
    yield from (path for path, keys in _logs() if not any(key in live for key in keys))


def _is_asked_for(key: str, stamp: int, tree: Tree) -> bool:
    """Whether a damaged artefact is still there as it was when the stamp was named after it."""
    for directory in tree.artefacts.get(key, ()):
        record = directory / artefact.RECORD
        if record.is_file() and record.stat().st_mtime_ns == stamp:
            return not artefact.is_valid(directory, key)
    return False


def _logs() -> Iterator[tuple[Path, list[str]]]:
    """Logs of steps, and SLURM's logs of their jobs, each with the keys in its name."""
    for step in SCRIPTS:
        for path in sorted((LOGS / step).glob("**/*.log")):
            if _KEY.fullmatch(path.stem):
                yield path, [path.stem]
    for path in sorted((LOGS / "slurm").glob("rule_*/*")):
        if keys := _KEY_INSIDE.findall(path.name):
            yield path, keys


def why(key: str, census: Census) -> list[str]:
    """Return what refers to a key.

    Raises:
        InputError: neither an artefact nor a reference has this key.
    """
    if key in census.reasons:
        return census.reasons[key]
    if any(found.path.name == key for found in census.dead):
        return ["nothing refers to it"]
    raise InputError(f"{key!r} is not a key of an artefact here, and nothing refers to it")


# -------------------------------------------------------------------------------------- removal


def no_launches() -> lock.Lock:
    """Return the lock that keeps runs from starting; held from the census to the last removal.

    Raises:
        InputError: a run is going on.
    """
    return lock.acquire(LAUNCH_LOCK, command="gc --delete")


def delete(census: Census) -> Iterator[tuple[Found, str | None]]:
    """Remove what is dead, one after the other, and yield each with why it could not be removed.

    An artefact is renamed before it is removed: after a kill it is gone, and what is left of it
    is found as a leftover. Directories of labels go when they are empty.

    Raises:
        PrunelibError: something stands against removing anything.
    """
    if census.objections:
        raise PrunelibError(f"nothing was removed: {census.objections[0]}")
    for found in census.dead:
        yield found, _try(artefact.discard, found.path)
    for found in census.leftovers:
        yield found, _try(artefact.remove, found.path)


def _try(removal: Callable[[Path], None], path: Path) -> str | None:
    try:
        removal(path)
    except OSError as error:
        return error.strerror or str(error)
    if path.is_symlink() or path.exists():
        return "could not be removed"
    # results/<step> and logs/<step> stay.
    for parent in list(path.parents)[:-3]:
        with suppress(OSError):
            parent.rmdir()
    return None
