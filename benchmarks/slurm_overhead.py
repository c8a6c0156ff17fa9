"""Measure what running through SLURM costs, from a finished run's records and from sacct.

Three figures: the run's wall time over the sum of the steps' own times; the share of a job in which
the step does not work yet or any more (queue aside: nested Snakemake processes, imports); and how
long a job waited in the queue.

    python benchmarks/slurm_overhead.py --wall SECONDS --experiment FILE   # on the cluster

Run it in the run's directory. Without the experiment, every step found there counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import closure
from prunelib.sharing.repository import steps_of


@dataclass(frozen=True)
class Job:
    """Seconds of one job: in the queue, on the node, and in the step itself."""

    step: str
    queued: float
    elapsed: float
    own: float


def read_records(results: Path, experiment: Path | None) -> list[dict[str, Any]]:
    """Return the records of all steps, or of those of one experiment."""
    found = {path.parent: path for path in results.glob("*/**/provenance.json")}
    if experiment is not None:
        steps = closure(steps_of(Experiment.load(experiment, Path("config"))))
        wanted = {node.directory for node in steps.values()}
        found = {directory: path for directory, path in found.items() if directory in wanted}
    return [json.loads(path.read_text(encoding="utf-8")) for path in found.values()]


def read_jobs(records: list[dict[str, Any]]) -> list[Job]:
    """Return the SLURM jobs of the records."""
    columns = "JobIDRaw,Submit,Start,End"
    command = ["sacct", "-X", "-n", "-P", "-S", "now-7days", "-o", columns]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    accounted = {}
    for line in lines:
        number, *moments = line.split("|")
        if "Unknown" not in moments:
            accounted[number] = [datetime.fromisoformat(moment) for moment in moments]
    jobs = []
    for record in records:
        number = record["environment"].get("SLURM_JOB_ID")
        if number in accounted:
            submit, start, end = accounted[number]
            queued, elapsed = (start - submit).total_seconds(), (end - start).total_seconds()
            jobs.append(Job(record["step"], queued, elapsed, record["seconds"]))
    return jobs


def main() -> int:
    """Print the figures by step and in all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--experiment", type=Path, help="count only this experiment's steps")
    parser.add_argument("--wall", type=float, required=True, help="seconds that the run took")
    options = parser.parse_args()
    records = read_records(options.results, options.experiment)
    jobs = read_jobs(records)
    if not jobs:
        print("no step in the results ran in a SLURM job that sacct knows", file=sys.stderr)
        return 1
    print(
        f"{'step':12}{'jobs':>5}{'own s':>9}{'job s':>9}{'start-up s':>12}{'queue s':>9}  medians"
    )
    for step in sorted({job.step for job in jobs}):
        those = [job for job in jobs if job.step == step]
        medians = [
            statistics.median(values)
            for values in zip(
                *((j.own, j.elapsed, j.elapsed - j.own, j.queued) for j in those), strict=True
            )
        ]
        own, elapsed, start_up, queued = medians
        print(f"{step:12}{len(those):5}{own:9.1f}{elapsed:9.1f}{start_up:12.1f}{queued:9.1f}")
    own, elapsed = sum(job.own for job in jobs), sum(job.elapsed for job in jobs)
    local = [r["seconds"] for r in records if not r["environment"].get("SLURM_JOB_ID")]
    print(
        f"own times {own:.0f} s in {len(jobs)} jobs, {sum(local):.0f} s in {len(local)} local steps"
    )
    print(f"start-up (nested Snakemake, imports) {1 - own / elapsed:.0%} of the jobs' time")
    print(f"wall {options.wall:.0f} s, over all own times {options.wall / (own + sum(local)):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
