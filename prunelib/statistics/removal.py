"""Forward passes: the loss of the model without one block, attention or MLP at a time.

* ``loss`` []: the mean next-token loss of the unpruned model, nats, fp64;
* ``loss_without`` [layers], fp64: of the model without that unit alone (Shortened LLaMA, arXiv
  2402.02834, whose perplexity is its exponential).

Removing unit ``i`` changes nothing in front of layer ``i``: every candidate begins with the hidden
states that the unpruned model has there, which is half of the blocks' work. Hidden states of two
places of the model are all that is held.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from prunelib.statistics.batches import progress
from prunelib.statistics.layerwise import Layers, Stream
from prunelib.statistics.without import check_unit, loss_without, targets_of

if TYPE_CHECKING:
    from prunelib.statistics.inputs import PassInputs

logger = logging.getLogger(__name__)


def collect(
    inputs: PassInputs,
    *,
    part: str,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Return the statistics above, on the CPU.

    Args:
        inputs: model and windows.
        part: ``block``, ``attention`` or ``mlp``.
        seed: not used; nothing here is random.

    Raises:
        InputError: the part is unknown, or cannot be removed alone in this architecture.
        NonFiniteError: a loss is NaN or infinite.
    """
    check_unit(inputs.family, inputs.config, part)
    layers = Layers(inputs.model, inputs.family)
    losses, loss = one_at_a_time(layers, layers.begin(inputs.windows, inputs.batch_windows), part)
    return {
        "loss": torch.tensor(loss, dtype=torch.float64),
        "loss_without": torch.tensor(losses, dtype=torch.float64),
    }


def one_at_a_time(layers: Layers, stream: Stream, part: str) -> tuple[list[float], float]:
    """Return the mean loss without each unit, and with all of them.

    Args:
        layers: of the model.
        stream: in front of the first layer; behind the last one afterwards.
        part: ``block``, ``attention`` or ``mlp``.
    """
    targets, count = targets_of(stream), len(layers.modules)
    losses = []
    for index, layer in progress(layers.sweep(), count, "candidates", logger):
        losses.append(loss_without(layers, stream, part, (index,), index) / targets)
        layers.advance(index, layer, stream)
    return losses, loss_without(layers, stream, part, (), count) / targets
