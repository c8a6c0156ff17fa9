"""Feature-map sensitivity: |weight x gradient x activation|, reduced to rows and columns.

MINI-LLM (arXiv 2407.11681, equation 9) scores a weight by ``|W_ij g_ij X_j|``; over the calibration
tokens the activation is the norm of the input feature that the weight multiplies, as in Wanda
(arXiv 2306.11695, equation 1): ``|W_ij| |g_ij| ||X_j||_2``. A bias multiplies a feature that is 1
for every token: the square root of their number.

* ``<layer>.<parameter>.fms.rows`` [rows] and ``.fms.columns`` [columns]: sums over the other axis.
* ``<layer>.<kind>.gate`` [units]: derivative of the loss with respect to a factor on each unit's
  input columns of the output or down projection, which is the signed sum of ``W g`` over them.
* ``<layer>.<kind>.norm`` [units]: ``||X||_2`` of these input features together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from prunelib.errors import NonFiniteError
from prunelib.statistics.gradients import rows_and_columns

if TYPE_CHECKING:
    from torch import nn

    from prunelib.families.base import Config, Family, UnitSlice
    from prunelib.statistics.layerwise import Layers

# The units of a layer; query slots own a part of what kv groups own.
KINDS = ("kv_group", "mlp_channel")


def unit_parameters(family: Family, config: Config) -> tuple[str, ...]:
    """Return the names, relative to a layer, of all parameters that heads or channels own."""
    names = (part.parameter for name in KINDS for part in family.kind(config, name).slices)
    return tuple(dict.fromkeys(names))


def gate_slices(family: Family, config: Config, kinds: Sequence[str]) -> dict[str, UnitSlice]:
    """Return, per kind, the slice whose input columns a unit's gate multiplies."""
    found = {}
    for name in kinds:
        (found[name],) = (part for part in family.kind(config, name).slices if part.axis == 1)
    return found


def fms_sums(name: str, product: torch.Tensor, norm: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return ``<name>.fms.rows`` and ``.fms.columns``; overwrites ``product``.

    Args:
        name: ``<layer>.<parameter>``.
        product: weight times gradient, [rows, columns] or, of a bias, [rows].
        norm: of the input features, [columns]; of a bias [].
    """
    return rows_and_columns(f"{name}.fms", product.abs_().mul_(norm.to(product)))


def fold_columns(values: torch.Tensor, part: UnitSlice) -> torch.Tensor:
    """Sum ``values`` [columns] over the columns that each unit owns; float64 [units]."""
    return torch.from_numpy(np.bincount(part.owner, weights=values.double().numpy()))


def gate_norms(
    norms: Mapping[str, torch.Tensor], gates: Mapping[str, UnitSlice], layers: int
) -> dict[str, torch.Tensor]:
    """Return ``<layer>.<kind>.norm`` from the norms of single features."""
    return {
        f"{layer}.{kind}.norm": fold_columns(norms[f"{layer}.{part.parameter}"] ** 2, part).sqrt()
        for layer in range(layers)
        for kind, part in gates.items()
    }


@contextmanager
def _squares(
    layer: nn.Module, modules: Sequence[str], sums: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Add up the squared input features of ``modules``, in fp64, while the layer is called."""
    last: list[Any] = [None, None]

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # Several maps read the same input, one after the other.
            if last[0] is not args[0]:
                flat = args[0].detach().float().flatten(0, -2)
                last[:] = args[0], flat.square().sum(0, dtype=torch.float64).cpu()
            sums[name] = sums[name] + last[1] if name in sums else last[1]

        return hook

    hooks = [layer.get_submodule(n).register_forward_pre_hook(watch(n)) for n in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def input_norms(
    layers: Layers, config: Config, windows: torch.Tensor, batch_windows: int, what: str
) -> tuple[dict[str, torch.Tensor], float]:
    """Take the windows through the unchanged model.

    Args:
        layers: the model's layers.
        config: config.json of the model.
        windows: int64 [n, length] token ids.
        batch_windows: windows at a time.
        what: the pass, for messages.

    Returns:
        ``||X_j||_2`` by ``<layer>.<parameter>``, float64 [columns], for parameters that units
        own, of a bias []; and the mean loss.

    Raises:
        NonFiniteError: an activation or the loss is NaN or infinite; names the layer.
    """
    parameters = unit_parameters(layers.family, config)
    modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    norms: dict[str, torch.Tensor] = {}
    stream = layers.begin(windows, batch_windows)
    for index, layer in layers.sweep():
        sums: dict[str, torch.Tensor] = {}
        with _squares(layer, modules, sums):
            layers.advance(index, layer, stream)
        for name in parameters:
            module, _, own = name.rpartition(".")
            if not sums[module].isfinite().all():
                raise NonFiniteError(f"{what}: input of layer {index}.{module} is not finite")
            ones = torch.tensor(float(windows.numel()), dtype=torch.float64)
            norms[f"{index}.{name}"] = (sums[module] if own == "weight" else ones).sqrt()
    loss = layers.loss(stream)
    if not math.isfinite(loss):
        raise NonFiniteError(f"{what}: the calibration loss is {loss}")
    return norms, loss
