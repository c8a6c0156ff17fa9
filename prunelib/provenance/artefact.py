"""Artefacts: directories that are whole or not there.

An artefact is valid when its directory holds ``provenance.json``, which is written last, and every
file that it lists with the size that it lists. ``commit`` makes one so that no kill, race or full
disk leaves a directory that passes for valid and is not.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from prunelib.errors import IntegrityError, PrunelibError
from prunelib.provenance.environment import peak_gpu_memory_bytes, peak_memory_bytes
from prunelib.provenance.liveness import host_name, process_start, start_heartbeat

RECORD = "provenance.json"
SCHEMA_VERSION = 1
_BEAT_SECONDS = 300.0
_SILENT_SECONDS = 6 * 3600.0
"""A writer on another host, which cannot be asked, is dead after this long without a heartbeat."""
_REUSE_SLACK = 60.0
_SCRATCH = re.compile(r"\.(?:tmp|old)-(?P<host>.+)-(?P<pid>\d+)$")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_HASH_THREADS = min(8, os.cpu_count() or 1)
_FULL = {errno.ENOSPC: "no space left on device", errno.EDQUOT: "disk quota exceeded"}

_log = logging.getLogger(__name__)


def read(directory: Path) -> dict[str, Any]:
    """Return the provenance record of an artefact.

    Only the form of the record is checked, not the files; see ``is_valid`` and ``verify``.

    Raises:
        IntegrityError: there is no record, or it is not one of ours.
    """
    path = directory / RECORD
    try:
        if not _is_inside(directory, RECORD):
            raise IntegrityError(f"{path}: leads out of its directory")
        record = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise IntegrityError(f"{directory}: is not finished") from error
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: is not JSON: {error}") from error
    fault = _record_fault(record)
    if fault:
        raise IntegrityError(f"{path}: {fault}")
    checked: dict[str, Any] = record
    return checked


def _record_fault(record: Any) -> str | None:
    """Say what is wrong with the form of a record, None if nothing is."""
    if not isinstance(record, dict) or record.get("schema") != SCHEMA_VERSION:
        return f"is not a record of schema version {SCHEMA_VERSION}"
    if not isinstance(record.get("key"), str):
        return "has no key"
    files = record.get("files")
    if not isinstance(files, dict) or not files:
        return "lists no files"
    for name, facts in files.items():
        if not _is_plain(name):
            return f"lists {name!r}, which is not a path inside the directory"
        if not isinstance(facts, dict) or type(facts.get("size")) is not int:
            return f"lists {name!r} without a size"
        if not _SHA256.fullmatch(str(facts.get("sha256"))):
            return f"lists {name!r} without a sha256"
    return None


def _is_plain(name: str) -> bool:
    """Whether a name is a normal relative path that goes nowhere but down."""
    path = PurePosixPath(name)
    parts = path.parts
    return bool(parts) and ".." not in parts and str(path) == name and not path.is_absolute()


def _is_inside(directory: Path, name: str) -> bool:
    """Whether ``directory/name`` stays inside the directory when symbolic links are followed."""
    path = str(directory)
    for part in name.split("/"):
        path = f"{path}/{part}"
        if os.path.islink(path):  # noqa: PTH114 (called for every file of every artefact)
            return (directory / name).resolve().is_relative_to(directory.resolve())
    return True


def _size_fault(directory: Path, name: str, size: int) -> str | None:
    """Say what is wrong with a listed file short of its content, None if nothing is."""
    try:
        if not _is_inside(directory, name):
            return "leads out of its directory"
        facts = (directory / name).stat()
    except (OSError, ValueError, RuntimeError):
        return "is missing"
    if not stat.S_ISREG(facts.st_mode):
        return "is not a file"
    if facts.st_size != size:
        return f"has {facts.st_size} bytes, its record says {size}"
    return None


def is_valid(directory: Path, key: str | None = None) -> bool:
    """Whether a directory is a whole artefact: a record, and all its files with their sizes.

    Contents are not read; ``verify`` does that.

    Args:
        directory: the artefact.
        key: if given, the record must carry this key (a directory may have been renamed).
    """
    try:
        record = read(directory)
    except IntegrityError:
        return False
    if key is not None and record["key"] != key:
        return False
    files = record["files"].items()
    return all(_size_fault(directory, name, facts["size"]) is None for name, facts in files)


def verify(directory: Path, files: Iterable[str] | None = None) -> None:
    """Check files of an artefact against the sha256 in its record, before they are used.

    Args:
        directory: the artefact.
        files: names to check; all listed files if None.

    Raises:
        IntegrityError: names the first file that is missing, not listed, or not what it was.
    """
    listed = read(directory)["files"]
    names = list(listed if files is None else files)
    for name in names:
        if name not in listed:
            raise IntegrityError(f"{directory / name}: is not listed in {RECORD}")
        fault = _size_fault(directory, name, listed[name]["size"])
        if fault:
            raise IntegrityError(f"{directory / name}: {fault}")
    # Hashing leaves the interpreter's lock alone: shards are read side by side.
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        for name, found in zip(
            names, pool.map(_sha256, (directory / n for n in names)), strict=True
        ):
            if found != listed[name]["sha256"]:
                expected = listed[name]["sha256"]
                raise IntegrityError(
                    f"{directory / name}: sha256 is {found}, its record says {expected}"
                )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit(
    out: Path,
    write: Callable[[Path], None],
    provenance: Mapping[str, Any],
    check: Callable[[], None] | None = None,
) -> bool:
    """Make the artefact ``out``, or leave what was there; nothing in between is ever visible.

    1. Scratch directories of dead writers of this artefact are removed.
    2. A valid artefact with this key ends the work.
    3. ``write`` fills a scratch directory beside the target, named after host and process.
    4. ``check`` may refuse by raising.
    5. Files are hashed and flushed to disk, the record is written last, and the scratch directory
       takes the target's place. A target that is empty or invalid gives way; one that another
       writer made valid meanwhile is accepted as the result.

    Args:
        out: final directory.
        write: writes regular files into the directory it is given.
        provenance: the record, at least ``key``; files, times and peak memory are added here.
        check: called after ``write``.

    Returns:
        True if this call made the artefact, False if a valid one was there or came first.

    Raises:
        PrunelibError: nothing or something other than regular files was written, or the disk is
            full. Errors of ``write`` and ``check`` pass through. The scratch directory is gone
            in every case.
    """
    key = provenance["key"]
    remove_dead_writers(out)
    if is_valid(out, key):
        _log.info("%s is there already", out)
        return False
    started, clock = datetime.now(UTC), time.monotonic()
    try:
        with _filling(out) as scratch:
            write(scratch)
            if check is not None:
                check()
            record = {
                "schema": SCHEMA_VERSION,
                **provenance,
                "files": _flush_and_hash(scratch),
                "started": started.isoformat(timespec="seconds"),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - clock, 3),
                "peak_memory_bytes": peak_memory_bytes(),
                "peak_gpu_memory_bytes": peak_gpu_memory_bytes(),
            }
            _write_record(scratch, record)
            return _publish(scratch, out, key)
    except PrunelibError:
        raise
    except Exception:
        if is_valid(out, key):
            _log.warning("failed, but another writer has finished %s", out, exc_info=True)
            return False
        raise


def adopt(out: Path, key: str, fill: Callable[[Path], None]) -> bool:
    """Give an artefact that was made elsewhere its place here, whole or not at all.

    Args:
        out: final directory.
        key: its content key.
        fill: writes all files, the record among them, into the directory it is given, and checks
            them.

    Returns:
        False if a valid one is there already.

    Raises:
        IntegrityError: what was written is not a valid artefact of this key.
        PrunelibError: the disk is full. Errors of ``fill`` pass through. In every case nothing is
            left behind.
    """
    remove_dead_writers(out)
    if is_valid(out, key):
        return False
    with _filling(out) as scratch:
        fill(scratch)
        if not is_valid(scratch, key):
            raise IntegrityError(f"what came is not a whole artefact of the key {key}")
        for path in (*scratch.rglob("*"), scratch):
            _flush(path)
        return _publish(scratch, out, key)


@contextmanager
def _filling(out: Path) -> Iterator[Path]:
    """Give a scratch directory beside ``out`` that shows a heartbeat and is gone afterwards.

    Raises:
        PrunelibError: in place of an error about a full disk.
    """
    scratch = _scratch(out, "tmp")
    remove(scratch)
    stop_heartbeat = start_heartbeat(lambda: _touch(scratch), _BEAT_SECONDS)
    try:
        scratch.mkdir(parents=True)
        yield scratch
    except PrunelibError:
        raise
    except Exception as error:
        full = disk_full(error, scratch)
        if full:
            raise PrunelibError(full) from error
        raise
    finally:
        stop_heartbeat()
        remove(scratch)


def _scratch(out: Path, kind: str) -> Path:
    return out.with_name(f"{out.name}.{kind}-{host_name()}-{os.getpid()}")


def _touch(path: Path) -> bool:
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:
        _log.debug("no heartbeat in %s", path, exc_info=True)
    return True


def remove(path: Path) -> None:
    """Remove a file, link or directory if it is there; what cannot be removed is logged."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("%s could not be removed: %s", path, error)


