"""Look after a run on SLURM: the executor waits without a word when nobody answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from prunelib.cluster.slurm import Job, accounting_answers, jobs_of
from prunelib.errors import InputError, PrunelibError

_LOOK_SECONDS = 60.0
_PATIENCE_SECONDS = 180.0
_REPEAT_SECONDS = 900.0
_IDLE_SECONDS = 300.0


def check_status_command(command: str | None) -> None:
    """Refuse a status command that will never answer.

    Raises:
        InputError: ``sacct`` is to be asked, and no accounting database is behind it.
    """
    if command == "sacct" and not accounting_answers():
        raise InputError(
            "slurm-status-command: sacct gets no answer on this cluster (no slurmdbd), so the end "
            "of a job would never be seen; set slurm-status-command: squeue in the profile"
        )


class Silence:
    """Counts how long there has been no answer, and says when a person should know.

    Args:
        command: name of the command that is asked.
        say: told in lines.
    """

    def __init__(self, command: str, say: Callable[[str], None]) -> None:
        self.command = command
        self._say = say
        self._since: float | None = None
        self._told: float | None = None

    def heard(self, answered: bool, now: float) -> None:
        """Take note of one question at the time ``now`` (seconds)."""
        if answered:
            if self._told is not None and self._since is not None:
                minutes = (now - self._since) / 60
                self._say(f"{self.command} answers again after {minutes:.0f} min")
            self._since = self._told = None
            return
        self._since = now if self._since is None else self._since
        silent = now - self._since
        overdue = self._told is None or now - self._told >= _REPEAT_SECONDS
        if silent >= _PATIENCE_SECONDS and overdue:
            self._told = now
            self._say(
                f"{self.command} has not answered for {silent / 60:.0f} min: jobs run on, but "
                "their ends are not seen. This run goes on once SLURM answers; it can also be "
                "stopped and started again, which waits for the jobs and loses nothing"
            )


class Idleness:
    """Finds out that a run waits for jobs that are not there.

    Snakemake's executor forgets all its jobs when one round of questions stays without an answer
    (snakemake-executor-plugin-slurm 2.8.0), and then waits for ever. It asks at least every three
    minutes, so that a run with nothing in the queue and nothing of its own at work is not idle for
    longer than that.
    """

    def __init__(self) -> None:
        self._since: float | None = None

    def is_stuck(self, at_work: bool, now: float) -> bool:
        """Take note of whether anything is at work at the time ``now`` (seconds)."""
        if at_work:
            self._since = None
            return False
        self._since = now if self._since is None else self._since
        return now - self._since >= _IDLE_SECONDS


def _at_work(jobs: Iterable[Job]) -> bool:
    """Whether the run has jobs in the queue, or processes of its own on this machine."""
    if any(jobs):
        return True
    children = psutil.Process().children()
    return any(child.status() != psutil.STATUS_ZOMBIE for child in children)


def start(command: str | None, say: Callable[[str], None], again: Callable[[], None]) -> None:
    """Watch in the background until the process ends.

    Args:
        command: the executor's status command, None for its default.
        say: told in lines.
        again: starts the run again in this process, when it waits for nothing.
    """
    silence, idleness = Silence(command or "squeue", say), Idleness()

    def look() -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            try:
                jobs = jobs_of(Path.cwd())
                answered = command != "sacct" or accounting_answers()
                at_work = _at_work(jobs)
            except (PrunelibError, psutil.Error):
                answered, at_work = False, True
            now = time.monotonic()
            silence.heard(answered, now)
            if idleness.is_stuck(at_work, now):
                say(
                    f"nothing of this run has been queued or running for {_IDLE_SECONDS / 60:.0f} "
                    "min, but it still waits: SLURM did not answer when a job ended; starting again"
                )
                again()

    threading.Thread(target=look, name="watch-slurm", daemon=True).start()
