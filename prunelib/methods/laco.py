"""LaCo: merge later layers into an earlier one while the output stays alike (arXiv 2402.11187)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np

from prunelib.criteria.depth import order_scores
from prunelib.criteria.fold import Array
from prunelib.errors import InputError
from prunelib.methods.base import Method, ScoringInputs
from prunelib.rules import BASE, Rule

OPTIONS = ("layers_per_merge", "interval", "lowest", "highest", "threshold", "sentences")


@dataclass(frozen=True, kw_only=True)
class LaCo(Method):
    """Layers are merged by the paper's sum, ``W_l + sum_k (W_{l+k} - W_l)``.

    The paper's algorithm ends where no merge keeps the similarity above the threshold. Here a
    target says how many blocks go: its merges are followed in order, the last one as far as the
    target needs; more than the threshold allows are refused when the plan is made.

    Attributes:
        layers_per_merge: how many layers become one.
        interval: after a kept merge, how much lower the next one begins.
        lowest: the lowest layer that others are merged into.
        highest: the first merge begins ``layers_per_merge`` below it; None: the last layer.
        threshold: cosine of final hidden states that a merge must keep.
        sentences: of the calibration set, how many windows are looked at.
    """

    layers_per_merge: int = 7
    interval: int = 1
    lowest: int = 0
    highest: int | None = None
    threshold: float = 0.45
    sentences: int = 5

    statistics: ClassVar[tuple[str, ...]] = ("laco",)
    kinds: ClassVar[tuple[str, ...]] = ("block",)
    title: ClassVar[str] = "LaCo"
    citation: ClassVar[str] = """@inproceedings{yang2024laco,
  title = {{LaCo}: Large Language Model Pruning via Layer Collapse},
  author = {Yang, Yifei and Cao, Zouying and Zhao, Hai},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP},
  year = {2024}
}"""

    def __post_init__(self) -> None:
        if self.layers_per_merge < 2:
            raise InputError(f"layers_per_merge {self.layers_per_merge} given; from 2 allowed")
        for name in ("interval", "sentences"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} given; from 1 allowed")

    def rule(self) -> Rule:
        """Return that blocks are merged."""
        return replace(super().rule(), merge=True)

    @property
    def statistic_options(self) -> Mapping[str, Mapping[str, Any]]:
        """All of its own hyper-parameters."""
        return {"laco": {name: asdict(self)[name] for name in OPTIONS}}

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return every block's place in the order of merging, and the layer that it goes into."""
        found = inputs.statistics["laco"]
        order = found["order"].tolist()
        bases = np.full(inputs.layer_count, -1.0)
        bases[order] = found["bases"].numpy()
        return {"block": [order_scores(order, inputs.layer_count)], BASE: [bases]}


METHOD = LaCo
