"""Run step scripts in processes that are forked from one which has loaded torch already.

On a CPU and a small model, loading torch and transformers takes most of a step's time. The main
process of a workflow starts one server, see ``rules/common.smk``; the command of each step,

    fork_server.py SCRIPT [ARGUMENT ...]

then runs ``python -P SCRIPT ARGUMENT ...`` in a fork of it, with its own directory, environment,
standard streams, signals and exit code; without a server it becomes that very command. Only code
that is not the project's is loaded beforehand: a step reads the project's code anew.

A fork must not use a GPU that its parent has touched, so the server is for CPU runs alone; Linux
alone, too, since torch cannot be relied on in forks elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

ADDRESS = "PRUNELIB_FORK_SERVER"
"""Names the server's socket to the commands."""

PRELOADED = (
    "torch",
    "torch.export",
    "transformers.activations",
    "transformers.modeling_layers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "peft",
)
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
LENGTH, STATUS = struct.Struct("!Q"), struct.Struct("!i")


def run(arguments: list[str]) -> NoReturn:
    """Run ``SCRIPT [ARGUMENT ...]`` in a fork of the server, or here where there is none."""
    command = [sys.executable, "-P", *arguments]
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(os.environ[ADDRESS])
    except (KeyError, OSError):
        os.execv(sys.executable, command)  # noqa: S606
    ignored = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]

    def forward(number: int, frame: FrameType | None) -> None:
        connection.send(bytes([number]))

    request: dict[str, Any] = {
        "arguments": arguments,
        "directory": str(Path.cwd()),
        "environment": dict(os.environ),
        "ignored": ignored,
    }
    text = json.dumps(request).encode()
    try:
        socket.send_fds(connection, [LENGTH.pack(len(text))], [0, 1, 2])
        connection.sendall(text)
        for number in set(SIGNALS) - set(ignored):
            signal.signal(number, forward)
        code = STATUS.unpack(_receive(connection, STATUS.size))[0]
    except (EOFError, OSError):
        raise SystemExit(f"error: the process that ran {arguments[0]} is gone") from None
    if code < 0:
        # As the shell would have seen it.
        if -code in SIGNALS:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    raise SystemExit(code)


def serve(listener: socket.socket) -> list[str]:
    """Load what steps share, fork for each command until standard input ends.

    Returns:
        In a fork alone: the script and its arguments, to be run by this process.
    """
    for number in SIGNALS:
        # A terminal sends them to all: steps end themselves, and this process reports how.
        signal.signal(number, signal.SIG_IGN)
    for name in PRELOADED:
        importlib.import_module(name)
    # Forks are nobody's to wait for: each tells its command how it ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    address = Path(listener.getsockname())
    while True:
        # Standard input is a pipe from the main process: it ends when that does, in any way.
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            address.unlink(missing_ok=True)
            address.parent.rmdir()
            raise SystemExit
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _supervise(connection)
        connection.close()


def _supervise(connection: socket.socket) -> list[str]:
    """Fork the step, pass signals to it and its end to the command; return in the step."""
    try:
        start, streams, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
        start += _receive(connection, LENGTH.size - len(start))
        request = json.loads(_receive(connection, LENGTH.unpack(start)[0]))
    except (EOFError, OSError):
        os._exit(1)
    step = os.fork()
    if step == 0:
        connection.close()
        return _become(request, streams)
    for stream in (*streams, 0):
        os.close(stream)
    ended = os.pidfd_open(step)
    while True:
        ready, _, _ = select.select([ended, connection.fileno()], [], [])
        if ended in ready:
            break
        # A command that is gone was killed: its step is to end as it would have.
        number = _one_byte(connection) or signal.SIGKILL
        signal.pidfd_send_signal(ended, number)
        if number == signal.SIGKILL:
            break
    _, status = os.waitpid(step, 0)
    with contextlib.suppress(OSError):
        connection.sendall(STATUS.pack(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _become(request: dict[str, Any], streams: list[int]) -> list[str]:
    """Take on the command's directory, environment, streams and signals; return its arguments."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    for number in SIGNALS:
        ignored = number in request["ignored"]
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if ignored else default)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    arguments: list[str] = request["arguments"]
    return arguments


def _receive(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise EOFError
        content += part
    return content


def _one_byte(connection: socket.socket) -> int | None:
    try:
        return _receive(connection, 1)[0]
    except (EOFError, OSError):
        return None


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "--serve":
        sys.argv = serve(socket.socket(fileno=int(sys.argv[1])))
        sys.orig_argv = [sys.executable, "-P", *sys.argv]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        run(sys.argv)
