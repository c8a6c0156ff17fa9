"""Plan and weights to smaller weights, one tensor at a time.

Surgery never builds a model: it maps a stream of named tensors to a stream of smaller ones, so a
checkpoint of any size is pruned with the memory of its largest shard, and meta tensors do to count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunelib.errors import InputError

if TYPE_CHECKING:
    import torch

    from prunelib.families.base import Config, Family
    from prunelib.plan import Plan

Kept = Sequence[Mapping[str, Sequence[int]] | None]


def layer_of(name: str, prefix: str) -> tuple[int, str] | None:
    """Split ``<prefix>.<index>.<rest>`` into (index, rest); None for names outside the layers."""
    if not name.startswith(prefix + "."):
        return None
    index, rest = name[len(prefix) + 1 :].split(".", 1)
    return int(index), rest


def remaining_parameters(family: Family, config: Config, kept: Kept) -> int:
    """Count the parameters of the model that ``kept`` leaves, without any weights.

    Args:
        family: the model's family.
        config: config.json of the unpruned model.
        kept: per layer, kept unit ids by kind, or None for a removed block.
    """
    shapes = family.layer_shapes(config)
    total = sum(math.prod(shape) for shape in family.outer_shapes(config).values())
    counted: dict[tuple[tuple[str, tuple[int, ...]], ...], int] = {}
    for layer in kept:
        if layer is None:
            continue
        identity = tuple(sorted((kind, tuple(ids)) for kind, ids in layer.items()))
        if identity not in counted:
            sizes = {name: list(shape) for name, shape in shapes.items()}
            for (name, axis), positions in family.kept_positions(config, layer).items():
                sizes[name][axis] = len(positions)
            counted[identity] = sum(math.prod(size) for size in sizes.values())
        total += counted[identity]
    return total


def prune_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], family: Family, config: Config, plan: Plan
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the pruned model: kept rows and columns, layers numbered anew.

    Args:
        tensors: (name, tensor) pairs of the unpruned model, in any order.
        family: the model's family.
        config: config.json of the unpruned model.
        plan: the decision.

    Raises:
        InputError: the plan is for another architecture.
    """
    import torch

    check_plan(plan, family, config)
    new_index = {old: new for new, old in enumerate(plan.kept_layers)}
    positions = {
        old: family.kept_positions(config, plan.kept[old] or {}) for old in plan.kept_layers
    }
    for name, tensor in tensors:
        place = layer_of(name, family.layer_prefix)
        if place is None:
            yield name, tensor
            continue
        index, rest = place
        if index not in new_index:
            continue
        for axis in range(tensor.ndim):
            keep = positions[index].get((rest, axis))
            if keep is not None and len(keep) != tensor.shape[axis]:
                where = torch.from_numpy(keep).to(tensor.device)
                tensor = tensor.index_select(axis, where)
        yield f"{family.layer_prefix}.{new_index[index]}.{rest}", tensor


def zero_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], family: Family, config: Config, plan: Plan
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the unpruned model's tensors with every removed unit set to zero, widths unchanged.

    The resulting model computes the same function as the pruned one: a zeroed head or channel
    adds nothing to the residual stream, and neither does a block of zero output projections.

    Raises:
        InputError: the plan is for another architecture, or removes blocks where zeros do not.
    """
    check_plan(plan, family, config)
    _check_zero_blocks(plan, family, config)
    kinds = family.units(config)
    for name, tensor in tensors:
        place = layer_of(name, family.layer_prefix)
        if place is not None:
            index, rest = place
            kept = plan.kept[index]
            if kept is None:
                kept = dict.fromkeys(kinds, ())
            for (parameter, axis), keep in family.kept_positions(config, kept).items():
                if parameter == rest and len(keep) != tensor.shape[axis]:
                    mask = tensor.new_zeros(tensor.shape[axis])
                    mask[keep.tolist()] = 1
                    shape = [-1 if a == axis else 1 for a in range(tensor.ndim)]
                    tensor = tensor * mask.view(shape)
            if plan.kept[index] is None and rest.endswith(".bias"):
                tensor = tensor.new_zeros(tensor.shape)
        yield name, tensor


def pad_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], family: Family, config: Config, plan: Plan
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a pruned model's tensors padded with zero units to the original widths.

    The inverse of ``prune_tensors`` for everything that stays: the result loads as the stock
    architecture at the original size and computes the pruned model's function. Removed blocks
    come back as blocks of zeros, which add nothing to the residual stream.

    Raises:
        InputError: the plan is for another architecture, or removes blocks where zeros do not.
    """
    check_plan(plan, family, config)
    _check_zero_blocks(plan, family, config)
    shapes = family.layer_shapes(config)
    positions = {
        old: family.kept_positions(config, plan.kept[old] or {}) for old in plan.kept_layers
    }
    old_index = dict(enumerate(plan.kept_layers))
    like: torch.Tensor | None = None
    for name, tensor in tensors:
        place = layer_of(name, family.layer_prefix)
        if place is None:
            yield name, tensor
            continue
        new, rest = place
        old, like = old_index[new], tensor
        for axis in range(tensor.ndim):
            keep = positions[old].get((rest, axis))
            if keep is not None and len(keep) != shapes[rest][axis]:
                size = list(tensor.shape)
                size[axis] = shapes[rest][axis]
                padded = tensor.new_zeros(size)
                index = [slice(None)] * tensor.ndim
                index[axis] = keep.tolist()
                padded[tuple(index)] = tensor
                tensor = padded
        yield f"{family.layer_prefix}.{old}.{rest}", tensor
    if like is not None:
        for old in plan.removed_blocks:
            for rest, shape in shapes.items():
                yield f"{family.layer_prefix}.{old}.{rest}", like.new_zeros(shape)


def pruned_config(family: Family, config: Config, plan: Plan) -> tuple[dict[str, Any], bool]:
    """Return the config.json of the pruned model, and whether stock transformers builds it."""
    check_plan(plan, family, config)
    if not plan.removed_blocks and remaining_parameters(family, config, plan.kept) == (
        family.parameters(config)
    ):
        return dict(config), True
    widths = [family.widths(config, plan.kept[i] or {}) for i in plan.kept_layers]
    return family.pruned_config(config, widths, plan.kept_layers)


def _check_zero_blocks(plan: Plan, family: Family, config: Config) -> None:
    if plan.removed_blocks and not family.zero_block_is_neutral(config):
        raise InputError(
            f"this {config['model_type']} model normalises the residual stream in every block: "
            "a removed block cannot be written as zeros"
        )


def check_plan(plan: Plan, family: Family, config: Config) -> None:
    """Refuse a plan made for another architecture.

    Raises:
        InputError: model_type, layers or unit counts differ.
    """
    layers = family.dimensions(config).layers
    counts = {name: kind.count for name, kind in family.units(config).items()}
    if plan.model_type != config["model_type"] or len(plan.kept) != layers:
        raise InputError(
            f"plan is for {plan.model_type} with {len(plan.kept)} layers, "
            f"the model is {config['model_type']} with {layers}"
        )
    if any(counts.get(kind) != count for kind, count in plan.units.items()):
        raise InputError(f"plan is for units {dict(plan.units)}, the model has {counts}")
