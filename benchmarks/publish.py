"""How long it takes to publish many checkpoints: made-up ones, to a directory as remote.

Measured is what `make publish` does besides the report: sha256, DVC's add and push, the look at the
remote, the commit. The directories are made in a temporary repository, which is removed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path

from prunelib.experiment.graph import Node
from prunelib.provenance import artefact
from prunelib.provenance.fingerprint import ROOT
from prunelib.sharing.publish import publish
from prunelib.sharing.repository import sharing

LIMIT_SECONDS = 60.0
MIB = 1024**2


def make_repository(directory: Path) -> None:
    """Make a git repository with the project's settings of git and DVC and a remote beside it."""
    for name in (".gitignore", ".gitattributes", ".dvcignore"):
        shutil.copy(ROOT / name, directory / name)
    (directory / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, directory / ".dvc" / name)
    remote = directory.with_name("remote")
    for command in (
        ["git", "init", "-q"],
        ["git", "config", "user.name", "benchmark"],
        ["git", "config", "user.email", "benchmark@localhost"],
        [sys.executable, "-m", "dvc", "remote", "add", "-q", "-d", "lab", str(remote)],
        ["git", "add", "-A"],
        ["git", "commit", "-q", "-m", "Begin"],
    ):
        subprocess.run(command, cwd=directory, check=True)


def make_checkpoint(number: int, files: int, size: int) -> Node:
    """Write an artefact of random bytes, one file of them as large as a plan."""
    node = Node("prune", ("made-up",), {"number": number}, {})

    def write(out: Path) -> None:
        (out / "plan.json").write_text("{}\n", encoding="utf-8")
        for index in range(files):
            (out / f"model-{index}.safetensors").write_bytes(os.urandom(size))

    artefact.commit(node.directory, write, {"step": node.step, "key": node.key})
    return node


def main() -> int:
    """Print the seconds of two publishes; the exit code is 1 if the first is slow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=200)
    parser.add_argument("--files", type=int, default=3, help="files of a checkpoint")
    parser.add_argument("--mib", type=int, default=1, help="MiB of a file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "lab"
        directory.mkdir()
        make_repository(directory)
        with chdir(directory):
            nodes = [
                make_checkpoint(number, options.files, options.mib * MIB)
                for number in range(options.checkpoints)
            ]
            times = []
            for _ in range(2):
                begin = time.monotonic()
                with sharing():
                    publish(
                        "made-up", nodes, remote=None, push=True, light=False, read_back=False,
                        say=print,
                    )  # fmt: skip
                times.append(time.monotonic() - begin)
    first, again = times
    held = first <= LIMIT_SECONDS
    print(f"again with nothing new: {again:.1f} s")
    print(
        f"{'pass' if held else 'FAIL'}  {first:.1f} <= {LIMIT_SECONDS:g} s for "
        f"{options.checkpoints} checkpoints of {options.files} files of {options.mib} MiB"
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
