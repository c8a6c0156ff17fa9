"""A private SLURM cluster for tests: real daemons on this machine, gone when the test is."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("slurm_cluster.sh")
# Shared by the skip reason and the summary line that finds it again.
_MISSED = "no private SLURM cluster here, install: "


def missing_packages(accounting: bool = False) -> list[str]:
    """Debian packages that a cluster (with slurmdbd and its database, or without) needs."""
    done = subprocess.run(
        ["bash", str(SCRIPT), "missing"],
        env={**os.environ, "STC_ACCOUNTING": str(int(accounting))},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def require_slurm(accounting: bool = False) -> None:
    """Skip the calling test where packages are missing; fail it if PRUNELIB_REQUIRE_SLURM=1."""
    missing = missing_packages(accounting)
    if missing:
        message = _MISSED + " ".join(missing)
        if os.environ.get("PRUNELIB_REQUIRE_SLURM") == "1":
            pytest.fail(f"PRUNELIB_REQUIRE_SLURM=1, but {message}", pytrace=False)
        pytest.skip(message)


def report_missed(terminalreporter: Any) -> None:
    """Say in one line which packages the skipped tests want; for ``pytest_terminal_summary``."""
    packages: set[str] = set()
    number = 0
    for report in terminalreporter.stats.get("skipped", []):
        _, found, names = str(report.longrepr).partition(_MISSED)
        if found:
            number += 1
            packages.update(names.strip("')").split())
    if packages:
        terminalreporter.write_line(
            f"not run for want of a SLURM cluster: {number} checks; "
            f"apt-get install -y --no-install-recommends {' '.join(sorted(packages))}"
        )


def _clean_environment() -> dict[str, str]:
    """This process's environment without what an enclosing SLURM job or site has set."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "SBATCH", "SRUN", "SQUEUE", "SINFO", "SACCT", "SCANCEL"))
    }


class SlurmCluster:
    """A started cluster, nodes ``n1`` ... in the partition ``gpu``; use it as a context manager.

    Skips the calling test (see ``require_slurm``) where SLURM is not installed.

    Attributes:
        directory: its files; logs in ``log/``.
        env: environment for the processes that talk to it.

    Args:
        nodes: number of nodes, all on this machine.
        cpus: CPUs that each node claims to have.
        mem: memory of each node in MB.
        gpus: GPUs of each node; they do not compute.
        gpu_type: their type.
        accounting: with slurmdbd, so that sacct and sacctmgr answer; account ``test``.
        extra: lines added to slurm.conf.
        hide_from: ``n2:/some/path``: that node sees an empty directory there; root only.
    """

    def __init__(
        self,
        nodes: int = 2,
        cpus: int = 4,
        mem: int = 4000,
        gpus: int = 1,
        gpu_type: str = "h100",
        accounting: bool = False,
        extra: str = "",
        hide_from: str = "",
    ) -> None:
        require_slurm(accounting)
        # Unix sockets want a short path; pytest's tmp_path is too long.
        self.directory = Path(tempfile.mkdtemp(prefix="stc.", dir="/tmp"))
        self._closed = False
        self.env = _clean_environment() | {
            "SLURM_CONF": str(self.directory / "etc" / "slurm.conf"),
            # The script's srun wrapper first: nested job steps lose SLURM_CONF.
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
        }
        settings = {
            "STC_NODES": nodes,
            "STC_CPUS": cpus,
            "STC_MEM": mem,
            "STC_GPUS": gpus,
            "STC_GPU_TYPE": gpu_type,
            "STC_ACCOUNTING": int(accounting),
            "STC_EXTRA": extra,
            "STC_HIDE_FROM": hide_from,
            "STC_OWNER": os.getpid(),
        }
        atexit.register(self.close)
        try:
            self._script("up", settings={name: str(value) for name, value in settings.items()})
        except BaseException:
            self.close()
            raise

    def _script(
        self, action: str, *arguments: str, settings: Mapping[str, str] | None = None
    ) -> None:
        # Into a file: the daemons keep what they inherit open, a pipe would never end.
        log = self.directory / f"{action}.txt"
        with log.open("wb") as file:
            done = subprocess.run(
                ["bash", str(SCRIPT), action, *arguments, str(self.directory)],
                env={**_clean_environment(), **(settings or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=120,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"slurm_cluster.sh {action}: {log.read_text(errors='replace')}")

    def run(
        self, *command: str, timeout: float = 60, cwd: Path | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with the cluster's environment.

        Raises:
            RuntimeError: it failed; with its output.
        """
        done = subprocess.run(
            command,
            env=self.env,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def kill_node(self, name: str) -> None:
        """End a node's daemon and its jobs with SIGKILL, as a power cut would."""
        self._script("node-kill", name)

    def start_node(self, name: str) -> None:
        """Start a killed node and wait until the controller hears it."""
        self._script("node-start", name)
        end = time.monotonic() + 60
        while (state := self.node_state(name)) not in ("idle", "mixed", "allocated"):
            if time.monotonic() > end:
                raise RuntimeError(f"node {name} is still {state}")
            time.sleep(0.1)

    def node_state(self, name: str) -> str:
        """Return a node's state in sinfo's long form; ``*`` at its end: does not answer."""
        return self.run("sinfo", "-h", "-n", name, "-o", "%T").stdout.split("\n")[0].strip()

    def close(self) -> None:
        """Stop all daemons and jobs and remove the directory; does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            self._script("down")
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> SlurmCluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
