"""Print in which order a depth study's methods remove blocks, and how far these orders agree.

Read from the scores of what has finished: for every method and seed the order of removal, as the
plan would follow it. Orders are compared within a seed (method against method) and within a method
(seed against seed): Spearman's rank correlation over the blocks that both orders place, where both
place all blocks that may go, and the share of the first 3, 6 and 9 that both have. Greedy searches
and mergers place only as many as they went to; how many of their first ones others share is all
that can be said. By chance alone, the first k of n blocks share k / n.

Published orders (``removed_block_<i>`` in config/published) are compared where model and method
are the same.

    python benchmarks/study_orders.py --experiment config/experiments/study_depth.yaml \
        --csv orders.csv --plot orders.png
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prunelib.command import experiment_parser, reporting_errors
from prunelib.errors import InputError
from prunelib.experiment.experiment import Experiment
from prunelib.plan import DEPTH_KINDS
from prunelib.provenance import artefact
from prunelib.reporting.published import Published, load_published, same_model_and_method
from prunelib.reporting.stats import spearman

if TYPE_CHECKING:
    import numpy.typing as npt

FIRST = (3, 6, 9)
PUBLISHED = "published"
HEADS = ("model", "kind", "method", "seed", "other_method", "other_seed", "common", "spearman")
COLUMNS = (*HEADS, *(f"overlap_{k}" for k in FIRST))


@dataclass(frozen=True)
class Order:
    """In which order a method removes blocks.

    Attributes:
        model: catalogue name.
        kind: ``block``, ``attention`` or ``mlp``.
        method: catalogue name, or ``published: <method>``.
        seed: of calibration set and method; None where nothing depends on it.
        blocks: indices, what goes first at the front.
        complete: whether all blocks that may go have a place.
    """

    model: str
    kind: str
    method: str
    seed: int | None
    blocks: tuple[int, ...]
    complete: bool


@dataclass(frozen=True)
class Agreement:
    """How far two orders agree.

    Attributes:
        common: blocks that both place.
        spearman: rank correlation over these; None where an order is not complete, or fewer than
            three blocks are common.
        overlaps: per number of ``FIRST``, the share of so many first ones that both have; None
            where an order is shorter.
    """

    common: int
    spearman: float | None
    overlaps: Mapping[int, float | None]


def removal_order(
    scores: npt.NDArray[np.float64], removable: Sequence[int]
) -> tuple[tuple[int, ...], bool]:
    """Return the order that scores stand for, and whether it places all blocks that may go.

    What a search did not come to has, by ``criteria.depth.order_scores``, the score ``2 n - i``,
    and what it placed 0, 1, 2, ...; of such scores only the places are an order.

    Args:
        scores: of all blocks [n], low ones first.
        removable: indices of the blocks that may go.
    """
    count = len(scores)
    order = [int(i) for i in np.argsort(scores, kind="stable")]
    left = [i for i in range(count) if scores[i] == 2 * count - i]
    placed = [i for i in order if i not in left]
    if left and [float(scores[i]) for i in placed] == list(map(float, range(len(placed)))):
        order = placed
    allowed = set(removable)
    found = tuple(i for i in order if i in allowed)
    return found, len(found) == len(allowed)


def rank_correlation(one: Sequence[int], other: Sequence[int]) -> float | None:
    """Return Spearman's correlation of two orders over the blocks of both; None below three."""
    common = set(one) & set(other)
    if len(common) < 3:
        return None
    places = [np.array([order.index(block) for block in sorted(common)]) for order in (one, other)]
    return spearman(places[0], places[1])


def agreement(one: Order, other: Order) -> Agreement:
    """Return how far two orders of one model and kind agree."""
    a, b = one.blocks, other.blocks
    return Agreement(
        len(set(a) & set(b)),
        rank_correlation(a, b) if one.complete and other.complete else None,
        {k: len(set(a[:k]) & set(b[:k])) / k if min(len(a), len(b)) >= k else None for k in FIRST},
    )


def pairs(orders: Sequence[Order]) -> list[tuple[Order, Order]]:
    """Return what is compared: methods at the same seed, seeds of one method.

    An order without a seed is compared with those of every seed.
    """
    return [
        (one, other)
        for number, one in enumerate(orders)
        for other in orders[number + 1 :]
        if (one.model, one.kind) == (other.model, other.kind)
        and (one.method == other.method or one.seed == other.seed or None in (one.seed, other.seed))
    ]


def rows(orders: Sequence[Order]) -> list[dict[str, Any]]:
    """Return one row of ``COLUMNS`` per comparison."""
    found = []
    for one, other in pairs(orders):
        told = agreement(one, other)
        values = (
            *(one.model, one.kind, one.method, one.seed, other.method, other.seed),
            *(told.common, told.spearman, *(told.overlaps[k] for k in FIRST)),
        )
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found


