"""Measure the integrity check of a checkpoint, in GB/s, beside a plain read of the same files.

The files are made up, as large as shards, and in the page cache: the disk takes no part. One file
shows what one core hashes, several are hashed side by side.

    python benchmarks/integrity.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from prunelib.provenance import artefact

_BUFFER = 2**20


def make(directory: Path, files: int, size: int) -> None:
    """Commit an artefact of random bytes."""

    def write(out: Path) -> None:
        for number in range(files):
            with (out / f"model-{number}.safetensors").open("wb") as file:
                for _ in range(size // _BUFFER):
                    file.write(os.urandom(_BUFFER))

    artefact.commit(directory, write, {"key": directory.name})


def read_plainly(directory: Path) -> None:
    """Read all files once, into one buffer."""
    buffer = bytearray(_BUFFER)
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def gigabytes_per_second(run: Callable[[], None], size: int, repeats: int) -> float:
    """Return the median rate."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return size / statistics.median(times) / 1e9


def main() -> int:
    """Print the rates of one file and of several."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--mib", type=int, default=512, help="MiB of a shard")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, shards of {options.mib} MiB")
    for shards in (1, options.shards):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name) / "0123456789abcdef"
            make(directory, shards, options.mib * 2**20)
            size = shards * options.mib * 2**20
            plain = gigabytes_per_second(partial(read_plainly, directory), size, options.repeats)
            checked = gigabytes_per_second(
                partial(artefact.verify, directory), size, options.repeats
            )
            print(
                f"{shards} shard(s): plain read {plain:.2f} GB/s, sha256 of all {checked:.2f} "
                f"GB/s, ratio {checked / plain:.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
