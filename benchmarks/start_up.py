"""Measure how long Snakemake takes to read the Snakefile, as a job on a cluster does twice.

An experiment of about 1,000 cells and the quickstart are set against an empty Snakefile; what is
above it is ours. Each call is a process of its own, the three kinds take turns.

    python benchmarks/start_up.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from prunelib.experiment.experiment import Experiment

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config"
QUICKSTART = CONFIG / "experiments" / "quickstart.yaml"
LIMIT_SECONDS = 1.0


def large_experiment(directory: Path) -> Path:
    """Write the quickstart with ten targets and ten seeds; return its path."""
    data = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    data["targets"] = [{"parameters": round(0.05 * step, 2)} for step in range(1, 12)]
    data["seeds"] = list(range(10))
    path = directory / "large.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def seconds(directory: Path, *options: str) -> float:
    """Time one reading of a Snakefile, without building a DAG."""
    command = [sys.executable, "-m", "snakemake", "--list-rules", *options]
    begin = time.perf_counter()
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> int:
    """Print medians; the exit code is 1 if 1,000 cells take more than a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "Snakefile").write_text("rule all:\n    input: 'nothing'\n")
        large = large_experiment(directory)
        cells = {path: len(Experiment.load(path, CONFIG).cells) for path in (QUICKSTART, large)}
        kinds: dict[str, list[str]] = {"an empty Snakefile": []} | {
            f"{count:,} cells": [
                "--snakefile",
                str(ROOT / "Snakefile"),
                "--config",
                f"experiment={path}",
                f"catalogue={CONFIG}",
            ]
            for path, count in cells.items()
        }
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        # The first round warms the file cache and the kept parses.
        for round_number in range(options.repeats + 1):
            for kind, arguments in kinds.items():
                taken = seconds(directory, *arguments)
                if round_number:
                    times[kind].append(taken)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    floor = medians["an empty Snakefile"]
    for kind, value in medians.items():
        print(f"{kind:20} {value:.2f} s, {value - floor:.2f} s above the empty one")
    ours = max(medians.values()) - floor
    held = ours <= LIMIT_SECONDS
    print(f"{'pass' if held else 'FAIL'}  {ours:.2f} <= {LIMIT_SECONDS} s for the large experiment")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
