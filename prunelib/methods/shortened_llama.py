"""Shortened LLaMA: remove blocks at once, by perplexity or Taylor's expansion (2402.02834)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from prunelib.criteria.fold import Array
from prunelib.errors import InputError
from prunelib.methods.base import DepthMethod, ScoringInputs

CRITERIA = ("perplexity", "taylor")


@dataclass(frozen=True, kw_only=True)
class ShortenedLlama(DepthMethod):
    """The blocks with the lowest scores go, all at once.

    Attributes:
        criterion: ``perplexity`` of the model without the block, or ``taylor``, the sum of
            ``|w g|`` over the block's parameters with gradients g of the mean loss.
        keep_first: first blocks that stay: without that Taylor scores remove block 0 first.
        keep_last: last blocks that stay.
    """

    criterion: str = "perplexity"
    keep_first: int = 4
    keep_last: int = 2

    selection_fields: ClassVar[tuple[str, ...]] = (
        *DepthMethod.selection_fields,
        "keep_first",
        "keep_last",
    )
    title: ClassVar[str] = "Shortened LLaMA"
    citation: ClassVar[str] = """@article{kim2024shortened,
  title = {Shortened {LLaMA}: Depth Pruning for Large Language Models with Comparison of
           Retraining Methods},
  author = {Kim, Bo-Kyeong and Kim, Geonmin and Kim, Tae-Ho and Castells, Thibault and
            Choi, Shinkook and Shin, Junho and Song, Hyoung-Kyu},
  journal = {arXiv preprint arXiv:2402.02834},
  year = {2024}
}"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion not in CRITERIA:
            raise InputError(
                f"criterion {self.criterion!r} is unknown; allowed: {', '.join(CRITERIA)}"
            )

    @property
    def statistics(self) -> tuple[str, ...]:
        """The one pass that the criterion reads."""
        return ("removal",) if self.criterion == "perplexity" else ("gradients",)

    @property
    def statistic_options(self) -> Mapping[str, Mapping[str, Any]]:
        """What is removed."""
        return {"removal": {"part": self.remove}}

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return the perplexity without every block, or its Taylor score, one array [layers]."""
        if self.criterion == "perplexity":
            found = np.exp(inputs.statistics["removal"]["loss_without"].numpy())
        else:
            found = self._taylor(inputs)
        return {self.remove: [found]}

    def _taylor(self, inputs: ScoringInputs) -> Array:
        products = inputs.statistics["gradients"]
        family = inputs.family
        names = [
            name
            for name in family.layer_shapes(inputs.config)
            if self.remove in ("block", family.part_of(name))
        ]
        return np.array(
            [
                sum(float(products[f"{layer}.{name}.abs.rows"].double().sum()) for name in names)
                for layer in range(inputs.layer_count)
            ]
        )


METHOD = ShortenedLlama
