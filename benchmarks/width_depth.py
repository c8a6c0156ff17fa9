"""Print and plot width against depth: perplexity at measured latency, and the speed-up realised.

From the artefacts of a study whose methods prune widths (heads and MLP channels) or depths (whole
blocks) to the same targets, and whose evaluation measures latency:

* at equal parameters: every method's perplexity (geometric mean over seeds), latencies, and the
  share of the ideal speed-up that it realises, ``(measured - 1) / (ideal - 1)``: measured is the
  unpruned model's latency over the pruned one's, ideal the unpruned model's parameters over the
  pruned one's, or the same of MACs (of prefill with logits at the last position alone; of decoding
  with those of every position, which is one step's work behind that many tokens, times them);
* at equal latency: a width method's perplexity at the latency that a depth method was measured to
  have, linear in log perplexity between the two nearest measured widths, the unpruned model
  being one of them.

Latency is the median over repeats, prefill in ms per pass, decoding in ms per token of every
sequence, for every batch size of the evaluation. It is measured with all cores reserved; figures
during which other processes were busy all the same are named.

    python benchmarks/width_depth.py --experiment config/experiments/study_width_depth.yaml \
        --csv width_depth.csv --plot width_depth.png
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunelib.command import experiment_parser, reporting_errors
from prunelib.errors import InputError
from prunelib.experiment.experiment import Experiment
from prunelib.plan import DEPTH_KINDS
from prunelib.reporting.artefacts import load_report

if TYPE_CHECKING:
    from prunelib.reporting.artefacts import Cell, Report

PHASES = ("prefill", "decode")
DENSE = "dense"


@dataclass(frozen=True)
class Point:
    """One model in one phase at one batch size.

    Attributes:
        model: catalogue name.
        method: catalogue name, or ``dense``.
        side: ``width``, ``depth`` or ``dense``.
        target: what was asked for.
        phase: ``prefill`` or ``decode``.
        batch: sequences at a time.
        milliseconds: latency, per pass or per token.
        nll: mean over seeds of the log of the perplexity.
        parameters: of the model.
        macs: of the phase; see the module.
        seeds: whose perplexities are averaged.
        undisturbed: whether nothing else was busy while latency was measured.
    """

    model: str
    method: str
    side: str
    target: str
    phase: str
    batch: int
    milliseconds: float
    nll: float
    parameters: int
    macs: int
    seeds: int
    undisturbed: bool


def realised(measured: float, ideal: float) -> float | None:
    """Return the share of the ideal speed-up that is realised; None where there is none to be had.

    Args:
        measured: the unpruned model's latency over the pruned one's.
        ideal: the same of parameters, or MACs.
    """
    return (measured - 1) / (ideal - 1) if ideal > 1 else None


def interpolated(curve: Sequence[tuple[float, float]], at: float) -> float | None:
    """Return the value at a place, linear between the nearest two; None outside of the curve.

    Args:
        curve: (place, value) pairs, in any order.
        at: the place.
    """
    ordered = sorted(curve)
    for (low, first), (high, second) in pairwise(ordered):
        if low <= at <= high:
            share = (at - low) / (high - low) if high > low else 0.0
            return first + share * (second - first)
    return None


def timings(metrics: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """Return (phase, batch, ms) of all batch sizes of an efficiency artefact."""
    found = []
    for one in (metrics, *metrics.get("batches", ())):
        prefill, decode = one["prefill"], one["decode"]
        found.append(("prefill", int(prefill["batch"]), 1000 * prefill["latency_s"]))
        seconds = decode["latency_s"] / decode["new_tokens"]
        found.append(("decode", int(decode["batch"]), 1000 * seconds))
    return found


def points_of(cells: Sequence[Cell], side: str) -> list[Point]:
    """Return the points of one group of cells: its seeds' perplexities at the timings of one."""
    timed = next((cell for cell in cells if cell.content("efficiency")), None)
    nlls = [
        math.log(cell.content("perplexity")["perplexity"])
        for cell in cells
        if cell.content("perplexity")
    ]
    if timed is None or not nlls:
        return []
    metrics = timed.content("efficiency")
    macs = {"prefill": metrics["macs"]["macs_last_logits"], "decode": metrics["macs"]["macs"]}
    return [
        Point(
            model=timed.model,
            method=DENSE if side == DENSE else timed.method,
            side=side,
            target=timed.target_label,
            phase=phase,
            batch=batch,
            milliseconds=milliseconds,
            nll=statistics.fmean(nlls),
            parameters=metrics["parameters"],
            macs=macs[phase],
            seeds=len(nlls),
            undisturbed=bool(metrics["comparable"]),
        )
        for phase, batch, milliseconds in timings(metrics)
    ]


def study_points(experiment: Experiment, report: Report) -> list[Point]:
    """Return the points of all unrecovered cells that were measured.

    Raises:
        InputError: an unpruned model, or all pruned ones, are not there.
    """
    found: list[Point] = []
    for (_, method, _, recovery), cells in report.groups.items():
        if cells[0].control == DENSE:
            found += points_of(cells, DENSE)
        elif recovery == "none" and cells[0].control != "prune_zero" and cells[0].target:
            kind = experiment.methods[method].rule().kinds[0]
            found += points_of(cells, "depth" if kind in DEPTH_KINDS else "width")
    dense = {one.model for one in found if one.side == DENSE}
    found = [one for one in found if one.model in dense]
    if not any(one.side != DENSE for one in found):
        raise InputError(f"{experiment.path}: no latency of a pruned and its unpruned model yet")
    return found


