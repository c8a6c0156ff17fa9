"""Where two pruned models of one architecture differ in quality: swap their units place by place.

For every layer and kind of unit of which the plans keep different ones, in turn, the first plan
takes the second one's units there, and the second the first one's. Perplexity is that of the
unpruned model with the removed units set to zero, which is the pruned model's. A factor of 2 in the
first plan's column says that its perplexity doubles with the other's units in that place.

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
    from collections.abc import Iterator

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

    def take(self, plan: Plan | None, layer: int | None = None) -> None:
        """Let the model be that of a plan, or the unpruned one.

        Args:
            plan: None for the unpruned model.
            layer: the only one in which the plan differs from the last one; None if others do.
        """
        from prunelib.surgery import layer_of, zero_tensors

        state = self.model.state_dict()
        tensors = [
            (name, value)
            for name, value in self._dense.items()
            if layer is None or (layer_of(name, self.family.layer_prefix) or (None,))[0] == layer
        ]
        zeroed = tensors if plan is None else zero_tensors(tensors, self.family, self.config, plan)
        for name, value in zeroed:
            state[name].copy_(value)

    def perplexity(self) -> float:
        """Return the perplexity of what was taken last."""
        from prunelib.evaluation.perplexity import perplexity

        return perplexity(self.model, self.windows).perplexity


def swapped(plan: Plan, giver: Plan) -> Iterator[tuple[int, str, Plan]]:
    """Yield (layer, kind, the plan with the giver's units there) for all places that differ."""
    for index, (own, other) in enumerate(zip(plan.kept, giver.kept, strict=True)):
        if own is None or other is None:
            continue
        for kind in own:
            if own[kind] != other[kind]:
                kept = list(plan.kept)
                kept[index] = {**own, kind: other[kind]}
                yield index, kind, replace(plan, kept=tuple(kept))


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
    found: list[dict[tuple[int, str], float]] = []
    for plan, giver in ((first, second), (second, first)):
        masked.take(plan)
        own = masked.perplexity()
        print(f"ratio to the unpruned model's {dense:.2f}: {own / dense:.2f}")
        found.append({})
        for index, kind, mixed in swapped(plan, giver):
            masked.take(mixed, index)
            found[-1][index, kind] = masked.perplexity() / own
            masked.take(plan, index)
    rows = [(mine, found[1][place], *place) for place, mine in found[0].items()]
    print("\n| layer | kind | first with second's units | second with first's |\n|---|---|---|---|")
    rows.sort(key=lambda row: -max(abs(math.log(row[0])), abs(math.log(row[1]))))
    for mine, theirs, index, kind in rows[: options.most]:
        print(f"| {index} | {kind} | {mine:.3f} | {theirs:.3f} |")


if __name__ == "__main__":
    main()
