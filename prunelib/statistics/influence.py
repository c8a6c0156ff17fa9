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
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from prunelib.errors import InputError, NonFiniteError
from prunelib.families.modeling_shared import remove_part
from prunelib.plan import PARTS
from prunelib.statistics.activations import block_cosines
from prunelib.statistics.batches import progress
from prunelib.statistics.layerwise import Layers, Stream

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from prunelib.families.base import Config, Family

logger = logging.getLogger(__name__)


def collect(
    model: PreTrainedModel,
    family: Family,
    config: Config,
    windows: torch.Tensor,
    batch_windows: int,
    *,
    part: str,
    recompute: bool,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Return the statistics above, on the CPU.

    Args:
        model: in eval mode; it is what it was when this returns.
        family: the model's family.
        config: config.json of the model.
        windows: int64 [n, length] token ids.
        batch_windows: windows per forward pass.
        part: ``block``, ``attention`` or ``mlp``.
        recompute: whether to go on greedily, in as many passes as there are layers.
        seed: not used; nothing here is random.

    Raises:
        InputError: the part is unknown, or cannot be removed alone in this architecture.
        NonFiniteError: a hidden state is NaN or infinite; names the layer.
    """
    if part not in ("block", *PARTS):
        raise InputError(f"part {part!r} is unknown; allowed: block, {', '.join(PARTS)}")
    if part != "block":
        family.check_parts(config, part)
    layers = Layers(model, family)
    start = layers.begin(windows, batch_windows)
    count = len(layers.modules)
    first = _influences(layers, start, part, frozenset())
    result = {"influence": torch.tensor([first[i] for i in range(count)], dtype=torch.float64)}
    if not recompute:
        return result
    order, values = [], []
    left = first
    with _restored(layers.modules):
        for _ in progress(range(count), count, "removals", logger):
            worst = min(left, key=lambda i: (left[i], i))
            order.append(worst)
            values.append(left[worst])
            if part != "block":
                remove_part(layers.modules[worst], part)
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
            if part != "block":
                layers.advance(index, layer, stream)
            continue
        before, middle = list(stream.states), list[torch.Tensor]()
        norm = layer.get_submodule(layers.family.parts["mlp"][-1])
        hook = norm.register_forward_pre_hook(_keep(middle))
        try:
            layers.advance(index, layer, stream)
        finally:
            hook.remove()
        pairs = {
            "block": (before, stream.states),
            "attention": (before, middle),
            "mlp": (middle, stream.states),
        }[part]
        cosine = 0.0
        for x, y in zip(*pairs, strict=True):
            # Some architectures run the MLP on all tokens in one row.
            flat = y.to(x.device).reshape(-1, y.shape[-1])
            cosine += float(block_cosines(x.reshape(-1, x.shape[-1]), flat))
        found[index] = 1 - cosine / tokens
        if not found[index] - found[index] == 0:
            raise NonFiniteError(f"influence: hidden states at layer {index} are not finite")
    return found


def _keep(inputs: list[torch.Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.append(args[0])

    return hook


@contextmanager
def _restored(modules: nn.ModuleList) -> Iterator[None]:
    """Put back what is taken out of the layers meanwhile."""
    own = [dict(layer._modules) for layer in modules]
    try:
        yield
    finally:
        for layer, parts in zip(modules, own, strict=True):
            layer._modules.update(parts)
