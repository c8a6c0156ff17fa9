"""The launch lock: one run at a time in one results directory.

The lock is a small JSON file that names host, process and start time. A daemon thread keeps its
mtime fresh. It outlives a kill, and the next launch takes it over.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from prunelib.errors import InputError
from prunelib.provenance.liveness import (
    host_name,
    is_same_process,
    process_start,
    start_heartbeat,
)

_BEAT_SECONDS = 30.0
_SILENT_SECONDS = 600.0
"""An owner on another host, which cannot be asked, is dead after this long without a heartbeat."""

_log = logging.getLogger(__name__)


class Lock:
    """A lock that is held; ``release`` it, or use it as a context manager."""

    def __init__(self, path: Path, owner: dict[str, Any], stop: Callable[[], None]) -> None:
        self.path = path
        self.owner = owner
        self._stop = stop

    def release(self) -> None:
        """Give the lock up; a lock that another run has taken over meanwhile stays its own."""
        self._stop()
        with _guard(self.path):
            if _owner(self.path) == self.owner:
                self.path.unlink()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def acquire(path: Path, *, command: str) -> Lock:
    """Take the lock file ``path``, or refuse.

    A lock is taken over, with a message, when its owner is a process of this host that is gone
    (or whose number belongs to another process by now), or when its owner is on another host and
    has shown no heartbeat for 10 minutes.

    Args:
        path: the lock file; its directory is made if need be.
        command: what the lock is held for, told to those who are refused.

    Raises:
        InputError: another run holds it; names its host, process, age and command.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    owner: dict[str, Any] = {
        "host": host_name(),
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        "acquired": time.time(),
        "command": command,
    }
    with _guard(path):
        if path.exists():
            _take_over_or_refuse(path)
        _create(path, owner)
    return Lock(path, owner, start_heartbeat(lambda: _beat(path, owner), _BEAT_SECONDS))


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    """Keep other launches out for the moment in which the lock file is looked at and changed.

    The kernel drops this one when a process dies. Where a file system has no such locks, the
    creation of the file is still atomic; only two takeovers in the same instant could then meet.
    """
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _create(path: Path, owner: dict[str, Any]) -> None:
    """Create the lock file with its content in one atomic act."""
    draft = path.with_name(f"{path.name}.{owner['host']}-{owner['pid']}")
    draft.write_text(json.dumps(owner), encoding="utf-8")
    try:
        os.link(draft, path)
    except FileExistsError:
        raise InputError(f"{path}: another run took the lock in this instant") from None
    finally:
        draft.unlink()


def _owner(path: Path) -> dict[str, Any] | None:
    """Return what a lock file says, None if it is gone or says nothing that makes sense."""
    try:
        content = json.loads(path.read_bytes())
        owner = {
            "host": str(content["host"]),
            "pid": int(content["pid"]),
            "process_start": float(content["process_start"]),
            "acquired": float(content["acquired"]),
            "command": str(content["command"]),
        }
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return owner


def _take_over_or_refuse(path: Path) -> None:
    owner = _owner(path)
    silent = max(0.0, time.time() - path.stat().st_mtime)
    if owner is None:
        stale = silent > _SILENT_SECONDS
        who = "an owner that its content does not name"
    else:
        here = owner["host"] == host_name()
        alive = here and is_same_process(owner["pid"], owner["process_start"])
        stale = not alive if here else silent > _SILENT_SECONDS
        age = time.time() - owner["acquired"]
        who = f"process {owner['pid']} on {owner['host']} for {age:.0f} s ({owner['command']})"
    if not stale:
        raise InputError(
            f"{path}: held by {who}, last sign of life {silent:.0f} s ago; wait for that run or "
            "stop it"
        )
    _log.warning("%s: taken over from %s, which is gone", path, who)
    path.unlink(missing_ok=True)


def _beat(path: Path, owner: dict[str, Any]) -> bool:
    found = _owner(path)
    if found != owner and (found is not None or not path.exists()):
        _log.error("%s: lost to another run while this one did not answer", path)
        return False
    with suppress(OSError):
        os.utime(path)
    return True
