"""Random blocks, attentions or MLPs: the control of methods that remove these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from prunelib.criteria.fold import Array
from prunelib.methods.base import DepthMethod, ScoringInputs
from prunelib.plan import DEPTH_KINDS


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(DepthMethod):
    """Uniform random scores, one independent stream per kind."""

    seeded: ClassVar[bool] = True
    title: ClassVar[str] = "Random (blocks)"
    citation: ClassVar[str] = ""

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return uniform [0, 1) scores that depend on the seed and the kind only."""
        rng = np.random.default_rng([inputs.seed, DEPTH_KINDS.index(self.remove)])
        return {self.remove: [rng.random(inputs.layer_count)]}


METHOD = RandomBlocks
