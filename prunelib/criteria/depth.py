"""Scores of blocks, or of their attention or MLP alone, from what their removal does.

All are arrays over layers; low scores go first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prunelib.criteria.fold import Array


def order_scores(order: Sequence[int], count: int) -> Array:
    """Return the place of every unit in an order of removal [count].

    Units that are not in the order come behind it, the first one last.

    Args:
        order: indices, what goes first at the front.
        count: number of units.
    """
    scores = np.arange(2 * count, count, -1, dtype=np.float64)
    scores[list(order)] = np.arange(len(order))
    return scores


def absent_minus_present(present: Array, values: Array) -> Array:
    """Return, per unit, the mean value of coalitions without it minus that of those with it [n].

    "A deeper look at depth pruning of LLMs" (arXiv 2407.16286) ranks by it, values being losses
    or distances. With all coalitions once it is the Banzhaf value of ``-values``; with every
    coalition that lacks one unit it orders units as their removal one at a time does.

    Args:
        present: whether a unit is in a coalition [m, n].
        values: of the coalitions, low where the model is good [m].

    Raises:
        ValueError: a unit is in all coalitions, or in none.
    """
    there = present.astype(bool).T
    if not (there.any(1) & ~there.all(1)).all():
        raise ValueError("every unit must be in some coalitions and absent from others")
    return np.array([values[~one].mean() - values[one].mean() for one in there])


def chain_marginals(present: Array, values: Array) -> Array:
    """Return the mean rise of the value when a unit leaves, along chains of coalitions [n].

    With all chains (all orders of leaving) it is the Shapley value of ``-values``; with random
    ones an unbiased estimate of it.

    Args:
        present: rows of ``n + 1`` coalitions each, from all units to none, one leaving at a time
            [chains * (n + 1), n].
        values: of the coalitions, low where the model is good [chains * (n + 1)].
    """
    count = present.shape[1]
    steps = present.astype(bool).reshape(-1, count + 1, count)
    left = np.nonzero(steps[:, :-1] & ~steps[:, 1:])[2].reshape(-1, count)
    rises = np.diff(values.reshape(-1, count + 1))
    scores = np.zeros(count)
    np.add.at(scores, left, rises)
    return scores / len(steps)
