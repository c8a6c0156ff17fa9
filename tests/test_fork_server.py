"""Steps in forks: a command run by the server is the command that it replaces."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_project import ROOT

SERVER = ROOT / "workflow_scripts/fork_server.py"

TELL = """
import json, os, sys
json.dump({"arguments": sys.argv, "name": __name__, "file": __file__, "directory": os.getcwd(),
           "environment": os.environ.get("TOLD"), "path": sys.path, "pid": os.getpid(),
           "loaded": "torch" in sys.modules, "input": sys.stdin.read()}, sys.stdout)
print("to the log", file=sys.stderr)
sys.exit(7)
"""

WAIT = """
import signal, sys, time, os
from pathlib import Path
def stop(number, frame):
    Path(sys.argv[1]).write_text(f"stopped by {number}")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""


class Server:
    """A running server; ends with its standard input."""

    def __init__(self, directory: Path) -> None:
        self.address = directory / "server/socket"
        self.address.parent.mkdir()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.address))
            listener.listen()
            self.process = subprocess.Popen(
                [sys.executable, "-P", SERVER, "--serve", str(listener.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
            )

    def start(self, *arguments: str | Path, **options: object) -> subprocess.Popen[str]:
        environment = os.environ | {"PRUNELIB_FORK_SERVER": str(self.address), "TOLD": "yes"}
        command = [sys.executable, "-P", SERVER, *arguments]
        return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
            command, env=environment, text=True, **options
        )

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("forks"))
    yield server
    server.end()
    assert not server.address.parent.exists()


def soon(condition: Callable[[], object]) -> bool:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def waiting(server: Server, directory: Path) -> tuple[subprocess.Popen[str], Path, int]:
    """Start a step that waits: its command, its file, its process."""
    script, told = directory / "wait.py", directory / "told"
    script.write_text(WAIT, encoding="utf-8")
    command = server.start(script, told)
    assert soon(lambda: told.exists() and told.read_text())
    return command, told, int(told.read_text())


def test_a_fork_is_told_what_its_command_was(server: Server, tmp_path: Path) -> None:
    script = tmp_path / "tell.py"
    script.write_text(TELL, encoding="utf-8")
    arguments = ["--request", '{"a": "ü"}', "x" * 120_000]
    command = server.start(
        script, *arguments, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = command.communicate("given")
    told = json.loads(out)
    assert command.returncode == 7
    assert err == "to the log\n"
    assert told.pop("pid") != command.pid
    assert told.pop("loaded")
    plain = subprocess.run(
        [sys.executable, "-P", script, *arguments],
        cwd=tmp_path, env=os.environ | {"TOLD": "yes"}, input="given", capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    expected = json.loads(plain.stdout)
    assert not expected.pop("loaded")
    assert expected.pop("pid")
    assert told == expected


def test_commands_run_side_by_side(server: Server, tmp_path: Path) -> None:
    commands = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        commands.append(waiting(server, tmp_path / name))
    for command, told, _ in commands:
        command.terminate()
        assert command.wait(60) == 128 + signal.SIGTERM
        assert told.read_text() == f"stopped by {int(signal.SIGTERM)}"


def test_a_killed_step_looks_killed(server: Server, tmp_path: Path) -> None:
    command, _, step = waiting(server, tmp_path)
    os.kill(step, signal.SIGKILL)
    assert command.wait(60) == -signal.SIGKILL


def test_a_killed_command_takes_its_step_along(server: Server, tmp_path: Path) -> None:
    command, told, step = waiting(server, tmp_path)
    command.kill()
    assert soon(lambda: not Path(f"/proc/{step}").exists())
    assert told.read_text() == str(step)


def test_an_ignored_signal_stays_ignored(server: Server, tmp_path: Path) -> None:
    script = tmp_path / "signals.py"
    script.write_text(
        "import signal; print([signal.getsignal(n).name if isinstance(signal.getsignal(n),"
        " signal.Handlers) else 'own' for n in (1, 2, 15)], flush=True)",
        encoding="utf-8",
    )
    for ignored in (set(), {signal.SIGHUP, signal.SIGINT}):

        def set_up(ignored: set[signal.Signals] = ignored) -> None:
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

        command = server.start(script, stdout=subprocess.PIPE, preexec_fn=set_up)
        out, _ = command.communicate()
        first, second = ("SIG_IGN", "SIG_IGN") if ignored else ("SIG_DFL", "own")
        assert out.strip() == str([first, second, "SIG_DFL"])


def test_a_step_outlives_the_end_of_its_server(tmp_path: Path) -> None:
    server = Server(tmp_path)
    command, told, _ = waiting(server, tmp_path)
    server.end()
    assert not server.address.parent.exists()
    command.terminate()
    assert command.wait(60) == 128 + signal.SIGTERM
    assert told.read_text().startswith("stopped")


def test_without_a_server_the_command_is_the_step(server: Server, tmp_path: Path) -> None:
    script = tmp_path / "tell.py"
    script.write_text(TELL, encoding="utf-8")
    environment = os.environ | {"PRUNELIB_FORK_SERVER": str(tmp_path / "none")}
    command = subprocess.Popen(
        [sys.executable, SERVER, script, "a"],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    told = json.loads(command.communicate()[0])
    assert (told["pid"], told["loaded"]) == (command.pid, False)
    assert told["arguments"] == [str(script), "a"]
    assert command.returncode == 7
