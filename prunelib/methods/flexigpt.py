"""FlexiGPT: replace blocks by others with low-rank adapters of their own (arXiv 2501.14713)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from prunelib.criteria.fold import Array
from prunelib.errors import InputError
from prunelib.methods.base import ScoringInputs
from prunelib.methods.shortgpt import BlockInfluence
from prunelib.rules import DISTANCE, Rule, Sharer, rank_in

if TYPE_CHECKING:
    import torch

DISTANCES = ("truncated", "scaled", "nearest", "frobenius", "residual")
COMBINATIONS = ("sum", "squares")
CITATION = """@inproceedings{smith2025flexigpt,
  title = {{FlexiGPT}: Pruning and Extending Large Language Models with Low-Rank Weight Sharing},
  author = {Smith, James Seale and Lin, Chi-Heng and Tuli, Shikhar and Jeelani, Haris and
            Gao, Shangqian and Shen, Yilin and Jin, Hongxia and Hsu, Yen-Chang},
  booktitle = {Proceedings of NAACL},
  year = {2025}
}"""


@dataclass(frozen=True, kw_only=True)
class FlexiGpt(BlockInfluence):
    """Blocks with the least influence are replaced; their base is the nearest block that stays.

    Attributes:
        rank: of the adapters, and of the truncations in the distance: a number, or a share of the
            residual stream's width (the paper's 256 are 0.0625 of Llama-2-7B's).
        distance: ``truncated`` (the paper's), ``scaled`` (the same of matrices divided by their
            norm), ``residual`` (the same of matrices that are not truncated), ``frobenius`` (with
            no adapter either) or ``nearest`` (the number of blocks between).
        combination: of the matrices' distances to a block's: ``sum`` or ``squares``.
        normalise: whether outputs of attention and MLP are normalised in replaced blocks.
        gain: of normalised outputs, before training; the paper says that it is small.
        svd_init: whether adapters begin as the truncated difference to the removed block, or else
            at zero.
        seed: of randomised decompositions and of factors that begin at random.
    """

    rank: float = 256
    distance: str = "truncated"
    combination: str = "sum"
    normalise: bool = True
    gain: float = 0.1
    svd_init: bool = True
    seed: int = 0

    selection_fields: ClassVar[tuple[str, ...]] = (
        *BlockInfluence.selection_fields,
        "normalise",
        "gain",
        "svd_init",
    )
    title: ClassVar[str] = "FlexiGPT"
    citation: ClassVar[str] = CITATION

    def __post_init__(self) -> None:
        if self.distance not in DISTANCES:
            raise InputError(
                f"distance {self.distance!r} is unknown; allowed: {', '.join(DISTANCES)}"
            )
        if self.combination not in COMBINATIONS:
            raise InputError(
                f"combination {self.combination!r} is unknown; allowed: {', '.join(COMBINATIONS)}"
            )

    def rule(self) -> Rule:
        """Return how blocks are ranked and replaced."""
        gain = self.gain if self.normalise else None
        return replace(super().rule(), sharer=Sharer(self.rank, gain, self.svd_init, self.seed))

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return the influence of all blocks, and per block its distance to every other one."""
        distances = self._distances(inputs)
        return super().scores(inputs) | {DISTANCE: list(distances)}

    def _distances(self, inputs: ScoringInputs) -> Array:
        layers, family, config = inputs.layer_count, inputs.family, inputs.config
        if self.distance == "nearest":
            index = np.arange(layers, dtype=np.float64)
            nearest: Array = np.abs(index[:, None] - index)
            return nearest
        # Planning creates methods and knows no torch.
        from prunelib.criteria.block_distance import (
            combined,
            frobenius_distances,
            residual_distances,
            truncated_distances,
        )
        from prunelib.low_rank import seed_of

        rank = rank_in(self.rank, family, config)
        found = []
        for name, shape in family.layer_shapes(config).items():
            if len(shape) < 2:
                continue

            def matrix(layer: int, name: str = name) -> torch.Tensor:
                return inputs.weight(f"{family.layer_prefix}.{layer}.{name}")

            seed = seed_of(self.seed, name)
            if self.distance == "frobenius":
                found.append(frobenius_distances(matrix, layers))
            elif self.distance == "residual":
                found.append(residual_distances(matrix, layers, rank, seed=seed))
            else:
                scaled = self.distance == "scaled"
                found.append(truncated_distances(matrix, layers, rank, scaled=scaled, seed=seed))
        return combined(found, self.combination)


METHOD = FlexiGpt
