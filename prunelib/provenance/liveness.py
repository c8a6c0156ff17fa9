"""Who writes, and whether that process is still there."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable

_CLOCK_SLACK = 2.0
"""Seconds by which two readings of one process's start time may differ (boot time is rounded)."""


def host_name() -> str:
    """Return this machine's name, fit for a file name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname()) or "unknown"


def process_start(pid: int) -> float | None:
    """Return when a process of this machine started (seconds since the epoch), None if it is dead.

    A killed process whose parent never collected it (a zombie) is dead: it writes no more.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        start: float = process.create_time()
        return start
    except psutil.Error:
        return None


def is_same_process(pid: int, start: float) -> bool:
    """Whether the process ``pid`` of this machine lives and is the one that began at ``start``."""
    now = process_start(pid)
    return now is not None and abs(now - start) <= _CLOCK_SLACK


def start_heartbeat(beat: Callable[[], bool], interval: float) -> Callable[[], None]:
    """Call ``beat`` every ``interval`` seconds in a daemon thread until it returns False.

    Returns:
        A function that stops the thread.
    """
    stopped = threading.Event()

    def run() -> None:
        while not stopped.wait(interval) and beat():
            pass

    threading.Thread(target=run, name="heartbeat", daemon=True).start()
    return stopped.set
