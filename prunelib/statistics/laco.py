"""Forward passes: which layers can be merged into one before the model's output turns away (LaCo).

Layer collapse (arXiv 2402.11187, algorithm 1): from high layers to low ones, a layer and those that
follow it are merged into one, ``W = W_l + sum_k (W_{l+k} - W_l)``; the merge is kept if the final
hidden states still are like the unpruned model's: if the mean over windows of their cosine, all
positions of a window as one vector and behind the final norm (as in the authors' notebook), is
above a threshold.

* ``order`` [n], int64: original indices of merged layers, as they go;
* ``bases`` [n], int64: the layer that each is merged into;
* ``similarities`` [merges], fp64: of the model after each kept merge, from the first;
* ``tried`` []: number of merges that were tried.

Layers in front of a merge are those of the unpruned model, whose hidden states are kept at every
layer; of the calibration set the first few windows are taken, as the paper takes a few sentences. A
merged layer's matrices exist while it computes.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from prunelib.errors import NonFiniteError
from prunelib.merging import is_merged, weighted_sum
from prunelib.plan import merged_layers
from prunelib.statistics.layerwise import Layers, Stream
from prunelib.statistics.merges import first_place

if TYPE_CHECKING:
    from torch import nn

    from prunelib.families.base import Config
    from prunelib.plan import MergedBlock
    from prunelib.statistics.inputs import PassInputs

logger = logging.getLogger(__name__)


def collect(
    inputs: PassInputs,
    *,
    layers_per_merge: int,
    interval: int,
    lowest: int,
    highest: int | None,
    threshold: float,
    sentences: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Return the statistics above, on the CPU.

    Args:
        inputs: model and windows.
        layers_per_merge: how many layers become one.
        interval: after a kept merge, how much lower the next one begins.
        lowest: the lowest layer that others are merged into.
        highest: the first merge begins ``layers_per_merge`` below it; None: the last layer.
        threshold: of the cosine.
        sentences: how many windows are looked at, at most.
        seed: not used; nothing here is random.

    Raises:
        InputError: the model has no such layers.
        NonFiniteError: a similarity is not a number.
    """
    layers = Layers(inputs.model, inputs.family)
    count = len(layers.modules)
    place, tried = first_place(count, layers_per_merge, lowest, highest), 0
    stream = layers.begin(inputs.windows[:sentences], inputs.batch_windows)
    prefixes = []
    for index, layer in layers.sweep():
        prefixes.append(stream.branch())
        layers.advance(index, layer, stream)
    wanted = _final(layers, stream)
    alive = list(range(count))
    order: list[int] = []
    bases: list[int] = []
    similarities = []
    while place >= lowest:
        gone = alive[place + 1 : place + layers_per_merge]
        tried += 1
        merged = merged_layers([*order, *gone], [*bases, *[alive[place]] * len(gone)])
        rest = [index for index in alive[place:] if index not in gone]
        similarity = _similarity(
            layers, prefixes[place].branch(), rest, merged, inputs.config, wanted
        )
        logger.info("layers %s into %d: %.4f", gone, alive[place], similarity)
        if similarity > threshold:
            order += gone
            bases += [alive[place]] * len(gone)
            similarities.append(similarity)
            del alive[place + 1 : place + 1 + len(gone)]
            place -= interval
        else:
            place -= 1
    return {
        "order": torch.tensor(order, dtype=torch.int64),
        "bases": torch.tensor(bases, dtype=torch.int64),
        "similarities": torch.tensor(similarities, dtype=torch.float64),
        "tried": torch.tensor(tried),
    }


def _final(layers: Layers, stream: Stream) -> list[torch.Tensor]:
    """Return the hidden states behind the final norm, per batch [windows, length * hidden]."""
    norm = layers.family.final_norm(layers.model)
    with torch.no_grad():
        return [norm(state).float().flatten(1) for state in stream.states]


def _similarity(
    layers: Layers,
    stream: Stream,
    rest: list[int],
    merged: tuple[MergedBlock, ...],
    config: Config,
    wanted: list[torch.Tensor],
) -> float:
    """Return the mean cosine of final hidden states to the unpruned model's.

    Args:
        layers: of the model.
        stream: in front of the first layer in ``rest``; consumed.
        rest: the layers that are still to compute.
        merged: what has taken the place of which layers' matrices.
        config: config.json of the model.
        wanted: the unpruned model's final hidden states.

    Raises:
        NonFiniteError: it is not a number.
    """
    terms = {layer.base: layer.terms for layer in merged}
    for index in rest:
        layer: nn.Module = layers.modules[index]
        if index in terms:
            layer = cast("nn.Module", partial(_call, layer, _sums(layers, config, terms[index])))
        layers.advance(index, layer, stream)
    cosines = [
        torch.nn.functional.cosine_similarity(a.double(), b.double().to(a.device)).cpu()
        for a, b in zip(_final(layers, stream), wanted, strict=True)
    ]
    mean = float(torch.cat(cosines).mean())
    if not math.isfinite(mean):
        raise NonFiniteError(f"laco: final hidden states are not finite with layers {rest} left")
    return mean


def _sums(
    layers: Layers, config: Config, terms: tuple[tuple[int, float], ...]
) -> dict[str, torch.Tensor]:
    """Return the parameters of a merged layer that are not its own."""
    shapes = layers.family.layer_shapes(config)
    with torch.no_grad():
        return {
            name: weighted_sum(
                terms,
                lambda layer, name=name: layers.modules[layer].get_parameter(name),  # type: ignore[misc]
            )
            for name in shapes
            if is_merged(name, shapes)
        }


def _call(layer: nn.Module, tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    return torch.func.functional_call(layer, tensors, args, kwargs)
