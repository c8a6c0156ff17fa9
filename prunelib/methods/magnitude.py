"""Grouped weight magnitude, the data-free baseline of the LLM-Pruner paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prunelib.criteria.fold import Array, sum_over_members
from prunelib.criteria.magnitude import magnitude
from prunelib.errors import InputError
from prunelib.methods.base import Method, ScoringInputs, score_members

if TYPE_CHECKING:
    from prunelib.families.base import UnitSlice


@dataclass(frozen=True, kw_only=True)
class Magnitude(Method):
    """Sum of |w|^p over all weights of a unit.

    Attributes:
        order: p, 1 or 2.
    """

    order: int = 2

    strategies: ClassVar[tuple[str, ...]] = ("block", "channel")
    title: ClassVar[str] = "Magnitude"
    citation: ClassVar[str] = """@inproceedings{li2017pruning,
  title = {Pruning Filters for Efficient ConvNets},
  author = {Li, Hao and Kadav, Asim and Durdanovic, Igor and Samet, Hanan and Graf, Hans Peter},
  booktitle = {International Conference on Learning Representations},
  year = {2017}
}"""

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise InputError(f"method magnitude: order {self.order} given; 1 and 2 allowed")

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return the magnitudes of all units, read tensor by tensor from the checkpoint."""

        def member(layer: int | None, part: UnitSlice) -> Array:
            return magnitude(inputs.weight(inputs.full_name(layer, part)), part.axis, self.order)

        return score_members(inputs, self.kinds, member, sum_over_members)


METHOD = Magnitude
