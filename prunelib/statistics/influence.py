"""Forward passes: influence of blocks, or of their attention or MLP alone, also greedily.

``I = 1 - E cos(X, Y)`` over all tokens, X being the residual stream before the part and Y behind it
(ShortGPT, arXiv 2403.03853, equation 1; for the parts of a block the same, as in its section on
redundancy by module). Tokens are normalised in fp32 before their product. The last block is
measured at its own output, not behind the final norm.

* ``influence`` [layers], fp64: of the unpruned model;
* with ``recompute`` also ``order`` [layers], int64: what goes first, second, and so on, each one
  being the least influential of those that are left in the model without those before it; and
  ``influence_when_removed`` [layers], fp64, in the same order.

All windows go through a layer before the next; in between, hidden states are all that is held.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from prunelib.errors import NonFiniteError
from prunelib.statistics.activations import block_cosines
from prunelib.statistics.batches import progress
from prunelib.statistics.layerwise import Layers, Stream
from prunelib.statistics.without import advance, check_unit, through

if TYPE_CHECKING:
    from prunelib.statistics.inputs import PassInputs

logger = logging.getLogger(__name__)


def collect(
    inputs: PassInputs,
    *,
    part: str,
    recompute: bool,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Return the statistics above, on the CPU.

    Args:
        inputs: model and windows.
        part: ``block``, ``attention`` or ``mlp``.
        recompute: whether to go on greedily, in as many passes as there are layers.
        seed: not used; nothing here is random.

    Raises:
        InputError: the part is unknown, or cannot be removed alone in this architecture.
        NonFiniteError: a hidden state is NaN or infinite; names the layer.
    """
    check_unit(inputs.family, inputs.config, part)
    layers = Layers(inputs.model, inputs.family)
    start = layers.begin(inputs.windows, inputs.batch_windows)
    count = len(layers.modules)
    first = _influences(layers, start, part, frozenset())
    result = {"influence": torch.tensor([first[i] for i in range(count)], dtype=torch.float64)}
    if not recompute:
        return result
    order, values = [], []
    left = first
    for _ in progress(range(count), count, "removals", logger):
        worst = min(left, key=lambda i: (left[i], i))
        order.append(worst)
        values.append(left[worst])
        if len(order) < count:
            left = _influences(layers, start, part, frozenset(order))
    result["order"] = torch.tensor(order)
    result["influence_when_removed"] = torch.tensor(values, dtype=torch.float64)
    return result


def _influences(
    layers: Layers, start: Stream, part: str, gone: Collection[int]
) -> dict[int, float]:
    """Return the influence of every part that is left, by layer."""
    stream = start.branch()
    tokens = sum(ids.numel() for ids in stream.parts)
    found: dict[int, float] = {}
    for index, layer in layers.sweep():
        if index in gone:
            advance(layers, stream, part, gone, index, index + 1)
            continue
        cosine = 0.0
        for x, y in zip(*through(layers, index, layer, stream)[part], strict=True):
            # Some architectures run the MLP on all tokens in one row.
            flat = y.to(x.device).reshape(-1, y.shape[-1])
            cosine += float(block_cosines(x.reshape(-1, x.shape[-1]), flat))
        found[index] = 1 - cosine / tokens
        if not math.isfinite(found[index]):
            raise NonFiniteError(f"influence: hidden states at layer {index} are not finite")
    return found
