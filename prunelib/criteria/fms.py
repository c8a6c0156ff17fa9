"""Feature-map sensitivity (MINI-LLM, arXiv 2407.11681, equation 9), from reduced statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from prunelib.criteria.fold import Array, aggregate, members

if TYPE_CHECKING:
    import torch

    from prunelib.families.base import UnitKind, UnitSlice


def fms_scores(
    statistics: Mapping[str, torch.Tensor], layer: int | None, kind: UnitKind, aggregation: str
) -> Array:
    """Return ``sum |W g| ||X||`` over the weights of every unit, float64 [units].

    Args:
        statistics: ``<layer>.<parameter>.fms.rows`` and ``.fms.columns``.
        layer: the units' layer.
        kind: the unit kind with its slices.
        aggregation: how members are combined, see ``prunelib.criteria.fold.aggregate``; ``last``
            looks at no other member's statistics.
    """

    def member(part: UnitSlice) -> Array:
        axis = "columns" if part.axis == 1 else "rows"
        scores: Array = statistics[f"{layer}.{part.parameter}.fms.{axis}"].double().numpy()
        return scores

    if aggregation == "last":
        kind = replace(kind, slices=members(kind)[-1])
    return aggregate(kind, member, aggregation)


def gate_scores(derivative: torch.Tensor, norm: torch.Tensor | None) -> Array:
    """Return ``|dL/da|``, or ``|dL/da| ||X||``, of the factor a on every unit; float64 [units].

    ``dL/da`` is the signed sum of ``W g`` over the unit's input columns of the output or down
    projection: how the loss changes, to first order, when the unit is removed. So it is a
    vector-wise score like LLM-Pruner's, of whole units, where ``fms_scores`` sums absolute values.

    Args:
        derivative: [units].
        norm: of the unit's features there, [units]; None leaves it out.
    """
    scores = derivative.double().abs()
    if norm is not None:
        scores = scores * norm.double()
    array: Array = scores.numpy()
    return array
