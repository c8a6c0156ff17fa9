"""Measure `snakemake -n` on an experiment with 10,000 steps: before anything exists, and after.

Also: `snakemake` itself when all of it exists, and on the finished quickstart. The results are made
up, with records as the steps write them. Beside it, as what Snakemake takes by itself on this
machine, a plan of as many jobs with the same directives (input function, log, parameter) and no
logic. Seconds and peak resident memory are those of one process each; medians of the repeats.

    python benchmarks/planning.py
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import yaml

from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import Node, closure
from prunelib.provenance import artefact, environment
from prunelib.provenance.fingerprint import ROOT, Fingerprint, fingerprint
from prunelib.provenance.keys import package_versions
from prunelib.sharing.repository import report_stamp, steps_of

CONFIG = ROOT / "config"
BARE = """
def above(wildcards):
    return ancient("results/a/x/" + wildcards.i)
rule all:
    input: expand("results/b/x/{i}", i=range(PAIRS))
rule a:
    output: "results/a/{label}/{i}"
    log: "logs/a/{label}/{i}"
    params: request=lambda wildcards: "x" * 1000
    shell: "python a.py --request {params.request:q} > {log} 2>&1"
rule b:
    input: above
    output: "results/b/{label}/{i}"
    log: "logs/b/{label}/{i}"
    params: request=lambda wildcards: "x" * 1000
    shell: "python b.py --request {params.request:q} > {log} 2>&1"
"""
QUICKSTART = CONFIG / "experiments" / "quickstart.yaml"
STEPS = 10_000
LIMIT_SECONDS, LIMIT_MB = 20.0, 500.0
LIMIT_FINISHED_SECONDS = 5.0


def large_experiment(directory: Path) -> Path:
    """Write the quickstart with as many targets and seeds as give 10,000 steps."""
    data = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    data["targets"] = [{"parameters": round(0.02 * step, 2)} for step in range(1, 25)]
    path = directory / "large.yaml"
    for seeds in range(1, 100):
        data["seeds"] = list(range(seeds))
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
        if len(nodes_of(path)) >= STEPS:
            return path
    raise AssertionError("the quickstart has no seeded method")


def nodes_of(path: Path) -> dict[str, Node]:
    """Return the steps of an experiment by key."""
    return closure(steps_of(Experiment.load(path, CONFIG)))


def forge(path: Path) -> None:
    """Make a whole artefact with a full record for every step of an experiment, and the stamp."""
    facts = environment.describe(ROOT)

    def write(out: Path) -> None:
        (out / "result.json").write_text("{}\n", encoding="utf-8")

    codes: dict[tuple[str, ...], Fingerprint] = {}
    for key, node in nodes_of(path).items():
        code = codes.setdefault(node.entry, fingerprint(node.entry))
        record = {
            "step": node.step,
            "key": key,
            "params": dict(node.params),
            "upstream": {name: above.key for name, above in node.inputs.items()},
            "fingerprint": code.digest,
            "definitions": code.definitions,
            "packages": package_versions(node.packages),
            **facts,
        }
        artefact.commit(node.directory, write, record)
    report_stamp(Experiment.load(path, CONFIG)).touch()


def measured(experiment: Path | None, *options: str) -> tuple[float, float, str]:
    """Run Snakemake; return seconds, peak memory in MB of its process, and what it says."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *options]
    if experiment:
        command += ["--snakefile", str(ROOT / "Snakefile")]
        command += ["--config", f"experiment={experiment}", f"catalogue={CONFIG}"]
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(said[-3000:])
    return time.perf_counter() - begin, _megabytes(usage), said


def _megabytes(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss * 1024 / 1e6


def main() -> int:
    """Print medians and whether the limits hold; the exit code is 1 if one does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    held = True

    def report(what: str, run: Callable[[], tuple[float, float, str]], limit: float) -> str:
        nonlocal held
        runs = [run() for _ in range(options.repeats)]
        seconds = statistics.median(one[0] for one in runs)
        megabytes = statistics.median(one[1] for one in runs)
        fits = seconds <= limit and megabytes <= LIMIT_MB
        held &= fits
        print(
            f"{'pass' if fits else 'FAIL'}  {what:58} {seconds:6.1f} s (limit {limit:.0f}) "
            f"{megabytes:6.0f} MB (limit {LIMIT_MB:.0f})",
            flush=True,
        )
        return runs[-1][2]

    with tempfile.TemporaryDirectory() as name, chdir(name):
        large = large_experiment(Path(name))
        steps = len(nodes_of(large))
        plan = ("-n", "-q", "rules")
        Path("Snakefile").write_text(f"PAIRS = {steps // 2}\n{BARE}", encoding="utf-8")
        report(
            f"bare Snakemake: -n, {steps // 2 * 2:,} jobs, nothing exists",
            lambda: measured(None, *plan),
            float("inf"),
        )
        said = report(
            f"snakemake -n, {steps:,} steps, nothing exists",
            lambda: measured(large, *plan),
            LIMIT_SECONDS,
        )
        planned = re.search(r"^total\s+(\d+)", said, re.MULTILINE)
        assert planned, said[-2000:]
        assert int(planned[1]) >= steps, said[-2000:]
        forge(large)
        for what, arguments, limit in (
            ("snakemake -n", plan, LIMIT_SECONDS),
            ("snakemake", ("-q",), LIMIT_SECONDS),
        ):
            report(
                f"{what}, {steps:,} steps, all exist",
                lambda arguments=arguments: measured(large, *arguments),  # type: ignore[misc]
                limit,
            )
        assert "Nothing to be done" in measured(large, "-n")[2]
        forge(QUICKSTART)
        report(
            f"snakemake, the quickstart's {len(nodes_of(QUICKSTART))} steps, all exist",
            lambda: measured(QUICKSTART),
            LIMIT_FINISHED_SECONDS,
        )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
