"""What became of the tries at a step: who is at it, and how the last one ended.

One small JSON file beside the target, ``<key>.attempt.json``, which is removed once the artefact is
there. A try that was killed leaves it without an end. It answers three questions: may a retry be
spared (the last try failed for good), is somebody else at this step, and what shall a person be
told.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from prunelib.provenance.liveness import (
    host_name,
    is_same_process,
    process_start,
    start_heartbeat,
)

_BEAT_SECONDS = 15.0
_SILENT_SECONDS = 60.0
"""A try on another host is dead when its file does not change for this long while one looks."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One try at a step.

    Attributes:
        step, key: what is made.
        run: the run of the workflow that it belongs to, None outside of one.
        number: 1 for the first try of a run, counted on by retries.
        host, pid, process_start: who.
        slurm_job: the SLURM job that it runs in, None outside of one.
        started, ended: seconds since the epoch; ``ended`` is None while it runs, and when it was
            killed.
        permanent: whether trying again with the same input ends the same way.
        exit_code, error: how it ended; None like ``ended``.
        earlier: how the earlier tries of the run ended, a line each.
    """

    step: str
    key: str
    run: str | None
    number: int
    host: str
    pid: int
    process_start: float
    slurm_job: str | None
    started: float
    ended: float | None = None
    permanent: bool = False
    exit_code: int | None = None
    error: str | None = None
    earlier: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return in one line how it ended and where."""
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        error = self.error or "killed"
        return f"try {self.number} on {self.host}{job}: {' '.join(error.split())}"


def attempt_path(out: Path) -> Path:
    """Return where the attempt at the artefact directory ``out`` is written down."""
    return out.with_name(f"{out.name}.attempt.json")


def read_attempt(out: Path) -> Attempt | None:
    """Return the last attempt at ``out``, None if there is none or its file makes no sense."""
    try:
        content = json.loads(attempt_path(out).read_bytes())
        content["earlier"] = tuple(content["earlier"])
        return Attempt(**{field.name: content[field.name] for field in fields(Attempt)})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(out: Path, attempt: Attempt) -> None:
    path = attempt_path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{attempt.host}-{attempt.pid}")
    try:
        draft.write_text(json.dumps(asdict(attempt)) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


class Running:
    """An attempt of this process; its file is touched while it lives."""

    def __init__(self, out: Path, attempt: Attempt) -> None:
        self.out = out
        self.attempt = attempt
        _write(out, attempt)
        self._stop = start_heartbeat(self._beat, _BEAT_SECONDS)

    def _beat(self) -> bool:
        with suppress(OSError):
            os.utime(attempt_path(self.out))
        return True

    def succeed(self) -> None:
        """Remove the file: the artefact speaks for itself."""
        self._stop()
        attempt_path(self.out).unlink(missing_ok=True)

    def fail(self, error: str, exit_code: int, *, permanent: bool) -> None:
        """Write down how it ended."""
        self._stop()
        ended = replace(
            self.attempt,
            ended=time.time(),
            error=error,
            exit_code=exit_code,
            permanent=permanent,
        )
        # A full disk must not hide the error that it caused.
        with suppress(OSError):
            _write(self.out, ended)


def earlier_try(out: Path, key: str) -> Attempt | None:
    """Return the last attempt at ``out`` in this same run of the workflow, None if there is none.

    A run is named by ``PRUNELIB_RUN``, which the workflow sets and its jobs inherit.
    """
    run, last = os.environ.get("PRUNELIB_RUN"), read_attempt(out)
    return last if last and run and last.run == run and last.key == key else None


def begin(out: Path, step: str, key: str) -> Running:
    """Write down that this process begins to make ``out``."""
    earlier = earlier_try(out, key)
    return Running(
        out,
        Attempt(
            step=step,
            key=key,
            run=os.environ.get("PRUNELIB_RUN"),
            number=earlier.number + 1 if earlier else 1,
            host=host_name(),
            pid=os.getpid(),
            process_start=process_start(os.getpid()) or 0.0,
            slurm_job=os.environ.get("SLURM_JOB_ID"),
            started=time.time(),
            earlier=(*earlier.earlier, earlier.describe()) if earlier else (),
        ),
    )


def is_alive(out: Path, attempt: Attempt, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Whether the process of an unfinished attempt still works.

    A process of this host is asked for. One of another host is watched: its file changes every
    15 s, so this takes up to a minute when it is dead. No two clocks are compared.
    """
    if attempt.ended is not None:
        return False
    if attempt.host == host_name():
        return is_same_process(attempt.pid, attempt.process_start)
    first = _sign_of_life(out)
    for _ in range(int(_SILENT_SECONDS / 5)):
        sleep(5.0)
        if _sign_of_life(out) != first:
            return True
    return False


def _sign_of_life(out: Path) -> tuple[int, bytes]:
    # Opening makes network file systems look again.
    try:
        with attempt_path(out).open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except OSError:
        return 0, b""


def wait_for_others(out: Path, sleep: Callable[[float], None] = time.sleep) -> None:
    """Wait while another process is at ``out``, so that no step is made by two at a time."""
    told = False
    while (other := read_attempt(out)) is not None and is_alive(out, other, sleep):
        if other.host == host_name() and other.pid == os.getpid():
            return
        if not told:
            job = f", SLURM job {other.slurm_job}" if other.slurm_job else ""
            _log.info("waiting for process %d on %s%s", other.pid, other.host, job)
            told = True
        sleep(5.0)
