"""Layers whose matrices are sums of several blocks' (LaCo, arXiv 2402.11187).

Matrices are summed, and biases of linear maps with them; norms stay those of the layer that the
others are merged into. The result is an ordinary layer. Sums are fp32, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prunelib.surgery import layer_of

if TYPE_CHECKING:
    import torch

    from prunelib.families.base import Config, Family, Shape
    from prunelib.plan import Plan

Read = Callable[[str], "torch.Tensor"]


def is_merged(name: str, shapes: Mapping[str, Shape]) -> bool:
    """Return whether a parameter of a layer is one of those that are summed.

    Args:
        name: relative to the layer.
        shapes: of the layer's parameters.
    """
    weight = f"{name.rpartition('.')[0]}.weight"
    return len(shapes.get(weight, ())) == 2


def weighted_sum(
    terms: Sequence[tuple[int, float]], read: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    """Return ``sum_i factor_i W_i`` in the type of the first one, on its device.

    Args:
        terms: layers and factors.
        read: returns the tensor of a layer.
    """
    first = read(terms[0][0])
    total = first.float() * terms[0][1]
    for layer, factor in terms[1:]:
        total.add_(read(layer).to(total.device).float(), alpha=factor)
    return total.to(first.dtype)


def merge_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    family: Family,
    config: Config,
    plan: Plan,
    read: Read,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the unpruned model's tensors with the plan's sums in the place of what they change.

    Args:
        tensors: (name, tensor) pairs of the unpruned model, in any order.
        family: the model's family.
        config: config.json of the unpruned model.
        plan: the decision.
        read: returns a tensor of the unpruned model by its full name.
    """
    shapes = family.layer_shapes(config)
    terms = {layer.base: layer.terms for layer in plan.merged}
    for name, tensor in tensors:
        place = layer_of(name, family.layer_prefix)
        if place is not None and place[0] in terms and is_merged(place[1], shapes):
            rest = place[1]
            tensor = weighted_sum(
                terms[place[0]],
                lambda layer, rest=rest: read(f"{family.layer_prefix}.{layer}.{rest}"),  # type: ignore[misc]
            )
        yield name, tensor
