"""Random scores: the control that every criterion has to beat at the same budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from prunelib.criteria.fold import Array
from prunelib.methods.base import Method, ScoringInputs


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Uniform random scores, one independent stream per kind and layer."""

    strategies: ClassVar[tuple[str, ...]] = ("block", "channel")
    seeded: ClassVar[bool] = True
    title: ClassVar[str] = "Random"
    citation: ClassVar[str] = ""

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return uniform [0, 1) scores that depend on the seed, the kind and the layer only."""
        return {
            name: [
                np.random.default_rng([inputs.seed, number, layer or 0]).random(
                    inputs.family.kind(inputs.config, name).count
                )
                for layer in inputs.places(name)
            ]
            for number, name in enumerate(self.kinds)
        }


METHOD = Random
