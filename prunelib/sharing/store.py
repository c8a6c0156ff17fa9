"""What DVC holds: checkpoints and adapters, in the cache of this clone and on a remote.

DVC's own command adds, pushes and fetches. Three things that it leaves open are closed here: a
push takes a directory for complete when its listing is on the remote, an upload that was killed
may leave a short object there, and a fetch says nothing of an object that it threw away.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from prunelib.errors import InputError, PrunelibError

_RWLOCK = Path(".dvc", "tmp", "rwlock")
_LISTING = re.compile(r"[0-9a-f]{32}\.dir")
_ASK_AT_ONCE = 16
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Stored:
    """One object behind a directory: a file of it, or (name ``""``) the listing of its files."""

    name: str
    oid: str


class Store:
    """The cache of this clone and, if one is named, a remote.

    Args:
        remote: name of the remote, None for the default one.
        needed: whether there must be a remote.

    Raises:
        InputError: there is no such remote, or none at all and one is needed.
    """

    def __init__(self, remote: str | None, *, needed: bool = True) -> None:
        # DVC takes a second to import.
        from dvc.config import Config  # type: ignore[import-untyped]
        from dvc.data_cloud import Remote  # type: ignore[import-untyped]
        from dvc.fs import get_cloud_fs  # type: ignore[import-untyped]
        from dvc.repo import Repo  # type: ignore[import-untyped]

        config = Config(dvc_dir=".dvc")
        self.remote = _choose(config, remote, needed)
        if self.remote and not config["remote"][self.remote].get("verify"):
            # Otherwise DVC takes damaged objects for good ones.
            run("remote", "modify", "--local", self.remote, "verify", "true")
        repository = Repo(".")
        self._cache: Any = repository.cache.local
        if self.remote:
            kind, settings, path = get_cloud_fs(repository.config, name=self.remote)
            # Not through the repository, which would keep a database open that DVC's commands,
            # run from here, wait for.
            self._there: Any = Remote(self.remote, path, kind(**settings), **settings).odb
        repository.close()

    # -------------------------------------------------------------------------------- here

    def objects(self, pointer: Path) -> list[Stored]:
        """Return the objects behind a pointer, the listing first; only that if it is not here.

        Raises:
            PrunelibError: the pointer is not one of ours.
        """
        from dvc_data.hashfile.hash_info import HashInfo
        from dvc_data.hashfile.tree import Tree
        from dvc_objects.errors import ObjectFormatError

        info = HashInfo("md5", read_pointer(pointer))
        listing = Stored("", str(info.value))
        try:
            tree = Tree.load(self._cache, info)
        except (FileNotFoundError, ObjectFormatError):
            return [listing]
        files = [Stored("/".join(parts), found.value) for parts, _, found in tree]
        return [listing, *files]

    def cached(self, oid: str) -> Path:
        """Return where the cache has an object, or would have it."""
        return Path(self._cache.oid_to_path(oid))

    def is_whole(self, pointer: Path) -> bool:
        """Whether the cache has every object behind a pointer."""
        found = self.objects(pointer)
        return len(found) > 1 and all(self.cached(one.oid).is_file() for one in found)

    def copy(self, pointer: Path, into: Path) -> None:
        """Copy (or clone, where the file system can) a directory out of the cache."""
        from dvc_objects.fs.utils import copyfile

        for one in self.objects(pointer)[1:]:
            path = into / one.name
            path.parent.mkdir(parents=True, exist_ok=True)
            copyfile(str(self.cached(one.oid)), str(path))

    def forget(self, pointer: Path, name: str) -> None:
        """Remove a file of a directory from the cache, since it turned out to be damaged."""
        for one in self.objects(pointer):
            if one.name == name:
                self.cached(one.oid).unlink(missing_ok=True)

    def add(self, directories: Iterable[Path]) -> None:
        """Put directories into the cache, in one batch, and write their pointers."""
        # The directories stay as they are: a kill while DVC put links there would break them.
        run("add", "--quiet", "--no-relink", *map(str, directories))

    # -------------------------------------------------------------------------------- there

    def push(self, pointers: list[Path]) -> None:
        """Send to the remote what it has not."""
        run("push", "--remote", str(self.remote), *map(str, pointers))

    def fetch(self, pointers: list[Path]) -> str:
        """Get into the cache what it has not; returns DVC's complaint, "" if there is none.

        What did not come is found by looking, see ``why_absent``.
        """
        try:
            run("fetch", "--remote", str(self.remote), *map(str, pointers))
        except PrunelibError as error:
            return str(error)
        return ""

    def why_absent(self, pointer: Path) -> str:
        """Say which object behind a pointer, that is not whole here, did not come and why.

        Raises:
            PrunelibError: the remote cannot be asked.
        """
        from dvc_data.hashfile.hash_info import HashInfo
        from dvc_data.hashfile.tree import Tree

        oid = read_pointer(pointer)
        if self._look(oid) is None:
            return self._is("missing", Stored("", oid))
        if self._md5(oid) != oid.partition(".")[0]:
            return self._is("damaged", Stored("", oid))
        # DVC keeps a listing to itself until all that it lists has come.
        files = [
            Stored("/".join(parts), found.value)
            for parts, _, found in Tree.load(self._there, HashInfo("md5", oid))
        ]
        absent = [one for one in files if not self.cached(one.oid).is_file()]
        for one in absent:
            if self._look(one.oid) is None:
                return self._is("missing", one)
        # It was there to be fetched, and was thrown away when it had come.
        return self._is("damaged", absent[0]) if absent else "did not come; run again"

    def _is(self, fault: str, one: Stored) -> str:
        name = one.name or "the list of its files"
        return f"{name} is {fault} on remote {self.remote} ({self._place(one.oid)})"

    def mend(self, pointers: Iterable[Path], *, read_back: bool) -> tuple[int, list[str]]:
        """Look at every object on the remote and send again those that are missing or wrong.

        Args:
            pointers: of directories whose objects are all in the cache.
            read_back: read every object and compare its md5; otherwise only sizes are looked at.

        Returns:
            How many objects were looked at, and which were sent again.

        Raises:
            PrunelibError: an object is still wrong after it was sent again.
        """
        names = {
            one.oid: f"{pointer.with_suffix('')}/{one.name}"
            for pointer in pointers
            for one in self.objects(pointer)
        }
        wrong = self._wrong(names, read_back)
        if wrong:
            self._there.add(
                [str(self.cached(oid)) for oid in wrong], self._cache.fs, wrong,
                check_exists=False, verify=False,
            )  # fmt: skip
            still = self._wrong(wrong, True)
            if still:
                raise PrunelibError(
                    f"remote {self.remote}: {names[still[0]]} ({self._place(still[0])}) was sent "
                    f"and is not what was sent; {len(still)} such objects"
                )
        return len(names), [names[oid] for oid in wrong]

    def _wrong(self, oids: Iterable[str], read_back: bool) -> list[str]:
        self._there.fs.fs.invalidate_cache()

        def is_wrong(oid: str) -> bool:
            if self._look(oid) != self.cached(oid).stat().st_size:
                return True
            return read_back and self._md5(oid) != oid.partition(".")[0]

        oids = list(oids)
        with ThreadPoolExecutor(_ASK_AT_ONCE) as pool:
            found = pool.map(is_wrong, oids)
            return [oid for oid, wrong in zip(oids, found, strict=True) if wrong]

    def _place(self, oid: str) -> str:
        odb = self._there
        return str(odb.fs.unstrip_protocol(odb.oid_to_path(oid)))

    def _look(self, oid: str) -> int | None:
        """The size of an object on the remote, None if it is not there."""
        odb = self._there
        return self._ask(lambda: int(odb.fs.info(odb.oid_to_path(oid))["size"]))

    def _md5(self, oid: str) -> str | None:
        from dvc_data.hashfile.hash import hash_file

        odb = self._there
        return self._ask(lambda: hash_file(odb.oid_to_path(oid), odb.fs, "md5")[1].value)

    def _ask(self, question: Callable[[], _Answer]) -> _Answer | None:
        """Ask the remote about an object; None if it is not there."""
        try:
            return question()
        except FileNotFoundError:
            return None
        except Exception as error:
            # Each kind of remote has errors of its own.
            words = " ".join(str(error).split()) or type(error).__name__
            raise PrunelibError(f"remote {self.remote} does not answer: {words}") from error


def read_pointer(path: Path) -> str:
    """Return the name of the object that lists the files of the directory behind a pointer.

    Raises:
        PrunelibError: it is not a pointer to one directory.
    """
    try:
        (out,) = yaml.safe_load(path.read_text(encoding="utf-8"))["outs"]
        oid = out["md5"]
        if _LISTING.fullmatch(oid):
            return str(oid)
        fault = f"md5 is {oid!r}"
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        fault = " ".join(str(error).split())
    raise PrunelibError(f"{path}: not DVC's pointer to a directory: {fault}")


def _choose(config: Any, remote: str | None, needed: bool) -> str | None:
    names = sorted(config["remote"])
    chosen: str | None = remote or config["core"].get("remote")
    if chosen is None and needed:
        raise InputError(
            ".dvc/config: no default remote; name one with --remote, or add one with "
            "`dvc remote add --default NAME URL`"
        )
    if chosen is not None and chosen not in names:
        raise InputError(
            f".dvc/config: no remote {chosen!r}; allowed: {', '.join(names) or 'none yet'}"
        )
    return chosen


def run(*arguments: str) -> None:
    """Run DVC; its progress goes to the terminal, where there is one.

    Raises:
        PrunelibError: it fails; carries its error line.
    """
    _drop_broken_rwlock()
    # Where somebody is watching, DVC draws bars and writes its errors for them.
    watched = sys.stderr.isatty()
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=None if watched else subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = (done.stderr or "").splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        words = "; ".join(dict.fromkeys(errors)) or " ".join(lines[-3:]) or "see above"
        raise PrunelibError(f"dvc {arguments[0]} failed: {words}")


def _drop_broken_rwlock() -> None:
    """Remove DVC's table of who reads and writes what if a kill left half of it.

    It is only ever about running processes, of which there is none besides this one while the
    sharing lock is held.
    """
    try:
        json.loads(_RWLOCK.read_bytes())
    except FileNotFoundError:
        pass
    except ValueError:
        _RWLOCK.unlink(missing_ok=True)
