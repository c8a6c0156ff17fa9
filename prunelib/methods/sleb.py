"""SLEB: greedily remove the block that the remaining model needs least (arXiv 2402.09025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from prunelib.criteria.depth import order_scores
from prunelib.criteria.fold import Array
from prunelib.methods.base import DepthMethod, ScoringInputs
from prunelib.rules import Rule


@dataclass(frozen=True, kw_only=True)
class Sleb(DepthMethod):
    """Remove the block without which the model that is left has the lowest loss; repeat.

    Attributes:
        keep_first: first blocks that stay.
        keep_last: last blocks that stay.
        most: the share of all blocks that the search goes up to; its cost grows with it, and
            targets beyond it are refused.
    """

    keep_first: int = 1
    keep_last: int = 1
    most: float = 0.5

    statistics: ClassVar[tuple[str, ...]] = ("greedy",)
    title: ClassVar[str] = "SLEB"
    citation: ClassVar[str] = """@inproceedings{song2024sleb,
  title = {{SLEB}: Streamlining {LLM}s through Redundancy Verification and Elimination of
           Transformer Blocks},
  author = {Song, Jiwon and Oh, Kyungseok and Kim, Taesu and Kim, Hyungjun and Kim, Yulhwa and
            Kim, Jae-Joon},
  booktitle = {International Conference on Machine Learning},
  year = {2024}
}"""

    def rule(self) -> Rule:
        """Return what stays, and how far the search goes."""
        return replace(super().rule(), most=self.most)

    @property
    def statistic_options(self) -> Mapping[str, Mapping[str, Any]]:
        """What is removed, how far, and what stays."""
        return {
            "greedy": {
                "part": self.remove,
                "most": self.most,
                "keep_first": self.keep_first,
                "keep_last": self.keep_last,
            }
        }

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return the place of every block in the order of removal."""
        order = inputs.statistics["greedy"]["order"].tolist()
        return {self.remove: [order_scores(order, inputs.layer_count)]}


METHOD = Sleb
