"""Fold scores of single rows and columns onto the units that own them, and combine members."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from prunelib.families.base import UnitKind, UnitSlice

Array = npt.NDArray[np.float64]

# How the scores of a unit's members [members, units] become one per unit [units].
AGGREGATIONS: Mapping[str, Callable[[Array], Array]] = {
    "sum": lambda scores: np.sum(scores, axis=0),
    "mean": lambda scores: np.mean(scores, axis=0),
    "product": lambda scores: np.prod(scores, axis=0),
    "max": lambda scores: np.max(scores, axis=0),
    "last": lambda scores: scores[-1],
}


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


def members(kind: UnitKind) -> list[tuple[UnitSlice, ...]]:
    """Return the members of a unit in the order of their execution.

    A member is one axis of one module: the rows of a linear map together with their biases, or its
    columns. Were a bias a member of its own, one that is zero would make every product zero.
    """

    def module(part: UnitSlice) -> tuple[str, int]:
        return part.parameter.rpartition(".")[0], part.axis

    return [tuple(parts) for _, parts in groupby(kind.slices, module)]


def aggregate(kind: UnitKind, member: Callable[[UnitSlice], Array], how: str) -> Array:
    """Return one score per unit [units] out of those of its members.

    First every member is folded to one score per unit, then the members are combined: the group
    importance of LLM-Pruner (arXiv 2305.11627, section 3.2), whose terms are whole structures. Its
    public code combines members position by position and sums a head's positions afterwards;
    that is the same for sum, mean and last, but a product or maximum there depends on how the
    positions of different members are paired.

    Args:
        kind: the unit kind with its slices.
        member: score of every position of one slice, [positions]. Those of a module's weight and
            bias are added before the absolute value, so signed ones may be given.
        how: a key of ``AGGREGATIONS``.
    """
    folded = [
        fold(np.abs(np.sum([member(part) for part in parts], axis=0)), parts[0].owner, kind.count)
        for parts in members(kind)
    ]
    return AGGREGATIONS[how](np.stack(folded))


def library_attribution(kind: UnitKind) -> UnitKind:
    """Return ``kind`` with owners as LLM-Pruner's public code credits scores.

    It adds position ``c`` of a longer member to position ``c mod n`` of the shortest, of length
    ``n``: query head ``h`` counts for kv head ``h mod kv heads``, whatever kv head it attends to.
    Only for comparison with that code, and for scores alone: removing these positions together
    would mix heads up.
    """
    shortest = min((part.owner for part in kind.slices), key=len)
    return replace(
        kind,
        slices=tuple(
            replace(part, owner=shortest[np.arange(len(part.owner)) % len(shortest)])
            for part in kind.slices
        ),
    )
