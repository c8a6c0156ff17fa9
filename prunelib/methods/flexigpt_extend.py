"""FlexiGPT's extension: a deeper model that repeats its own blocks (arXiv 2501.14713)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from prunelib.criteria.fold import Array
from prunelib.methods.base import Method, ScoringInputs
from prunelib.methods.flexigpt import CITATION
from prunelib.rules import Repeat, Rule, Sharer


@dataclass(frozen=True, kw_only=True)
class FlexiGptExtend(Method):
    """Blocks ``start`` to ``end`` are repeated with their own weights, until a target of layers.

    Every repetition has adapters that begin at zero and, unless ``normalise`` is off, normalised
    outputs of attention and MLP.

    Attributes:
        start: first block that is repeated, from 0.
        end: last block that is repeated.
        order: ``block`` (a a b b c c) or ``sequential`` (a b c a b c).
        rank: of the adapters: a number, or a share of the residual stream's width.
        normalise: whether outputs of attention and MLP are normalised in repetitions.
        gain: of normalised outputs, before training.
        seed: of the factors that begin at random.
    """

    start: int = 3
    end: int = 18
    order: str = "block"
    rank: float = 256
    normalise: bool = True
    gain: float = 0.1
    seed: int = 0

    kinds: ClassVar[tuple[str, ...]] = ("block",)
    title: ClassVar[str] = "FlexiGPT (extension)"
    citation: ClassVar[str] = CITATION

    def rule(self) -> Rule:
        """Return what is repeated."""
        gain = self.gain if self.normalise else None
        return replace(
            super().rule(),
            sharer=Sharer(self.rank, gain, svd=False, seed=self.seed),
            repeat=Repeat(self.start, self.end, self.order),
        )

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return zeros: nothing is removed, and the range says what is repeated."""
        return {"block": [np.zeros(inputs.layer_count)]}


METHOD = FlexiGptExtend
