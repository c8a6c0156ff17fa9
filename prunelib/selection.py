"""Scores and a target to a plan: which units go.

Local ranking removes the same number of the lowest units in every layer that is not protected
(LLM-Pruner section 3.3); global ranking puts all units of all kinds into one list, each counted as
one unit with its raw score, as the public LLM-Pruner code does. Units that run through the whole
model (residual channels) have one ranking, and no layer is protected from them. Blocks are ranked
in ``depth_selection``.

Nothing here imports torch; the workflow calls ``check_reachable`` before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prunelib.depth_selection import Blocks, block_count, lowest_blocks, repeated_blocks
from prunelib.errors import InputError, NonFiniteError
from prunelib.families.base import RESIDUAL
from prunelib.plan import DEPTH_KINDS, PARTS, Plan
from prunelib.rules import Repeat, Rule, Scores, Target
from prunelib.surgery import remaining_parameters

if TYPE_CHECKING:
    from prunelib.families.base import Config, Family


def prunable_layers(family: Family, config: Config, target: Target) -> list[int]:
    """Return the indices of the layers that are not protected.

    Raises:
        InputError: all layers are protected although something is to be removed, or one that the
            model does not have.
    """
    count = family.dimensions(config).layers
    protected = target.protected(count)
    layers = [layer for layer in range(count) if layer not in protected]
    if not layers and target.value > 0:
        named = f" and layers {list(target.protect_layers)}" if target.protect_layers else ""
        raise InputError(
            f"target protect: first {target.protect_first} and last {target.protect_last}{named} "
            f"cover all {count} layers; nothing is left to prune"
        )
    return layers


def group_ratio_counts(family: Family, config: Config, kind: str, ratio: float) -> int:
    """Return the number of units of ``kind`` that a group ratio drops per layer.

    LLM-Pruner's arithmetic: channels ``C - int(C * (1 - ratio))``, heads that number of channels
    divided by the head's width, rounded down. The ratio is taken as the decimal that was written,
    not as the nearest binary fraction.
    """
    unit = family.kind(config, kind)
    # The root of a head group is its narrowest member: the k rows of one kv head.
    width = min(len(part.owner) for part in unit.slices) // unit.count
    channels = unit.count * width
    dropped = channels - math.floor(channels * (1 - Fraction(str(ratio))))
    return dropped // width


def _granularity(kind: str, rule: Rule) -> int:
    return rule.round_to if kind in ("mlp_channel", RESIDUAL) else 1


def _places(family: Family, config: Config, target: Target, rule: Rule) -> int:
    """Return how many times the units of ``rule`` exist: in every prunable layer, or once."""
    if any(family.kind(config, kind).whole for kind in rule.kinds):
        return 1
    return len(prunable_layers(family, config, target))


def _round_dropped(count: int, dropped: int, multiple: int) -> int:
    """Round so that the kept number is a multiple, never removing more than asked."""
    kept = min(-(-(count - dropped) // multiple) * multiple, count)
    return count - kept


def _most_dropped(count: int, multiple: int) -> int:
    """Return the most units of a layer (or model) that may go: at least one multiple stays."""
    return max(count - multiple, 0)


def local_counts(family: Family, config: Config, target: Target, rule: Rule) -> dict[str, int]:
    """Return how many units of every kind each prunable layer, or the model, loses.

    For a parameter target the coarse kind (kv groups) takes the whole number whose share is
    consistent with the share of the fine kind, which is then solved for.

    Raises:
        InputError: the target cannot be reached.
    """
    check_reachable(family, config, target, rule)
    counts = {kind: family.kind(config, kind).count for kind in rule.kinds}
    if target.kind == "groups":
        return {
            kind: min(
                _round_dropped(
                    counts[kind],
                    group_ratio_counts(family, config, kind, target.value),
                    _granularity(kind, rule),
                ),
                _most_dropped(counts[kind], _granularity(kind, rule)),
            )
            for kind in rule.kinds
        }
    if target.value == 0:
        return dict.fromkeys(rule.kinds, 0)
    *coarse, fine = rule.kinds
    costs = {kind: family.unit_cost(config, kind) for kind in rule.kinds}
    budget = target.value * family.parameters(config) / _places(family, config, target, rule)
    multiple = _granularity(fine, rule)
    candidates = []
    for dropped in range(counts[coarse[0]] if coarse else 1):
        rest = budget - (dropped * costs[coarse[0]] if coarse else 0)
        exact = rest / costs[fine]
        fine_dropped = counts[fine] - multiple * round((counts[fine] - exact) / multiple)
        fine_dropped = min(max(fine_dropped, 0), _most_dropped(counts[fine], multiple))
        miss = abs(fine_dropped * costs[fine] - rest)
        gap = 0.0
        if coarse:
            # The share of kv groups that a common ratio would drop: [k / K, (k + 1) / K).
            low, high = dropped / counts[coarse[0]], (dropped + 1) / counts[coarse[0]]
            share = fine_dropped / counts[fine]
            gap = max(low - share, share - high, 0.0)
        candidates.append((miss > costs[fine] * multiple, gap, dropped, fine_dropped))
    _, _, dropped, fine_dropped = min(candidates)
    return {**({coarse[0]: dropped} if coarse else {}), fine: fine_dropped}


def most_removable(family: Family, config: Config, target: Target, rule: Rule) -> int:
    """Return the number of parameters that the prunable layers can lose at the most."""
    each = 0
    for name in rule.kinds:
        most = _most_dropped(family.kind(config, name).count, _granularity(name, rule))
        each += family.unit_cost(config, name) * most
    return each * _places(family, config, target, rule)


def _layers(layers: Sequence[int]) -> str:
    first, last = layers[0], layers[-1]
    if len(layers) == last - first + 1:
        return f"layers {first}..{last}"
    return f"layers {', '.join(map(str, layers))}"


def check_reachable(family: Family, config: Config, target: Target, rule: Rule) -> None:
    """Refuse a target that the prunable layers cannot reach.

    Raises:
        InputError: with what was asked for and the most that can be had.
    """
    layers = prunable_layers(family, config, target)
    rule = rule.within(target)
    if rule.repeat is not None:
        _check_repeat(family, config, target, rule.repeat)
        return
    if target.kind == "layers":
        raise InputError(f"target layers: this method prunes {', '.join(rule.kinds)}")
    if rule.kinds[0] in DEPTH_KINDS:
        blocks = block_count(family, config, target, rule)
        count = family.dimensions(config).layers
        if rule.kinds[0] in PARTS:
            family.check_parts(config, rule.kinds[0])
        # A model may lose all its MLPs or attentions; a removed block leaves nothing to share.
        if blocks > count or (blocks == count and rule.kinds == ("block",)):
            raise InputError(
                f"target {target.kind} {target.value}: would remove {blocks} of "
                f"{count} blocks; at least one must stay"
            )
        most = min(math.floor(rule.most * count), len(rule.removable(count)))
        if blocks > most:
            first, last = rule.stay
            raise InputError(
                f"target {target.kind} {target.value}: would remove {blocks} of {count} blocks; "
                f"with keep_first {first}, keep_last {last} and most {rule.most} this method "
                f"removes at most {most}"
            )
        return
    if target.kind == "blocks":
        raise InputError(f"target blocks: this method prunes {', '.join(rule.kinds)}, not blocks")
    whole = [name for name in rule.kinds if family.kind(config, name).whole]
    if whole and target.protects:
        raise InputError(
            f"target protect: {whole[0]} units run through all layers; allowed: no protect"
        )
    if target.kind == "parameters" and target.value > 0:
        total = family.parameters(config)
        most = most_removable(family, config, target, rule)
        if target.value * total > most:
            raise InputError(
                f"target parameters {target.value}: {_layers(layers)} "
                f"can lose at most {most / total:.4f} of all {total:,} parameters; "
                "protect fewer layers or remove less"
            )
    if target.kind == "groups":
        for name in rule.kinds:
            count = family.kind(config, name).count
            if group_ratio_counts(family, config, name, target.value) >= count:
                raise InputError(
                    f"target groups {target.value}: would remove all {count} {name} units of "
                    f"{'the model' if whole else 'a layer'}; at least one must stay"
                )


def _check_repeat(family: Family, config: Config, target: Target, repeat: Repeat) -> None:
    """Refuse a target that says nothing of a deeper model, or no whole number of repetitions."""
    if target.kind == "layers":
        repeat.blocks(family.dimensions(config).layers, int(target.value))
    elif target.value:
        raise InputError(
            f"target {target.kind}: this method repeats blocks and removes none; allowed: layers"
        )


def select(
    scores: Scores,
    family: Family,
    config: Config,
    target: Target,
    rule: Rule,
    produced_by: Mapping[str, Any],
    previous: Plan | None = None,
) -> Plan:
    """Turn scores into a plan; low scores go first, ties by layer and index.

    Args:
        scores: per kind and layer, one score per unit, float64 [units]; for units of the whole
            model one array [units], for blocks one [layers].
        family: the model's family.
        config: config.json of the unpruned model.
        target: how much to remove.
        rule: how units are ranked.
        produced_by: recorded in the plan.
        previous: in iterative pruning the plan of the step before, whose removed units go first,
            whatever their scores; units are numbered as in the unpruned model in every step.

    Raises:
        InputError: the target cannot be reached, or scores or the plan before do not fit.
        NonFiniteError: a score is NaN or infinite; names kind and layer.
    """
    check_reachable(family, config, target, rule)
    _check_scores(scores, family, config, rule)
    if previous is not None:
        scores = _behind(scores, previous, rule)
    count = family.dimensions(config).layers
    depth = rule.repeat is not None or rule.kinds[0] in DEPTH_KINDS
    kinds = {} if depth else {k: family.kind(config, k) for k in rule.kinds}
    everything = {n: tuple(range(kind.count)) for n, kind in kinds.items() if not kind.whole}
    kept: list[dict[str, tuple[int, ...]] | None] = [dict(everything) for _ in range(count)]
    whole: dict[str, tuple[int, ...]] = {}
    blocks = Blocks()
    if rule.repeat is not None:
        blocks = repeated_blocks(family, config, target, rule)
    elif depth:
        blocks = lowest_blocks(scores, family, config, target, rule)
    elif len(everything) < len(kinds):
        for kind, dropped in local_counts(family, config, target, rule).items():
            whole[kind] = _highest(scores[kind][0], dropped)
    else:
        for (layer, kind), dropped in _dropped(scores, family, config, target, rule).items():
            layer_kept = kept[layer]
            assert layer_kept is not None
            layer_kept[kind] = _highest(scores[kind][layer], dropped)
    for layer in blocks.removed:
        kept[layer] = None
    if previous is not None:
        _check_nested(kept, previous)
    return Plan(
        family=family.name,
        model_type=str(config["model_type"]),
        kept=tuple(kept),
        units={name: kind.count for name, kind in kinds.items()},
        parameters=(
            family.parameters(config),
            remaining_parameters(family, config, kept, whole, blocks.skipped)
            + (blocks.sharing.parameters if blocks.sharing else 0)
            + (blocks.emulation.parameters if blocks.emulation else 0),
        ),
        target=target.to_dict(),
        produced_by=dict(produced_by),
        whole=whole,
        sharing=blocks.sharing,
        skipped=blocks.skipped,
        merged=blocks.merged,
        emulation=blocks.emulation,
    )


def _behind(scores: Scores, previous: Plan, rule: Rule) -> Scores:
    """Return scores that are the lowest for units which the plan before removed."""
    check_iterative(rule.kinds)
    moved: dict[str, list[npt.NDArray[np.float64]]] = {}
    for kind in rule.kinds:
        if kind not in previous.units:
            raise InputError(f"the plan of the step before has no {kind} units")
        moved[kind] = []
        for values, layer in zip(scores[kind], previous.kept, strict=True):
            lowest = np.full_like(values, -np.inf)
            kept = list((layer or {}).get(kind, ()))
            lowest[kept] = values[kept]
            moved[kind].append(lowest)
    return moved


def _check_nested(kept: Sequence[Mapping[str, tuple[int, ...]] | None], previous: Plan) -> None:
    for index, (now, before) in enumerate(zip(kept, previous.kept, strict=True)):
        for kind, ids in (now or {}).items():
            if not set(ids) <= set((before or {}).get(kind, ())):
                raise InputError(
                    f"layer {index}, {kind}: the target keeps more units than the step before left"
                )


def check_iterative(kinds: Sequence[str]) -> None:
    """Refuse to re-estimate units that cannot be scored with removed ones set to zero.

    Raises:
        InputError: blocks, which are ranked at once, or residual channels, whose norms would count
            the zeros in.
    """
    if kinds[0] in (*DEPTH_KINDS, RESIDUAL):
        raise InputError(
            f"iterative_steps: not for {kinds[0]} units; allowed: methods that prune heads and MLP "
            "channels"
        )


def _highest(scores: npt.NDArray[np.float64], dropped: int) -> tuple[int, ...]:
    """Return the units that stay when the ``dropped`` lowest go, in order."""
    order = np.argsort(scores, kind="stable")
    return tuple(sorted(int(unit) for unit in order[dropped:]))


def _dropped(
    scores: Scores, family: Family, config: Config, target: Target, rule: Rule
) -> dict[tuple[int, str], int]:
    """Return how many of the lowest units go, by (layer, kind)."""
    layers, rule = prunable_layers(family, config, target), rule.within(target)
    if rule.ranking == "local":
        counts = local_counts(family, config, target, rule)
        return {(layer, kind): n for layer in layers for kind, n in counts.items()}
    return _global_counts(scores, family, config, target, rule)


def _global_counts(
    scores: Scores, family: Family, config: Config, target: Target, rule: Rule
) -> dict[tuple[int, str], int]:
    """Cut one list of all units at the place that comes nearest to the target."""
    layers = prunable_layers(family, config, target)
    places = [(layer, kind) for layer in layers for kind in rule.kinds]
    shapes = family.layer_shapes(config)
    units = {kind: family.kind(config, kind) for kind in rule.kinds}
    costs = {kind: unit.cost(shapes) for kind, unit in units.items()}
    owner = np.concatenate([np.full(units[k].count, i) for i, (_, k) in enumerate(places)])
    values = np.concatenate([scores[kind][layer] for layer, kind in places])
    ranked = owner[np.argsort(values, kind="stable")]

    def cut(length: int) -> dict[tuple[int, str], int]:
        raw = np.bincount(ranked[:length], minlength=len(places))
        result = {}
        for place, number in zip(places, raw, strict=True):
            multiple = _granularity(place[1], rule)
            total = units[place[1]].count
            result[place] = min(
                _round_dropped(total, int(number), multiple), _most_dropped(total, multiple)
            )
        return result

    if target.kind == "groups":
        return cut(math.floor(len(ranked) * Fraction(str(target.value))))

    budget = target.value * family.parameters(config)

    def removed(length: int) -> float:
        return sum(n * costs[kind] for (_, kind), n in cut(length).items())

    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        if removed(middle) < budget:
            low = middle + 1
        else:
            high = middle
    return cut(
        min((low - 1, low), key=lambda n: abs(removed(max(n, 0)) - budget) if n >= 0 else math.inf)
    )


def _check_scores(scores: Scores, family: Family, config: Config, rule: Rule) -> None:
    count = family.dimensions(config).layers
    for kind in rule.kinds:
        if kind not in scores:
            raise InputError(f"scores: kind {kind!r} is missing; given: {', '.join(scores)}")
        arrays = scores[kind]
        if kind in DEPTH_KINDS:
            expected = (1, count)
        else:
            unit = family.kind(config, kind)
            expected = (1 if unit.whole else count, unit.count)
        if len(arrays) != expected[0] or any(a.shape != (expected[1],) for a in arrays):
            raise InputError(f"scores: {kind} must be {expected[0]} arrays of {expected[1]} scores")
        for layer, array in enumerate(arrays):
            bad = np.flatnonzero(~np.isfinite(array))
            if len(bad):
                where = f"{kind} {bad[0]}"
                if expected[0] > 1:
                    where = f"layer {layer}, {where}"
                raise NonFiniteError(f"scores: {where} is {array[bad[0]]}")
