"""The model without some of its blocks, or without the attention or MLP of some.

Nothing is copied: a block is left out of the walk through the layers, a part is taken out of its
layer while that one computes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prunelib.errors import InputError, NonFiniteError
from prunelib.families.modeling_shared import remove_part
from prunelib.plan import DEPTH_KINDS
from prunelib.statistics.layerwise import Layers, Stream

if TYPE_CHECKING:
    import torch
    from torch import nn

    from prunelib.families.base import Config, Family


def check_unit(family: Family, config: Config, part: str) -> None:
    """Refuse what cannot be removed alone.

    Raises:
        InputError: the part is unknown, or this architecture does not allow it.
    """
    if part not in DEPTH_KINDS:
        raise InputError(f"part {part!r} is unknown; allowed: {', '.join(DEPTH_KINDS)}")
    if part != "block":
        family.check_parts(config, part)


@contextmanager
def without_part(layer: nn.Module, part: str) -> Iterator[None]:
    """Take the attention or the MLP out of a layer meanwhile."""
    own = dict(layer._modules)
    remove_part(layer, part)
    try:
        yield
    finally:
        layer._modules.update(own)


def advance(
    layers: Layers,
    stream: Stream,
    part: str,
    gone: Collection[int],
    start: int,
    stop: int | None = None,
) -> None:
    """Take a stream through the layers from ``start`` up to ``stop``, by default all that follow.

    Args:
        layers: of the model.
        stream: in front of ``start``.
        part: ``block``, ``attention`` or ``mlp``.
        gone: layers that lack it.
        start: first layer.
        stop: the layer in front of which the stream is afterwards.
    """
    for index, layer in layers.sweep(start, stop):
        if index not in gone:
            layers.advance(index, layer, stream)
        elif part != "block":
            with without_part(layer, part):
                layers.advance(index, layer, stream)


def through(
    layers: Layers, index: int, layer: nn.Module, stream: Stream
) -> dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Take a stream through one layer; return, by unit, the states in front of it and behind it.

    One tensor [batch, length, hidden] per batch; some architectures run the MLP on all tokens in
    one row [tokens, hidden]. The last layer's states are those in front of the final norm.

    Args:
        layers: of the model.
        index: of the layer.
        layer: itself.
        stream: in front of it; behind it afterwards.
    """
    before, middle = list(stream.states), list[Any]()
    norm = layer.get_submodule(layers.family.parts["mlp"][-1])
    hook = norm.register_forward_pre_hook(lambda _, inputs: middle.append(inputs[0]))
    try:
        layers.advance(index, layer, stream)
    finally:
        hook.remove()
    after = list(stream.states)
    return {"block": (before, after), "attention": (before, middle), "mlp": (middle, after)}


def batches_of(stream: Stream) -> Iterator[Stream]:
    """Yield a stream's batches as streams that go on by themselves."""
    for ids, state, arguments in zip(stream.parts, stream.states, stream.arguments, strict=True):
        yield Stream([ids], [state], [arguments])


def targets_of(stream: Stream) -> int:
    """Return the number of predicted tokens of a stream's windows."""
    return sum(ids[:, 1:].numel() for ids in stream.parts)


def loss_without(
    layers: Layers,
    stream: Stream,
    part: str,
    gone: Collection[int],
    start: int,
    *,
    most: float = math.inf,
) -> float:
    """Return the summed next-token loss of the model without ``gone``, or more than ``most``.

    Batch by batch; a batch's loss is not negative, so what is above ``most`` already is given up.

    Args:
        layers: of the model.
        stream: in front of ``start``; stays there.
        part: ``block``, ``attention`` or ``mlp``.
        gone: layers that lack it.
        start: the first layer that is still to compute.
        most: what is of interest.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    total = 0.0
    for one in batches_of(stream):
        advance(layers, one, part, gone, start)
        total += layers.loss(one) * targets_of(one)
        if not math.isfinite(total):
            raise NonFiniteError(f"the loss without {part} {sorted(gone)} is {total}")
        if total > most:
            break
    return total