def discard(out: Path) -> None:
    """Remove an artefact, valid or not; it is renamed first, so no kill leaves half of one."""
    aside = _scratch(out, "old")
    remove(aside)
    out.rename(aside)
    remove(aside)


def is_left_by_dead_writer(path: Path, out: Path) -> bool:
    """Whether ``path`` is a scratch directory beside ``out`` that a dead writer of it left.

    A writer is dead when its process on this host is gone or is another one by now, or when a
    writer on another host has shown no heartbeat for six hours.
    """
    match = _SCRATCH.fullmatch(path.name.removeprefix(out.name))
    if match is None or not path.name.startswith(out.name):
        return False
    try:
        touched = path.lstat().st_mtime
    except FileNotFoundError:
        return False
    if match["host"] == host_name():
        start = process_start(int(match["pid"]))
        return start is None or start > touched + _REUSE_SLACK
    return time.time() - touched > _SILENT_SECONDS


def remove_dead_writers(out: Path) -> None:
    """Remove the scratch directories that dead writers of ``out`` left beside it."""
    for path in out.parent.iterdir() if out.parent.is_dir() else ():
        if is_left_by_dead_writer(path, out):
            _log.info("removing %s, left by a writer that is dead", path)
            remove(path)


def _flush_and_hash(scratch: Path) -> dict[str, dict[str, Any]]:
    """Flush all files and directories to disk; return size and sha256 of each file by name."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(scratch.rglob("*")):
        name = path.relative_to(scratch).as_posix()
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            raise PrunelibError(f"{name} of the result is not a regular file")
        if name == RECORD:
            raise PrunelibError(f"the result must not hold a {RECORD} of its own")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            files[name] = {"size": os.fstat(file.fileno()).st_size, "sha256": digest}
    if not files:
        raise PrunelibError("no file was written")
    for directory in (path for path in scratch.rglob("*") if path.is_dir()):
        _flush(directory)
    return files


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such thing as flushing a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _write_record(scratch: Path, record: Mapping[str, Any]) -> None:
    with (scratch / RECORD).open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    _flush(scratch)


def _publish(scratch: Path, out: Path, key: str) -> bool:
    """Rename the finished scratch directory to ``out``; False if a valid one is there.

    A target in the way is never deleted in place: it is renamed aside first and looked at again,
    so that an artefact that becomes valid between the look and the removal is not lost.
    """
    for _ in range(100):
        try:
            scratch.rename(out)
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
        else:
            _flush(out.parent)
            return True
        if is_valid(out, key):
            return False
        _set_aside(out, key)
    raise PrunelibError(f"{out}: other processes keep putting something else there")


def _set_aside(out: Path, key: str) -> None:
    aside = _scratch(out, "old")
    remove(aside)
    try:
        out.rename(aside)
    except FileNotFoundError:
        return
    if is_valid(aside, key):
        try:
            aside.rename(out)
        except OSError:
            _log.debug("%s was replaced meanwhile", out)
    remove(aside)


def disk_full(error: Exception, place: Path) -> str | None:
    """Return one line about a full disk, None if ``error`` is about something else.

    It names the path, the bytes that lie in ``place`` (the result needs more than that), and the
    bytes that are free.

    Libraries that write from compiled code raise errors of their own, with the number in the text.
    """
    number = getattr(error, "errno", None)
    if number not in _FULL:
        text = str(error)
        number = next((code for code in _FULL if f"os error {code}" in text), None)
        if number is None and "No space left on device" in text:
            number = errno.ENOSPC
    if number is None:
        return None
    path = getattr(error, "filename", None) or place
    written = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    free = shutil.disk_usage(next(p for p in place.parents if p.exists())).free
    return f"{_FULL[number]} while writing {path} after {written} bytes: {free} bytes free"
