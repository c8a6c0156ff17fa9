"""Plan and weights to smaller weights, one tensor at a time.

Surgery never builds a model: it maps a stream of named tensors to a stream of smaller ones, so a
checkpoint of any size is pruned with the memory of its largest shard, and meta tensors do to count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunelib.errors import InputError
from prunelib.plan import EmulatedBlock

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from prunelib.families.base import Config, Family
    from prunelib.plan import Plan

Kept = Sequence[Mapping[str, Sequence[int]] | None]

# A tied head is stored by some checkpoints and named by every model; it is the embedding.
HEAD = "lm_head.weight"


def layer_of(name: str, prefix: str) -> tuple[int, str] | None:
    """Split ``<prefix>.<index>.<rest>`` into (index, rest); None for names outside the layers."""
    if not name.startswith(prefix + "."):
        return None
    index, rest = name[len(prefix) + 1 :].split(".", 1)
    return int(index), rest


def _positions(
    family: Family, config: Config, kept: Kept, whole: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, npt.NDArray[np.int64]]]:
    """Return the positions that stay, by full name in the unpruned model and axis.

    Args:
        family: the model's family.
        config: config.json of the unpruned model.
        kept: per layer, kept unit ids by kind, or None for a removed block.
        whole: kept unit ids of the kinds that run through the whole model.
    """
    found: dict[str, dict[int, npt.NDArray[np.int64]]] = {}
    for (name, axis), keep in family.kept_positions(config, whole).items():
        found.setdefault(name, {})[axis] = keep
    for index, layer in enumerate(kept):
        # The whole model's units own other axes than those of a layer.
        for (rest, axis), keep in family.kept_positions(config, layer or {}).items():
            found.setdefault(f"{family.layer_prefix}.{index}.{rest}", {})[axis] = keep
    if family.embedding in found and family.dimensions(config).tied:
        found[HEAD] = found[family.embedding]
    return found


def remaining_parameters(
    family: Family,
    config: Config,
    kept: Kept,
    whole: Mapping[str, Sequence[int]] | None = None,
    skipped: Mapping[str, Sequence[int]] | None = None,
) -> int:
    """Count the parameters of the model that ``kept`` leaves, without any weights.

    Args:
        family: the model's family.
        config: config.json of the unpruned model.
        kept: per layer, kept unit ids by kind, or None for a removed block.
        whole: kept unit ids of the kinds that run through the whole model.
        skipped: by part of a block, the layers that lose it.
    """
    shapes = family.layer_shapes(config)
    cut = {
        place: len(positions)
        for place, positions in family.kept_positions(config, whole or {}).items()
    }

    def left(name: str, shape: Sequence[int]) -> list[int]:
        return [cut.get((name, axis), size) for axis, size in enumerate(shape)]

    total = sum(math.prod(left(*item)) for item in family.outer_shapes(config).items())
    counted: dict[tuple[tuple[str, tuple[int, ...]], ...], int] = {}
    for index, layer in enumerate(kept):
        if layer is None:
            continue
        identity = tuple(sorted((kind, tuple(ids)) for kind, ids in layer.items()))
        if identity not in counted:
            # What runs through the whole model is cut alike in all layers.
            prefix = f"{family.layer_prefix}.{index}"
            sizes = {name: left(f"{prefix}.{name}", shape) for name, shape in shapes.items()}
            for (name, axis), positions in family.kept_positions(config, layer).items():
                sizes[name][axis] = len(positions)
            counted[identity] = sum(math.prod(size) for size in sizes.values())
        total += counted[identity]
    for part, layers in (skipped or {}).items():
        total -= len(layers) * family.part_parameters(config, part)
    return total


def prune_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], family: Family, config: Config, plan: Plan
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the pruned model: kept rows and columns, layers numbered anew.

    What layers that share weights hold of their own is not among them (``replacement``), nor what
    emulates blocks (``emulation``); merged layers are taken as they come (``merging``).

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
    new_index = plan.places
    positions = _positions(family, config, plan.kept, plan.whole)
    for name, tensor in tensors:
        place = layer_of(name, family.layer_prefix)
        if place is not None and (place[0] not in new_index or _is_skipped(plan, family, *place)):
            continue
        for axis, keep in positions.get(name, {}).items():
            if len(keep) != tensor.shape[axis]:
                where = torch.from_numpy(keep).to(tensor.device)
                tensor = tensor.index_select(axis, where)
        if place is not None:
            name = f"{family.layer_prefix}.{new_index[place[0]]}.{place[1]}"
        yield name, tensor


def _is_skipped(plan: Plan, family: Family, layer: int, name: str) -> bool:
    """Whether a parameter, named relative to its layer, belongs to a part that the layer loses."""
    return any(
        layer in layers and family.part_of(name) == part for part, layers in plan.skipped.items()
    )


def zero_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], family: Family, config: Config, plan: Plan
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the unpruned model's tensors with every removed unit set to zero, widths unchanged.

    The resulting model computes the same function as the pruned one: a zeroed head or channel
    adds nothing to the residual stream, and neither does a block of zero output projections. With
    residual channels removed that holds up to the norms, which here still divide by the width of
    the whole stream.

    Raises:
        InputError: the plan is for another architecture, or removes blocks where zeros do not.
    """
    check_plan(plan, family, config)
    _check_zero_blocks(plan, family, config)
    if plan.merged:
        raise InputError("a plan that merges layers is not one of units set to zero")
    nothing: Mapping[str, Sequence[int]] = dict.fromkeys(family.units(config), ())
    kept = [nothing if layer is None else layer for layer in plan.kept]
    positions = _positions(family, config, kept, plan.whole)
    for name, tensor in tensors:
        for axis, keep in positions.get(name, {}).items():
            if len(keep) != tensor.shape[axis]:
                mask = tensor.new_zeros(tensor.shape[axis])
                mask[keep.tolist()] = 1
                shape = [-1 if a == axis else 1 for a in range(tensor.ndim)]
                tensor = tensor * mask.view(shape)
        place = layer_of(name, family.layer_prefix)
        if place is not None and (
            (plan.kept[place[0]] is None and name.endswith(".bias"))
            or _is_skipped(plan, family, *place)
        ):
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
        InputError: the plan is for another architecture, or removes blocks where zeros do not, or
            residual channels.
    """
    check_plan(plan, family, config)
    _check_zero_blocks(plan, family, config)
    if plan.whole:
        raise InputError(
            f"a plan that removes {', '.join(plan.whole)} units cannot be padded: the norms of the "
            "original width would count the zeros in"
        )
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
        for old in range(len(plan.kept)):
            for rest, shape in shapes.items():
                if plan.kept[old] is None or _is_skipped(plan, family, old, rest):
                    yield f"{family.layer_prefix}.{old}.{rest}", like.new_zeros(shape)


def pruned_config(family: Family, config: Config, plan: Plan) -> tuple[dict[str, Any], bool]:
    """Return the config.json of the pruned model, and whether stock transformers builds it."""
    check_plan(plan, family, config)
    for part in plan.skipped:
        family.check_parts(config, part)
    if plan.sharing or plan.emulation or any(plan.skipped.values()):
        return family.virtual_config(config, *_virtual_layers(plan)), False
    if not plan.removed_blocks and (
        remaining_parameters(family, config, plan.kept, plan.whole) == family.parameters(config)
    ):
        return dict(config), True
    widths = [
        family.widths(config, {**(plan.kept[i] or {}), **plan.whole}) for i in plan.kept_layers
    ]
    return family.pruned_config(config, widths, plan.kept_layers)


def _virtual_layers(plan: Plan) -> tuple[list[int], list[dict[str, Any]]]:
    """Return, per layer of the new model, the original one that it is or stands for, and its entry.

    The entries are those of the config's ``virtual_layers``.
    """
    sources: list[int] = []
    entries: list[dict[str, Any]] = []
    for layer in plan.layers:
        if isinstance(layer, int):
            sources.append(layer)
            parts = [part for part, layers in plan.skipped.items() if layer in layers]
            entries.append({"without": parts[0]} if parts else {})
        elif isinstance(layer, EmulatedBlock):
            assert plan.emulation is not None
            sources.append(layer.like)
            entries.append({"emulate": plan.emulation.rank})
        else:
            assert plan.sharing is not None
            sources.append(layer.like)
            entries.append(
                {
                    "base": plan.places[layer.base],
                    "rank": plan.sharing.rank,
                    "normalise": plan.sharing.gain is not None,
                }
            )
    return sources, entries


def _check_zero_blocks(plan: Plan, family: Family, config: Config) -> None:
    if plan.sharing:
        raise InputError(
            "a plan whose layers share weights cannot be written with zeros in the place of what "
            "is removed: its adapters and norms have no place in the stock architecture"
        )
    if plan.emulation:
        raise InputError(
            "a plan with emulated blocks cannot be written with zeros in the place of what is "
            "removed: their maps have no place in the stock architecture"
        )
    if (plan.removed_blocks or plan.skipped) and not family.zero_block_is_neutral(config):
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
    kinds = family.units(config) | family.model_units(config)
    counts = {name: kind.count for name, kind in kinds.items()}
    if plan.model_type != config["model_type"] or len(plan.kept) != layers:
        raise InputError(
            f"plan is for {plan.model_type} with {len(plan.kept)} layers, "
            f"the model is {config['model_type']} with {layers}"
        )
    if any(counts.get(kind) != count for kind, count in plan.units.items()):
        raise InputError(f"plan is for units {dict(plan.units)}, the model has {counts}")
