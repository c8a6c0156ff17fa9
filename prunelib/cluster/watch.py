"""Tell a person that SLURM no longer answers; Snakemake's executor waits without a word."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from prunelib.cluster.slurm import accounting_answers, jobs_of
from prunelib.errors import InputError, PrunelibError

_LOOK_SECONDS = 60.0
_PATIENCE_SECONDS = 180.0
_REPEAT_SECONDS = 900.0


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


def answers(command: str | None) -> bool:
    """Whether the status command gets an answer now."""
    if command == "sacct":
        return accounting_answers()
    try:
        jobs_of(Path.cwd())
    except PrunelibError:
        return False
    return True


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


def start(command: str | None, say: Callable[[str], None]) -> None:
    """Watch in the background until the process ends."""
    silence = Silence(command or "squeue", say)

    def look() -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            silence.heard(answers(command), time.monotonic())

    threading.Thread(target=look, name="watch-slurm", daemon=True).start()