def dense_of(one: Point, points: Sequence[Point]) -> Point:
    """Return the unpruned model's point in the same phase at the same batch size."""
    where = (one.model, DENSE, one.phase, one.batch)
    return next(p for p in points if (p.model, p.side, p.phase, p.batch) == where)


def shares(one: Point, points: Sequence[Point]) -> dict[str, float | None]:
    """Return the speed-up and its realised shares."""
    dense = dense_of(one, points)
    speed_up = dense.milliseconds / one.milliseconds
    return {
        "removed": 1 - one.parameters / dense.parameters,
        "speed_up": speed_up,
        "realised_parameters": realised(speed_up, dense.parameters / one.parameters),
        "realised_macs": realised(speed_up, dense.macs / one.macs),
    }


def equal_latency(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return, for every depth and width method, both perplexities at the depth's latency."""
    found = []
    for one in (point for point in points if point.side == "depth"):
        where = (one.model, one.phase, one.batch)
        beside = [p for p in points if (p.model, p.phase, p.batch) == where]
        for method in dict.fromkeys(p.method for p in beside if p.side == "width"):
            curve = [(p.milliseconds, p.nll) for p in beside if p.method in (method, DENSE)]
            other = interpolated(curve, one.milliseconds)
            found.append(
                {
                    **{name: getattr(one, name) for name in ("model", "phase", "batch", "target")},
                    "depth": one.method,
                    "width": method,
                    "milliseconds": one.milliseconds,
                    "depth_perplexity": math.exp(one.nll),
                    "width_perplexity": None if other is None else math.exp(other),
                    "ratio": None if other is None else math.exp(other - one.nll),
                }
            )
    return found


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table as markdown."""
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for row in rows:
        cells = ("" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else f"{cell}"
                 for cell in row)  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def print_tables(points: Sequence[Point]) -> None:
    """Print what holds at equal parameters and at equal latency."""
    print("At equal parameters\n")
    heads = ("phase", "batch", "target", "method", "removed", "perplexity", "ms", "speed-up")
    # Of one phase and batch size: what is smallest comes last.
    order = sorted(points, key=lambda one: (one.phase != PHASES[0], one.batch, -one.parameters))
    rows = []
    for one in order:
        told = shares(one, points)
        rows.append(
            [
                *(one.phase, one.batch, one.target, one.method, told["removed"]),
                *(math.exp(one.nll), one.milliseconds, told["speed_up"]),
                *(told["realised_parameters"], told["realised_macs"]),
            ]
        )
    table((*heads, "realised of parameters", "realised of MACs"), rows)
    print("\nAt equal latency: the depth's, and the width's perplexity there\n")
    compared = equal_latency(points)
    names = [
        *("phase", "batch", "target", "depth", "width"),
        *("milliseconds", "depth_perplexity", "width_perplexity", "ratio"),
    ]
    table([name.replace("_", " ") for name in names], [[r[n] for n in names] for r in compared])
    busy = sorted({f"{one.method} {one.target}" for one in points if not one.undisturbed})
    if busy:
        print(f"\nnot comparable, other processes were busy: {', '.join(busy)}")


def draw(points: Sequence[Point], path: Path) -> None:
    """Write the plots: perplexity against latency above, realised shares below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = sorted({(p.model, p.phase, p.batch) for p in points}, key=lambda w: (w[0], w[1:]))
    figure, axes = plt.subplots(2, len(places), figsize=(3.4 * len(places), 6.4), squeeze=False)
    methods = list(dict.fromkeys(p.method for p in points if p.side != DENSE))
    colours = {method: f"C{number}" for number, method in enumerate(methods)}
    for (above, below), place in zip(axes.T, places, strict=True):
        here = [p for p in points if (p.model, p.phase, p.batch) == place]
        for method in methods:
            own = [p for p in here if p.method == method]
            line = sorted((p.milliseconds, math.exp(p.nll)) for p in here
                          if p.method in (method, DENSE))  # fmt: skip
            side = f"{method} ({own[0].side})" if own else method
            above.plot(*zip(*line, strict=True), "o-", color=colours[method], label=side)
            for name, style in (("parameters", "o-"), ("macs", "s--")):
                told = [shares(p, points) for p in own]
                xs = [one["removed"] for one in told]
                ys = [one[f"realised_{name}"] for one in told]
                below.plot(xs, ys, style, color=colours[method], label=f"{method}, {name}")
        above.set_yscale("log")
        above.set_title(f"{place[0]}, {place[1]}, batch {place[2]}", fontsize=9)
        above.set_xlabel("ms per pass" if place[1] == "prefill" else "ms per token")
        below.axhline(1, color="#444444", linewidth=0.8)
        below.set_xlabel("share of parameters removed")
    axes[0][0].set_ylabel("perplexity")
    axes[1][0].set_ylabel("realised share of the ideal speed-up")
    for axis in axes[:, 0]:
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


@reporting_errors("width_depth")
def main(arguments: list[str] | None = None) -> int:
    """Print the tables; write points and plots if asked to."""
    parser: argparse.ArgumentParser = experiment_parser(__doc__)
    parser.add_argument("--csv", type=Path, help="write every point here")
    parser.add_argument("--plot", type=Path, help="write the plots here (.png, .pdf)")
    options = parser.parse_args(arguments)
    experiment = Experiment.load(options.experiment, options.catalogue)
    points = study_points(experiment, load_report(experiment.report()))
    print_tables(points)
    if options.csv:
        names = [field.name for field in fields(Point)]
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*names, *shares(points[0], points)])
            writer.writeheader()
            writer.writerows(asdict(one) | shares(one, points) for one in points)
    if options.plot:
        draw(points, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
