"""Feature-map sensitivity with true gradients: one forward pass, then one backward pass.

The norms of all input features are known before the backward pass, which then reduces
``|W g| ||X||`` of one layer at a time to rows and columns: nothing weight-sized is kept. The
tensors are those of ``prunelib.statistics.fms``, of every parameter that heads or channels own,
with the gates of kv groups, query slots (where the family has them) and MLP channels; of every
such parameter also ``.sum.rows`` and ``.sum.columns``, as in ``prunelib.statistics.gradients``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from prunelib.statistics.batches import batches
from prunelib.statistics.fms import fms_sums, fold_columns, gate_norms, gate_slices, input_norms
from prunelib.statistics.gradients import Sums, rows_and_columns, sweep
from prunelib.statistics.layerwise import Layers

if TYPE_CHECKING:
    from prunelib.statistics.inputs import PassInputs


class FmsSums(Sums):
    """The summed gradient of one parameter, reduced with the norms of its inputs.

    Args:
        norms: by ``<layer>.<parameter>``; parameters that are not among them are left out.
    """

    def __init__(self, norms: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._norms = norms

    def reduce(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the signed sums and the sensitivity of the parameter."""
        if name not in self._norms:
            return {}
        product = self.first.float().mul_(weight.detach())
        reduced = rows_and_columns(f"{name}.sum", product)
        return reduced | fms_sums(name, product, self._norms[name])


def collect(inputs: PassInputs) -> dict[str, torch.Tensor]:
    """Return the statistics above and the mean ``loss`` [], on the CPU.

    Args:
        inputs: model and windows.

    Raises:
        NonFiniteError: the loss or a layer's gradients are NaN or infinite; names the layer.
    """
    what = "fms_gradients"
    layers = Layers(inputs.model, inputs.family)
    norms, _ = input_norms(layers, inputs.config, inputs.windows, inputs.batch_windows, what)
    parts = list(batches(inputs.windows, inputs.batch_windows))
    targets = inputs.windows.shape[0] * (inputs.windows.shape[1] - 1)
    statistics, loss = sweep(
        inputs.model, inputs.family, parts, targets, lambda: FmsSums(norms), what
    )
    gates = gate_slices(inputs.family, inputs.config, tuple(inputs.family.units(inputs.config)))
    for layer in range(len(layers.modules)):
        for kind, part in gates.items():
            columns = statistics[f"{layer}.{part.parameter}.sum.columns"]
            statistics[f"{layer}.{kind}.gate"] = fold_columns(columns, part)
    statistics |= gate_norms(norms, gates, len(layers.modules))
    return statistics | {"loss": torch.tensor(loss, dtype=torch.float64)}
