"""Forward passes: which block, attention or MLP goes first, second, and so on, by the loss.

Each time it is the one without which the model that is left has the lowest loss, the first of
equals (SLEB, arXiv 2402.09025, algorithm 1).

* ``order`` [removals], int64: layers in the order of removal;
* ``loss_when_removed`` [removals], fp64: the mean next-token loss of what is then left, nats.

Candidates of a round are tried from the first layer on, and each begins with the hidden states that
the model which is left has there: half of the blocks' work. What lies in front of all candidates
is computed once for all rounds. A candidate is given up after the batch that brings its loss above
the best one's. The choices are those of trying every candidate in full. Hidden states of three
places of the model are all that is held.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from prunelib.statistics.batches import progress
from prunelib.statistics.layerwise import Layers, Stream
from prunelib.statistics.without import advance, check_unit, loss_without, targets_of

if TYPE_CHECKING:
    from prunelib.statistics.inputs import PassInputs

logger = logging.getLogger(__name__)


def collect(
    inputs: PassInputs,
    *,
    part: str,
    most: float,
    keep_first: int,
    keep_last: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Return the statistics above, on the CPU.

    With smaller batches of windows candidates are given up sooner.

    Args:
        inputs: model and windows.
        part: ``block``, ``attention`` or ``mlp``.
        most: the share of all layers that is removed, rounded down.
        keep_first: first layers that stay.
        keep_last: last layers that stay.
        seed: not used; nothing here is random.

    Raises:
        InputError: the part is unknown, or cannot be removed alone in this architecture.
        NonFiniteError: a loss is NaN or infinite.
    """
    check_unit(inputs.family, inputs.config, part)
    layers = Layers(inputs.model, inputs.family)
    candidates = range(len(layers.modules))[keep_first : len(layers.modules) - keep_last]
    removals = min(math.floor(most * len(layers.modules)), len(candidates))
    stream = layers.begin(inputs.windows, inputs.batch_windows)
    order, losses = greedy_order(layers, stream, part, candidates, removals)
    return {
        "order": torch.tensor(order, dtype=torch.int64),
        "loss_when_removed": torch.tensor(losses, dtype=torch.float64),
    }


def greedy_order(
    layers: Layers, stream: Stream, part: str, candidates: Sequence[int], removals: int
) -> tuple[list[int], list[float]]:
    """Return the layers in the order of removal, and the mean loss after each removal.

    Args:
        layers: of the model.
        stream: in front of the first layer; consumed.
        part: ``block``, ``attention`` or ``mlp``.
        candidates: increasing layer indices.
        removals: how many of them go.
    """
    targets, place = targets_of(stream), 0
    order: list[int] = []
    losses: list[float] = []
    for _ in progress(range(removals), removals, "removals", logger):
        left = [index for index in candidates if index not in order]
        # Nothing in front of the first candidate changes any more.
        advance(layers, stream, part, order, place, left[0])
        place = left[0]
        chosen, loss = _best(layers, stream.branch(), part, order, left)
        order.append(chosen)
        losses.append(loss / targets)
    return order, losses


def _best(
    layers: Layers, stream: Stream, part: str, gone: Sequence[int], left: Sequence[int]
) -> tuple[int, float]:
    """Return the layer without which the summed loss is lowest, and that loss.

    Args:
        layers: of the model.
        stream: in front of the first candidate; consumed.
        part: ``block``, ``attention`` or ``mlp``.
        gone: layers that lack the part already.
        left: candidates, increasing.
    """
    best, lowest, place = left[0], math.inf, left[0]
    for index in left:
        advance(layers, stream, part, gone, place, index)
        place = index
        loss = loss_without(layers, stream, part, {*gone, index}, index, most=lowest)
        if loss < lowest:
            best, lowest = index, loss
    return best, lowest
