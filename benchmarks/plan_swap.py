"""Where two pruned models of one architecture differ in quality: swap their units place by place.

For every layer and kind of unit of which the plans keep different ones, in turn, the first plan
takes the second one's units there, and the second the first one's. Perplexity is that of the
unpruned model with the removed units set to zero, which is the pruned model's. A factor of 2 in the
first plan's column says that its perplexity doubles with the other's units in that place. At the
end, all places of a kind at once, and those of ``--layers``.

    python benchmarks/plan_swap.py results/prune/.../<key> results/prune/.../<key> --windows 8
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from artefacts import newest_artefact

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

    import torch

    from prunelib.plan import Plan


class Masked:
    """Perplexities of one model with different units set to zero."""

    def __init__(self, model: Path, text: Path, windows: int) -> None:
        from prunelib.checkpoint import load_model, read_config
        from prunelib.data.calibration import evaluation_ids
        from prunelib.data.text import read_articles
        from prunelib.data.tokenizer import load_tokenizer
        from prunelib.evaluation.perplexity import cut_windows
        from prunelib.families import family_of

        self.config = read_config(model)
        self.family = family_of(self.config)
        self.model = load_model(model)
        ids = evaluation_ids(read_articles(text, "evaluation"), load_tokenizer(model))
        self.windows: torch.Tensor = cut_windows(ids, 128, windows)
        self._dense = {k: v.clone() for k, v in self.model.state_dict().items()}

    def take(self, plan: Plan | None, layers: Container[int] | None = None) -> None:
        """Let the model be that of a plan, or the unpruned one.

        Args:
            plan: None for the unpruned model.
            layers: those in which the plan may differ from the last one; None for anywhere.
        """
        from prunelib.surgery import zero_tensors

        state = self.model.state_dict()
        tensors = [
            (name, value)
            for name, value in self._dense.items()
            if layers is None or self._layer(name) in layers
        ]
        zeroed = tensors if plan is None else zero_tensors(tensors, self.family, self.config, plan)
        for name, value in zeroed:
            state[name].copy_(value)

    def _layer(self, name: str) -> int | None:
        from prunelib.surgery import layer_of

        place = layer_of(name, self.family.layer_prefix)
        return None if place is None else place[0]

    def perplexity(self) -> float:
        """Return the perplexity of what was taken last."""
        from prunelib.evaluation.perplexity import perplexity

        return perplexity(self.model, self.windows).perplexity


def places(first: Plan, second: Plan, layers: Sequence[int]) -> Iterator[tuple[str, str, set[int]]]:
    """Yield (label, kind, layers) of what is swapped: each layer that differs, then many."""
    pairs = list(enumerate(zip(first.kept, second.kept, strict=True)))
    for kind in first.units:
        differ = [i for i, (one, two) in pairs if one and two and one.get(kind) != two.get(kind)]
        for index in differ:
            yield str(index), kind, {index}
        if layers and differ:
            yield " ".join(map(str, layers)), kind, set(layers)
        if differ:
            yield "all", kind, set(differ)


def swapped(plan: Plan, giver: Plan, kind: str, layers: Container[int]) -> Plan:
    """Return the plan with the giver's units of one kind in these layers."""
    kept = tuple(
        {**own, kind: other[kind]} if own and other and kind in own and index in layers else own
        for index, (own, other) in enumerate(zip(plan.kept, giver.kept, strict=True))
    )
    return replace(plan, kept=kept)


def main() -> None:
    """Print the places whose swap changes most."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path, help="directory of a pruned checkpoint")
    parser.add_argument("second", type=Path, help="directory of another one")
    parser.add_argument("--model", type=Path, help="the unpruned model")
    parser.add_argument("--text", type=Path, help="the evaluation text")
    parser.add_argument("--windows", type=int, default=8, help="windows of 128 tokens")
    parser.add_argument("--layers", nargs="+", type=int, default=[], help="swapped together, too")
    parser.add_argument("--most", type=int, default=8, help="places that are printed")
    options = parser.parse_args()

    from prunelib.checkpoint import read_plan

    first, second = read_plan(options.first), read_plan(options.second)
    masked = Masked(
        options.model or newest_artefact("fetch_model"),
        options.text or newest_artefact("fetch_text"),
        options.windows,
    )
    dense = masked.perplexity()
    rows = [(place, [0.0, 0.0]) for place in places(first, second, options.layers)]
    for number, (plan, giver) in enumerate(((first, second), (second, first))):
        masked.take(plan)
        own = masked.perplexity()
        print(f"ratio to the unpruned model's {dense:.2f}: {own / dense:.2f}")
        for (_, kind, layers), factors in rows:
            masked.take(swapped(plan, giver, kind, layers), layers)
            factors[number] = masked.perplexity() / own
            masked.take(plan, layers)
    print("\n| layer | kind | first with second's units | second with first's |\n|---|---|---|---|")
    single = [row for row in rows if len(row[0][2]) == 1]
    single.sort(key=lambda row: -max(abs(math.log(factor)) for factor in row[1]))
    shown = single[: options.most] + [row for row in rows if len(row[0][2]) > 1]
    for (label, kind, _), (mine, theirs) in shown:
        print(f"| {label} | {kind} | {mine:.3f} | {theirs:.3f} |")


if __name__ == "__main__":
    main()
