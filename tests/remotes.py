"""Real remotes on this machine: a directory, S3 by moto's server, SSH by a daemon of our own.

They listen on the loopback address alone and are stopped with the test session. Where a program is
missing, the tests that need it are skipped with one line; with ``PRUNELIB_REQUIRE_REMOTES=1`` they
fail.
"""

from __future__ import annotations

import getpass
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Remote:
    """A running remote.

    Attributes:
        url: where DVC finds it.
        settings: DVC's options of it, without ``url``.
        objects: returns path (or key) and a reader and writer for every object.
    """

    url: str
    settings: dict[str, str]
    read: Callable[[str], bytes]
    write: Callable[[str, bytes], None]
    delete: Callable[[str], None]
    names: Callable[[], list[str]]
    environment: dict[str, str] = field(default_factory=dict)

    def object(self, md5: str) -> str:
        """The name of an object on the remote."""
        (found,) = (name for name in self.names() if name.endswith(f"{md5[:2]}/{md5[2:]}"))
        return found


def missing(what: str) -> None:
    """Skip the test for want of a program, or fail where remotes are required."""
    message = f"{what} is missing: this remote was not tried"
    if os.environ.get("PRUNELIB_REQUIRE_REMOTES") == "1":
        pytest.fail(message)
    pytest.skip(message)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _server(command: list[str], port: int, **options: Any) -> Iterator[None]:
    with subprocess.Popen(command, **options) as process:
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                    assert time.monotonic() < deadline, f"{command[0]} does not answer"
                    time.sleep(0.05)
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _directory(path: Path, url: str, settings: dict[str, str]) -> Remote:
    def write(name: str, content: bytes) -> None:
        # DVC writes objects read-only.
        (path / name).chmod(0o644)
        (path / name).write_bytes(content)

    return Remote(
        url,
        settings,
        read=lambda name: (path / name).read_bytes(),
        write=write,
        delete=lambda name: (path / name).unlink(),
        names=lambda: sorted(
            found.relative_to(path).as_posix() for found in path.rglob("*") if found.is_file()
        ),
    )


@contextmanager
def local_remote(directory: Path) -> Iterator[Remote]:
    """A directory."""
    path = directory / "remote"
    path.mkdir()
    yield _directory(path, str(path), {})


@contextmanager
def s3_remote(directory: Path) -> Iterator[Remote]:
    """A bucket on moto's server."""
    for name in ("moto", "flask", "flask_cors", "boto3"):
        if importlib.util.find_spec(name) is None:
            missing(f"the package {name}")
    import boto3

    port = _free_port()
    endpoint = f"http://127.0.0.1:{port}"
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with _server(command, port, **quiet):
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="lab")

        def names() -> list[str]:
            listing = client.get_paginator("list_objects_v2").paginate(Bucket="lab")
            return [one["Key"] for page in listing for one in page.get("Contents", ())]

        yield Remote(
            "s3://lab/store",
            {
                "endpointurl": endpoint,
                "region": "us-east-1",
                "access_key_id": "testing",
                "secret_access_key": "testing",
            },
            read=lambda name: client.get_object(Bucket="lab", Key=name)["Body"].read(),
            write=lambda name, content: client.put_object(Bucket="lab", Key=name, Body=content),
            delete=lambda name: client.delete_object(Bucket="lab", Key=name),
            names=names,
        )


@contextmanager
def ssh_remote(directory: Path) -> Iterator[Remote]:
    """A directory behind an SSH daemon of our own, with keys of our own."""
    daemon, keygen = shutil.which("sshd", path=_PATH), shutil.which("ssh-keygen", path=_PATH)
    if daemon is None or keygen is None:
        missing("Debian's openssh-server")
        raise AssertionError
    port, path, home = _free_port(), directory / "remote", directory / "ssh"
    path.mkdir()
    home.mkdir(mode=0o700)
    for name in ("host", "user"):
        command = [keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)]
        subprocess.run(command, check=True)
    shutil.copy(home / "user.pub", home / "authorized_keys")
    (home / "config").write_text(
        f"Port {port}\n"
        "ListenAddress 127.0.0.1\n"
        f"HostKey {home}/host\n"
        f"PidFile {home}/pid\n"
        f"AuthorizedKeysFile {home}/authorized_keys\n"
        "PasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\n"
        "UsePAM no\n"
        # Temporary directories belong to everybody.
        "StrictModes no\n"
        "Subsystem sftp internal-sftp\n"
    )
    if os.geteuid() == 0:
        # The daemon of root insists on its directory, which the package's service would make.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    command = [daemon, "-D", "-e", "-f", str(home / "config")]
    with (home / "log").open("wb") as log, _server(command, port, stderr=log):
        url = f"ssh://{getpass.getuser()}@127.0.0.1:{port}{path}"
        yield _directory(path, url, {"keyfile": str(home / "user")})


REMOTES = {"local": local_remote, "s3": s3_remote, "ssh": ssh_remote}
