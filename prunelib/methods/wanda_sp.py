"""Wanda-sp: the structured form of Wanda that FLAP compares with (arXiv 2312.11983).

Scores are taken from one pass through the unpruned model; FLAP's code runs the later layers on
the outputs of already pruned ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prunelib.criteria.fold import Array, fold
from prunelib.criteria.wanda import wanda_columns
from prunelib.methods.base import Method, ScoringInputs, score_members

if TYPE_CHECKING:
    from collections.abc import Callable

    from prunelib.families.base import UnitKind, UnitSlice


def _input_columns(kind: UnitKind, member: Callable[[UnitSlice], Array]) -> Array:
    """Score a unit by its input columns alone: the output and down projections."""
    (part,) = (part for part in kind.slices if part.axis == 1)
    return fold(member(part), part.owner, kind.count)


@dataclass(frozen=True, kw_only=True)
class WandaSp(Method):
    """Mean over output rows of |W| ||X|| on the inputs of the output and down projections.

    A head is the sum of its columns, a kv group the sum of its heads.
    """

    statistics: ClassVar[tuple[str, ...]] = ("activations",)
    title: ClassVar[str] = "Wanda-sp"
    citation: ClassVar[str] = """@inproceedings{sun2024wanda,
  title = {A Simple and Effective Pruning Approach for Large Language Models},
  author = {Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico},
  booktitle = {International Conference on Learning Representations},
  year = {2024}
}

@inproceedings{an2024flap,
  title = {Fluctuation-Based Adaptive Structured Pruning for Large Language Models},
  author = {An, Yongqi and Zhao, Xu and Yu, Tao and Tang, Ming and Wang, Jinqiao},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year = {2024}
}"""

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return Wanda-sp scores of all units."""
        activations = inputs.statistics["activations"]

        def member(layer: int | None, part: UnitSlice) -> Array:
            module = part.parameter.rpartition(".")[0]
            norm = activations[f"{layer}.{module}.sum_squares"].sqrt()
            return wanda_columns(inputs.weight(inputs.full_name(layer, part)), norm)

        return score_members(inputs, self.kinds, member, _input_columns)


METHOD = WandaSp
