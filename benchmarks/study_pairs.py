"""Print how a study's methods differ from several references, document by document.

``report.html`` compares with one baseline; this compares with any, from the same artefacts: the
ratio of perplexities, or with ``--metric`` the difference of a task's scores in points, with its
95 % interval over documents (the wider limits of bootstrap and t), seeds averaged first, and that
of every seed alone, whose spread the interval does not hold.

    python benchmarks/study_pairs.py --experiment config/experiments/study_mini_llm_channels.yaml \
        --references wanda_sp wanda_noise --methods mini_llm_direct mini_llm
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from prunelib.command import experiment_parser, reporting_errors
from prunelib.errors import InputError
from prunelib.experiment.experiment import Experiment
from prunelib.reporting.artefacts import load_report
from prunelib.reporting.table import paired_differences

if TYPE_CHECKING:
    from prunelib.reporting.artefacts import Cell, Report

HEADS = ("target", "recovery", "method", "reference")
PERPLEXITY = "nll"


def score(cell: Cell, metric: str) -> float:
    """Return a cell's mean NLL, nat per token, or its score in a task, ``task/acc``."""
    if metric == PERPLEXITY:
        return float(cell.content("perplexity")["nll_mean"])
    task, kind = metric.split("/")
    return float(cell.content("tasks")["tasks"][task][kind])


def shown(difference: float, metric: str) -> str:
    """Return a difference of scores as a ratio of perplexities or in points."""
    return f"{math.exp(difference):.3f}" if metric == PERPLEXITY else f"{100 * difference:+.1f}"


def single_seeds(ours: list[Cell], theirs: list[Cell], metric: str) -> list[float]:
    """Return the difference of scores for every seed both have; without a seed, with all."""
    return [
        score(our, metric) - score(their, metric)
        for our in ours
        for their in theirs
        if our.seed == their.seed or None in (our.seed, their.seed)
    ]


def rows(
    report: Report, references: list[str], methods: list[str], metric: str = PERPLEXITY
) -> list[tuple[str, ...]]:
    """Return one row per comparison at the same target and recovery, see ``main``."""
    found: list[tuple[str, ...]] = []
    for reference in references:
        told = dict(report.experiment) | {"baseline": reference}
        table = paired_differences(replace(report, experiment=told))
        chosen = table[(table.reference == reference) & (table.metric == metric)]
        # A note says that the budgets differ or that nothing compares.
        chosen = chosen[chosen.method.isin(methods) & (chosen.note == "")]
        for row in chosen.to_dict("records"):
            model, method, target, recovery = (
                str(row[part]) for part in ("model", "method", "target", "recovery")
            )
            alone = single_seeds(
                report.groups[model, method, target, recovery],
                report.groups[model, reference, target, recovery],
                metric,
            )
            low = min(float(row["low"]), float(row["t_low"]))
            high = max(float(row["high"]), float(row["t_high"]))
            found.append(
                (
                    *(target, recovery, method, reference),
                    shown(float(row["difference"]), metric),
                    f"{shown(low, metric)} to {shown(high, metric)}",
                    ", ".join(shown(value, metric) for value in alone),
                )
            )
    return found


@reporting_errors("study_pairs")
def main(arguments: list[str] | None = None) -> int:
    """Print the table as markdown."""
    parser: argparse.ArgumentParser = experiment_parser(__doc__)
    parser.add_argument("--references", nargs="+", required=True, help="methods compared with")
    parser.add_argument("--methods", nargs="+", help="methods compared; by default all")
    parser.add_argument(
        "--metric", default=PERPLEXITY, help="nll, or a task and its kind of score: task/acc"
    )
    options = parser.parse_args(arguments)
    report = load_report(Experiment.load(options.experiment, options.catalogue).report())
    known = {cell.method for cell in report.cells if cell.target}
    for name in (*options.references, *(options.methods or ())):
        if name not in known:
            raise InputError(
                f"{name} is no method of the study; allowed: {', '.join(sorted(known))}"
            )
    compared = rows(report, options.references, options.methods or sorted(known), options.metric)
    if not compared:
        raise InputError(
            f"{options.experiment}: no finished cell of {', '.join(options.references)} compares "
            f"by {options.metric}"
        )
    difference = "ratio" if options.metric == PERPLEXITY else f"{options.metric}, points"
    heads = (*HEADS, difference, "95 % over documents", "single seeds")
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for row in compared:
        print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
