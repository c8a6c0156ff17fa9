"""Which bases FlexiGPT's distances choose, and whether they favour blocks of small weights.

Blocks go by their influence on calibration windows, one set per seed; distances know no data. Per
removed block the base under every distance, ``d`` between the two, and both norms: sums over a
block's matrices, of distances as of Frobenius norms. Below, per distance and set of removed blocks:
which bases there are, and Spearman's correlation of a candidate's distance with its norm, with the
norm of its matrices cut to the rank, and with the number of blocks between, each over the blocks
that stay, mean over the removed ones. Of a distance that favours small weights the correlation with
norms is high: the near ones are the small ones.

    python benchmarks/flexigpt_bases.py --blocks 9 12
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from artefacts import newest_artefact
from scoring import embedded

from prunelib.command import reporting_errors
from prunelib.reporting.stats import spearman

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from prunelib.criteria.fold import Array
    from prunelib.methods.base import ScoringInputs

DISTANCES = ("truncated", "frobenius", "scaled", "residual", "nearest")


def correlations(distances: Array, figures: Sequence[Array], removed: Sequence[int]) -> list[float]:
    """Return the correlation of distances with each figure, and with places.

    Of a removed block's distances to the blocks that stay; the mean over removed blocks.

    Args:
        distances: between all blocks [layers, layers].
        figures: of all blocks, [layers] each.
        removed: the blocks that go.
    """
    stay = np.array([j for j in range(len(distances)) if j not in set(removed)])
    found = [
        [spearman(distances[i][stay], own) for own in (*(f[stay] for f in figures), abs(stay - i))]
        for i in removed
    ]
    means: list[float] = np.mean(found, axis=0).tolist()
    return means


def block_norms(inputs: ScoringInputs, rank: int) -> tuple[Array, Array]:
    """Return sums of the Frobenius norms of a block's matrices, whole and cut to rank [layers]."""
    from prunelib.low_rank import truncated_svd

    family = inputs.family
    names = [name for name, shape in family.layer_shapes(inputs.config).items() if len(shape) > 1]
    whole, cut = np.zeros(inputs.layer_count), np.zeros(inputs.layer_count)
    for i in range(inputs.layer_count):
        for name in names:
            matrix = inputs.weight(f"{family.layer_prefix}.{i}.{name}")
            whole[i] += float(matrix.double().norm())
            cut[i] += float(truncated_svd(matrix, rank, 0).s.double().norm())
    return whole, cut


def influences(model: Path, text: Path, seeds: Sequence[int]) -> dict[int, torch.Tensor]:
    """Return the influence of all blocks on 10 x 128 calibration tokens, per seed [layers]."""
    from prunelib.families import family_of
    from prunelib.statistics import activations
    from prunelib.statistics.inputs import PassInputs

    found = {}
    for seed in seeds:
        loaded, config, windows = embedded(model, text, seed=seed)
        inputs = PassInputs(loaded, family_of(config), config, windows, len(windows))
        found[seed] = activations.collect(inputs)["block_influence"]
    return found


def report(options: argparse.Namespace) -> None:
    """Print both tables."""
    from prunelib.checkpoint import WeightReader, read_config
    from prunelib.families import family_of
    from prunelib.methods import create
    from prunelib.methods.base import ScoringInputs
    from prunelib.rules import DISTANCE, Target
    from prunelib.selection import select

    config = read_config(options.model)
    family = family_of(config)
    order = influences(options.model, options.text, options.seeds)
    reader = WeightReader(options.model)
    first = {"activations": {"block_influence": order[options.seeds[0]]}}
    inputs = ScoringInputs(family, config, reader, first, 0)
    norms, cut = block_norms(inputs, options.rank)
    methods = {
        name: create("flexigpt", {"rank": options.rank, "distance": name})
        for name in options.distances
    }
    scores = {name: method.scores(inputs) for name, method in methods.items()}

    def bases(name: str, seed: int, blocks: int) -> Mapping[int, int]:
        told = dict(scores[name]) | {"block": [order[seed].numpy()]}
        plan = select(told, family, config, Target("blocks", blocks), methods[name].rule(), {})
        assert plan.sharing is not None
        return {block.like: block.base for block in plan.sharing.blocks}

    for title, values in (("norms", norms), (f"norms at rank {options.rank}", cut)):
        print(f"{title}:", ", ".join(f"{i} {value:.1f}" for i, value in enumerate(values)))
    summary: list[str] = []
    for blocks in options.blocks:
        seen: dict[tuple[int, ...], list[int]] = {}
        for seed in options.seeds:
            seen.setdefault(tuple(bases(options.distances[0], seed, blocks)), []).append(seed)
        for removed, seeds in seen.items():
            where = f"{blocks} blocks, seeds {', '.join(map(str, seeds))}"
            print(f"\n{where}: base (norm of base, distance)\n")
            print(f"| block (norm) | {' | '.join(methods)} |\n|---" + "|---" * len(methods) + "|")
            chosen = {name: bases(name, seeds[0], blocks) for name in methods}
            for i in removed:
                cells = [
                    f"{base} ({norms[base]:.1f}, {scores[name][DISTANCE][i][base]:.2f})"
                    for name, base in ((name, chosen[name][i]) for name in methods)
                ]
                print(f"| {i} ({norms[i]:.1f}) | {' | '.join(cells)} |")
            for name in methods:
                with_figures = correlations(np.array(scores[name][DISTANCE]), (norms, cut), removed)
                times = Counter(chosen[name].values()).most_common()
                same = sum(chosen[name][i] == chosen[options.distances[0]][i] for i in removed)
                summary.append(
                    f"| {where} | {name} | {' | '.join(map('{:.2f}'.format, with_figures))} | "
                    f"{same} of {blocks} | "
                    + ", ".join(f"{base}: {count}" for base, count in times)
                    + " |"
                )
    print("\n| removed | distance | norm | norm at rank | place | as the first | times chosen |")
    print("|---" * 7 + "|")
    print("\n".join(summary))


@reporting_errors("flexigpt_bases")
def main(arguments: list[str] | None = None) -> int:
    """Print which bases are chosen, and what distances go with."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint directory")
    parser.add_argument("--text", type=Path, help="directory with articles.jsonl")
    parser.add_argument("--blocks", type=int, nargs="+", default=[9, 12], help="how many go")
    parser.add_argument("--distances", nargs="+", default=DISTANCES, choices=DISTANCES)
    parser.add_argument("--rank", type=int, default=32, help="of truncations and adapters")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    options.model = options.model or newest_artefact("fetch_model")
    options.text = options.text or newest_artefact("fetch_text")
    report(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
