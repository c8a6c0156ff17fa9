"""Magnitude: the sum of |w| or w^2 over a unit's weights, no data needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunelib.criteria.fold import Array

if TYPE_CHECKING:
    import torch


def magnitude(weight: torch.Tensor, axis: int, order: int) -> Array:
    """Return the sum of ``|w|**order`` over all axes but ``axis``.

    The root is not taken, as in the public LLM-Pruner code; ranks of single members do not
    depend on it, sums over members do.

    Args:
        weight: one parameter, [rows, columns] or [rows].
        axis: the axis that units own.
        order: 1 or 2.
    """
    powers = weight.double().abs().pow(order)
    if powers.ndim == 2:
        powers = powers.sum(1 - axis)
    scores: Array = powers.numpy()
    return scores
