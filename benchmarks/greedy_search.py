"""Greedy removal of blocks with cached prefixes and candidates given up, against the naive loop.

Both choose the blocks that SLEB would on the real model: the naive loop runs the model without the
candidate over all windows, for every candidate of every round; the pass begins with the hidden
states in front of the candidate and gives it up once its loss is above the best one's. They run in
turns, round after round, in one process; what counts is the ratio of the medians of their times,
wall and CPU. Choices must be the same.

    OMP_NUM_THREADS=1 python benchmarks/greedy_search.py   # on the newest fetched model and text
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artefacts import newest_artefact
from scoring import embedded

if TYPE_CHECKING:
    import torch

MOST = 0.65
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "CPU": time.process_time}


def naive_order(
    model: Any, windows: torch.Tensor, batch: int, candidates: Sequence[int], removals: int
) -> list[int]:
    """Return the blocks in the order of removal, every candidate tried in full."""
    import torch
    from torch.nn.functional import cross_entropy

    from prunelib.speculation.draft import Draft, DraftCache, Skipped

    def loss(gone: Sequence[int]) -> float:
        draft, total = Draft(model, Skipped(block=tuple(gone))), 0.0
        with torch.inference_mode(), draft.drafting(DraftCache()):
            for part in windows.split(batch):
                logits = model(input_ids=part, use_cache=False).logits[:, :-1]
                total += float(
                    cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
                )
        return total

    order: list[int] = []
    for _ in range(removals):
        best, lowest = -1, math.inf
        for index in (index for index in candidates if index not in order):
            found = loss([*order, index])
            if found < lowest:
                best, lowest = index, found
        order.append(best)
    return order


def ratio(ours: Sequence[float], naive: Sequence[float]) -> float:
    """Return the median of our times over that of the naive loop's."""
    return statistics.median(ours) / statistics.median(naive)


def verdict(orders: Sequence[tuple[list[int], list[int]]], share: float) -> list[tuple[str, bool]]:
    """Return what is claimed, and whether it holds.

    Args:
        orders: per round, ours and the naive loop's.
        share: of the naive loop's time.
    """
    return [
        ("the same choices in every round", all(ours == naive for ours, naive in orders)),
        (f"share of the naive loop's time: {share:.3f} <= {MOST}", share <= MOST),
    ]


def main() -> int:
    """Measure, print a verdict per claim; the exit code is 1 when one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint directory")
    parser.add_argument("--text", type=Path, help="directory with articles.jsonl")
    parser.add_argument("--windows", nargs=2, type=int, default=[4, 48], help="number, tokens")
    parser.add_argument("--batch", type=int, default=4, help="windows at a time")
    parser.add_argument("--removals", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.model = options.model or newest_artefact("fetch_model")
    options.text = options.text or newest_artefact("fetch_text")

    from prunelib.families import family_of
    from prunelib.statistics.greedy import greedy_order
    from prunelib.statistics.layerwise import Layers

    model, config, windows = embedded(options.model, options.text, *options.windows)
    layers = Layers(model, family_of(config))
    candidates = range(1, len(layers.modules) - 1)
    runs: dict[str, Callable[[], list[int]]] = {
        "naive": lambda: naive_order(model, windows, options.batch, candidates, options.removals),
        "ours": lambda: greedy_order(
            layers, layers.begin(windows, options.batch), "block", candidates, options.removals
        )[0],
    }
    seconds: dict[str, dict[str, list[float]]] = {c: {n: [] for n in runs} for c in CLOCKS}
    orders = []
    # A pass of each kind comes first: mapped weights are read then.
    naive_order(model, windows[:1, :8], 1, candidates[:1], 1)
    greedy_order(layers, layers.begin(windows[:1, :8], 1), "block", candidates[:1], 1)
    for number in range(options.repeats):
        found = {}
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            begin = {clock: read() for clock, read in CLOCKS.items()}
            found[name] = runs[name]()
            for clock, read in CLOCKS.items():
                seconds[clock][name].append(read() - begin[clock])
        orders.append((found["ours"], found["naive"]))
        shown = ", ".join(f"{name} {seconds['wall'][name][-1]:.2f} s" for name in runs)
        print(f"round {number}: {shown}; removed {found['ours']}", flush=True)
    shares = {clock: ratio(found["ours"], found["naive"]) for clock, found in seconds.items()}
    print(f"share of the naive loop's CPU time: {shares['CPU']:.3f}")
    claims = verdict(orders, shares["wall"])
    for text, holds in claims:
        print(f"{'pass' if holds else 'FAIL'}  {text}")
    if options.json:
        told = {"seconds": seconds, "shares": shares, "orders": orders}
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0 if all(holds for _, holds in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