def means(compared: Sequence[Mapping[str, Any]], column: str) -> dict[tuple[str, str], float]:
    """Return the means over seeds of a column by (method, method), in both directions."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in compared:
        if row[column] is not None:
            ends = (str(row["method"]), str(row["other_method"]))
            for key in {ends, ends[::-1]}:
                values.setdefault(key, []).append(float(row[column]))
    return {key: statistics.fmean(found) for key, found in values.items()}


def study_orders(experiment: Experiment) -> list[Order]:
    """Return the orders of all finished scores of methods that remove blocks or their parts.

    Raises:
        InputError: nothing of that kind has finished.
    """
    from safetensors.numpy import load_file

    found: dict[str, Order] = {}
    for cell in experiment.cells:
        # Those that are recovered, or pruned to 0 %, have a seed even where the scores have none.
        if "prune" not in cell.steps or cell.recovery != "none" or cell.control == "prune_zero":
            continue
        rule, node = experiment.methods[cell.method].rule(), cell.steps["prune"].inputs["scores"]
        if rule.kinds[0] not in DEPTH_KINDS or rule.repeat:
            continue
        place = f"{cell.method} {node.key}"
        if place in found or not artefact.is_valid(node.directory, node.key):
            continue
        kind = rule.kinds[0]
        artefact.verify(node.directory, ["scores.safetensors"])
        scores = load_file(node.directory / "scores.safetensors")[f"{kind}.0"]
        blocks, complete = removal_order(scores, rule.removable(len(scores)))
        found[place] = Order(cell.model, kind, cell.method, cell.seed, blocks, complete)
    if not found:
        raise InputError(f"{experiment.path}: no scores of methods that remove blocks are there")
    return list(found.values())


def published_orders(
    figures: Sequence[Published], described: Mapping[str, Any], orders: Sequence[Order]
) -> list[Order]:
    """Return the published orders of the models and methods that ``orders`` are of.

    Args:
        figures: all published ones; those of the metric ``removed_block_<i>`` count, from 1.
        described: what the report is told of ``models`` and ``methods``.
        orders: ours.
    """
    found: dict[tuple[str, str, str], dict[int, int]] = {}
    for model, kind, method in sorted({(one.model, one.kind, one.method) for one in orders}):
        for row in figures:
            place = row.metric.removeprefix("removed_block_")
            if place.isdigit() and same_model_and_method(
                row, (model, described["models"][model]), (method, described["methods"][method])
            ):
                found.setdefault((model, kind, row.method), {})[int(place)] = int(row.value)
    return [
        Order(
            *(model, kind, f"{PUBLISHED}: {method}", None),
            tuple(places[place] for place in sorted(places)),
            sorted(places.values()) == list(range(len(places))),
        )
        for (model, kind, method), places in found.items()
    ]


def shown(value: float | None) -> str:
    """Return a figure for a table."""
    return "" if value is None else f"{value:.2f}"


def print_tables(orders: Sequence[Order], compared: Sequence[Mapping[str, Any]]) -> None:
    """Print the orders, the agreement of seeds, and that of methods, as markdown."""
    print("| model | kind | method | seed | order of removal |")
    print("|---" * 5 + "|")
    for one in orders:
        listed = " ".join(map(str, one.blocks)) + ("" if one.complete else " ...")
        seed = "" if one.seed is None else one.seed
        print(f"| {one.model} | {one.kind} | {one.method} | {seed} | {listed} |")
    heads = ["spearman", *(f"overlap_{k}" for k in FIRST)]
    for model, kind in sorted({(one.model, one.kind) for one in orders}):
        within = [row for row in compared if (row["model"], row["kind"]) == (model, kind)]
        tables = {name: means(within, name) for name in heads}
        found = sorted({key for table in tables.values() for key in table})
        for title, chosen in (
            ("seeds of one method", [key for key in found if key[0] == key[1]]),
            ("methods at the same seed", [key for key in found if key[0] < key[1]]),
        ):
            if not chosen:
                continue
            print(f"\n{model}, {kind}: {title}; means over seeds\n")
            print("| method | method | " + " | ".join(heads) + " |")
            print("|---" * (2 + len(heads)) + "|")
            for key in chosen:
                figures = " | ".join(shown(tables[name].get(key)) for name in heads)
                print(f"| {key[0]} | {key[1]} | {figures} |")


def draw(orders: Sequence[Order], compared: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a heat map of rank correlations and of overlaps of the first six per model and kind.

    On the diagonal are the seeds of one method; a cell without a figure is white.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = sorted({(one.model, one.kind) for one in orders})
    longest = max(
        len({one.method for one in orders if (one.model, one.kind) == part}) for part in parts
    )
    size = 2.5 + 0.45 * longest
    figure, axes = plt.subplots(
        len(parts), 2, figsize=(2 * size + 1, size * len(parts)), squeeze=False
    )
    for line, (model, kind) in zip(axes, parts, strict=True):
        within = [row for row in compared if (row["model"], row["kind"]) == (model, kind)]
        ours = (one for one in orders if (one.model, one.kind) == (model, kind))
        names = list(dict.fromkeys(one.method for one in ours))
        for axis, (column, title, low) in zip(
            line,
            (("spearman", "Spearman", -1), (f"overlap_{FIRST[1]}", f"first {FIRST[1]} shared", 0)),
            strict=True,
        ):
            table = means(within, column)
            values = np.array([[table.get((a, b), np.nan) for b in names] for a in names])
            colours = "RdBu_r" if low else "viridis"
            image = axis.imshow(values, vmin=low, vmax=1, cmap=colours)
            for (y, x), value in np.ndenumerate(values):
                if np.isfinite(value):
                    axis.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7)
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            axis.set_yticks(range(len(names)), names, fontsize=7)
            axis.set_title(f"{model}, {kind}: {title}", fontsize=9)
            figure.colorbar(image, ax=axis, shrink=0.7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


@reporting_errors("study_orders")
def main(arguments: list[str] | None = None) -> int:
    """Print the tables; write them and the plot if asked to."""
    parser: argparse.ArgumentParser = experiment_parser(__doc__)
    parser.add_argument("--csv", type=Path, help="write every comparison here")
    parser.add_argument("--plot", type=Path, help="write a heat map here (.png, .pdf)")
    options = parser.parse_args(arguments)
    experiment = Experiment.load(options.experiment, options.catalogue)
    orders = study_orders(experiment)
    figures = load_published(options.catalogue / "published")
    orders += published_orders(figures, experiment.report(), orders)
    compared = rows(orders)
    print_tables(orders, compared)
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(compared)
    if options.plot:
        draw(orders, compared, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
