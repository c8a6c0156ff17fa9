"""Feature-map sensitivity with the gradient that reaches a layer along the residual stream alone.

What a layer adds to the residual stream reaches the head unchanged, and through the layers behind
it. Leaving these out, the gradient of the loss at every layer's output is that at the last one's:
``delta`` [tokens, hidden], from the head and the final norm, a chunk of positions at a time. So the
gradient of an output or down projection is estimated by ``delta^T X``, from two forward passes and
without a graph of any layer. For the down projection of the last layer it is exact where norms come
before the sums; further down it lacks ever more paths. This is no part of MINI-LLM: it is an
estimator of the same quantity, at the same memory, to hold against perturbations.

The tensors are those of ``prunelib.statistics.fms``: ``.fms.rows`` and ``.fms.columns`` of the
output and down projections, ``.gate`` and ``.norm`` of the units whose features they read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from prunelib.errors import NonFiniteError
from prunelib.statistics.fms import fms_sums, fold_columns, gate_norms, gate_slices
from prunelib.statistics.gradients import rows_and_columns
from prunelib.statistics.layerwise import Layers, StreamedLayers, layers_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from prunelib.statistics.inputs import PassInputs


__all__ = ["StreamedLayers", "collect"]


def collect(inputs: PassInputs, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the statistics above and the mean ``loss`` [], on the CPU.

    Args:
        inputs: model and windows.
        seed: not used; nothing here is random.

    Raises:
        NonFiniteError: the loss or a layer's statistics are NaN or infinite; names the layer.
    """
    layers = layers_of(inputs)
    gates = gate_slices(inputs.family, inputs.config, tuple(inputs.family.units(inputs.config)))
    names = list(dict.fromkeys(part.parameter for part in gates.values()))
    start = layers.begin(inputs.windows, inputs.batch_windows)
    end = start.branch()
    for index, layer in layers.sweep():
        layers.advance(index, layer, end)
    upstream, loss = layers.head_gradients(end)
    if not torch.tensor(loss).isfinite():
        raise NonFiniteError(f"fms_direct: the calibration loss is {loss}")
    statistics: dict[str, torch.Tensor] = {}
    norms: dict[str, torch.Tensor] = {}
    for index, layer in layers.sweep():
        products = _products(layers, index, layer, start, names, upstream)
        while products:
            # None of it is there any more when the next layer's is put together.
            name, (gradient, squares) = products.popitem()
            place = f"{index}.{name}"
            norms[place] = squares.sqrt().cpu()
            gradient.mul_(layer.get_parameter(name).detach())
            columns = rows_and_columns(place, gradient)[f"{place}.columns"]
            reduced = fms_sums(place, gradient, norms[place])
            del gradient
            for kind, part in gates.items():
                if part.parameter == name:
                    reduced[f"{index}.{kind}.gate"] = fold_columns(columns, part)
            if not all(value.isfinite().all() for value in reduced.values()):
                raise NonFiniteError(f"fms_direct: layer {index}, {name} is not finite")
            statistics |= reduced
    statistics |= gate_norms(norms, gates, len(layers.modules))
    return statistics | {"loss": torch.tensor(loss, dtype=torch.float64)}


def _products(
    layers: Layers,
    index: int,
    layer: nn.Module,
    stream: Any,
    names: Sequence[str],
    upstream: Sequence[torch.Tensor],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Take the stream through a layer; return ``delta^T X`` and the squared norms of X by name."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    seen = dict.fromkeys(names, 0)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            features = args[0].detach().float().flatten(0, -2)
            delta = upstream[seen[name]].to(features).flatten(0, -2)
            seen[name] += 1
            gradient = delta.T @ features
            squares = features.square().sum(0, dtype=torch.float64)
            if name in found:
                gradient, squares = found[name][0].add_(gradient), found[name][1].add_(squares)
            found[name] = gradient, squares

        return hook

    hooks = [
        layer.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(watch(name))
        for name in names
    ]
    try:
        layers.advance(index, layer, stream)
    finally:
        for hook in hooks:
            hook.remove()
    return found
