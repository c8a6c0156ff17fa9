"""Fold scores of single rows and columns onto the units that own them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from prunelib.families.base import UnitKind, UnitSlice

Array = npt.NDArray[np.float64]


def fold(values: Array, owner: npt.NDArray[np.int64], units: int) -> Array:
    """Sum ``values`` [positions] over the positions that each unit owns; returns [units].

    With grouped-query attention the owner array of the query rows maps head ``h`` to kv group
    ``h // (heads / kv heads)``. (The public LLM-Pruner code credits head ``h`` to kv head
    ``h mod kv heads``, which mixes the groups up.)
    """
    return np.bincount(owner, weights=values, minlength=units).astype(np.float64)


def sum_over_members(kind: UnitKind, member: Callable[[UnitSlice], Array]) -> Array:
    """Return the sum over a unit's members (LLM-Pruner's default aggregation); [units].

    Args:
        kind: the unit kind with its slices.
        member: score of every position of one slice, [positions].
    """
    total = np.zeros(kind.count)
    for part in kind.slices:
        total += fold(member(part), part.owner, kind.count)
    return total
