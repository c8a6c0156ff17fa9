"""One forward pass: how much every block, attention and MLP changes the residual stream.

With X in front of a unit and Y behind it, means over all tokens ("A deeper look at depth pruning
of LLMs", arXiv 2407.16286), ``<unit>`` being ``block``, ``attention`` or ``mlp``:

* ``<unit>.cosine`` [layers], fp64: ``1 - cos(X, Y)``;
* ``<unit>.relative_l1`` and ``<unit>.relative_l2`` [layers], fp64: ``||Y - X||_p / ||X||_p``.

An architecture whose blocks normalise the residual stream has those of blocks alone. All windows go
through a layer before the next; in between, hidden states are all that is held.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from prunelib.errors import NonFiniteError
from prunelib.statistics.activations import block_cosines
from prunelib.statistics.batches import progress
from prunelib.statistics.layerwise import Layers
from prunelib.statistics.without import through

if TYPE_CHECKING:
    from prunelib.statistics.inputs import PassInputs

logger = logging.getLogger(__name__)


def update_sums(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the sums over tokens of cosine, relative L1 and relative L2 norm, fp64 [3].

    Args:
        before: of the unit [..., hidden].
        after: of the unit [..., hidden].
    """
    x = before.float().reshape(-1, before.shape[-1])
    y = after.to(before.device).float().reshape(-1, after.shape[-1])
    sums = [block_cosines(x, y)]
    for p in (1, 2):
        sums.append(((y - x).norm(p, -1) / x.norm(p, -1)).sum(dtype=torch.float64))
    return torch.stack(sums).cpu()


def collect(inputs: PassInputs) -> dict[str, torch.Tensor]:
    """Return the statistics above, on the CPU.

    Args:
        inputs: model and windows.

    Raises:
        NonFiniteError: a hidden state is NaN or infinite, or all zero; names the layer.
    """
    layers = Layers(inputs.model, inputs.family)
    stream = layers.begin(inputs.windows, inputs.batch_windows)
    parts = (
        ("block", "attention", "mlp")
        if inputs.family.zero_block_is_neutral(inputs.config)
        else ("block",)
    )
    sums = {part: torch.zeros(3, len(layers.modules), dtype=torch.float64) for part in parts}
    for index, layer in progress(layers.sweep(), len(layers.modules), "layers", logger):
        places = through(layers, index, layer, stream)
        for part in parts:
            for x, y in zip(*places[part], strict=True):
                sums[part][:, index] += update_sums(x, y)
            if not sums[part][:, index].isfinite().all():
                raise NonFiniteError(f"updates: the update of {part} {index} is not finite")
    tokens = inputs.windows.numel()
    found = {}
    for part, (cosine, l1, l2) in sums.items():
        found[f"{part}.cosine"] = 1 - cosine / tokens
        found[f"{part}.relative_l1"] = l1 / tokens
        found[f"{part}.relative_l2"] = l2 / tokens
    return found
