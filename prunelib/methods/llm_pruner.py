"""LLM-Pruner: gradient importance of dependency groups (arXiv 2305.11627)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prunelib.criteria.fold import Array, sum_over_members
from prunelib.errors import InputError
from prunelib.methods.base import Method, ScoringInputs, score_members

if TYPE_CHECKING:
    from prunelib.families.base import UnitSlice

CRITERIA = ("element1",)


@dataclass(frozen=True, kw_only=True)
class LlmPruner(Method):
    """Block-wise LLM-Pruner with the sum over group members as aggregation.

    Attributes:
        criterion: ``element1``, the element-wise first order ``sum_k |g_k w_k|`` (section 3.2).
    """

    criterion: str = "element1"

    statistics: ClassVar[tuple[str, ...]] = ("gradients",)
    title: ClassVar[str] = "LLM-Pruner"
    citation: ClassVar[str] = """@inproceedings{ma2023llmpruner,
  title = {{LLM-Pruner}: On the Structural Pruning of Large Language Models},
  author = {Ma, Xinyin and Fang, Gongfan and Wang, Xinchao},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023}
}"""

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise InputError(
                f"method llm_pruner: criterion {self.criterion!r} is unknown; "
                f"allowed: {', '.join(CRITERIA)}"
            )

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return the summed first-order importance of all units."""
        gradients = inputs.statistics["gradients"]

        def member(layer: int, part: UnitSlice) -> Array:
            axis = "columns" if part.axis == 1 else "rows"
            scores: Array = gradients[f"{layer}.{part.parameter}.abs.{axis}"].double().numpy()
            return scores

        return score_members(inputs, self.kinds, member, sum_over_members)


METHOD = LlmPruner
