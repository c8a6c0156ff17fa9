"""Scores and a target to a plan: which units go.

Local ranking removes the same number of the lowest units in every layer that is not protected
(LLM-Pruner section 3.3); global ranking puts all units of all kinds into one list, each counted as
one unit with its raw score, as the public LLM-Pruner code does. Units that run through the whole
model (residual channels) have one ranking, and no layer is protected from them.

A target is one of
* ``groups``: the share of the units of every kind in every prunable layer, with LLM-Pruner's
  integer arithmetic (``dropped = C - int(C * (1 - ratio))``, whole heads only), or in the model;
* ``parameters``: the share of all parameters to remove, solved for; the realised share is in the
  plan;
* ``blocks``: a number of whole blocks (or of their attentions or MLPs);
* ``layers``: the number of layers of a model that is made deeper.

A method may put in the place of every removed block another one's weights with low-rank adapters
(FlexiGPT). A share of parameters is then net: what the adapters add counts against it.

Nothing here imports torch; the workflow calls ``check_reachable`` before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prunelib.errors import InputError, NonFiniteError
from prunelib.families.base import RESIDUAL
from prunelib.plan import (
    PARTS,
    EmulatedBlock,
    Emulation,
    MergedBlock,
    Plan,
    SharedBlock,
    Sharing,
    merged_layers,
)
from prunelib.surgery import remaining_parameters

if TYPE_CHECKING:
    from prunelib.families.base import Config, Family

Scores = Mapping[str, Sequence[npt.NDArray[np.float64]]]
TARGET_KINDS = ("parameters", "groups", "blocks", "layers")
RANKINGS = ("local", "global")
ORDERS = ("block", "sequential")
# Units that are ranked over all layers at once, one score per layer.
DEPTH_KINDS = ("block", *PARTS)
# Scores beside those of blocks: per block, its distance to every other one, and the layer that it
# is merged into, -1 where it is not.
DISTANCE = "distance"
BASE = "base"


@dataclass(frozen=True)
class Target:
    """How much to remove, and where not.

    Attributes:
        kind: ``parameters``, ``groups``, ``blocks`` or ``layers``.
        value: a share in [0, 1), or a number of blocks or layers.
        protect_first: number of first layers whose units stay, or their share of all layers, in
            (0, 1), rounded down to whole layers.
        protect_last: the same of the last layers.
        protect_layers: indices of further layers whose units stay.
        only: the one unit kind that loses any, as ``mlp_channel``; None for all of the method's.
    """

    kind: str
    value: float
    protect_first: float = 0
    protect_last: float = 0
    protect_layers: Sequence[int] = ()
    only: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in TARGET_KINDS:
            raise InputError(
                f"target kind {self.kind!r} is unknown; allowed: {', '.join(TARGET_KINDS)}"
            )
        if self.kind in ("blocks", "layers"):
            if self.value != int(self.value) or self.value < 0:
                raise InputError(
                    f"target {self.kind}: {self.value} given; a whole number from 0 allowed"
                )
        elif not 0 <= self.value < 1:
            raise InputError(
                f"target {self.kind}: ratio {self.value} given; 0 <= ratio < 1 allowed"
            )
        for name, given in (("first", self.protect_first), ("last", self.protect_last)):
            if given < 0 or (given > 1 and given != int(given)):
                raise InputError(
                    f"target protect: {name} {given} given; a whole number from 0, or a share of "
                    "the layers below 1, allowed"
                )
        if any(layer < 0 for layer in self.protect_layers):
            raise InputError("target protect: layers must not be negative")
        # One target, one key: YAML tells 4 from 4.0, a reader does not.
        whole = self.kind in ("blocks", "layers")
        object.__setattr__(self, "value", int(self.value) if whole else float(self.value))
        for name in ("protect_first", "protect_last"):
            given = getattr(self, name)
            object.__setattr__(self, name, int(given) if given == int(given) else given)

    def to_dict(self) -> dict[str, Any]:
        """Return the target as JSON-serialisable data, that of its constructor.

        ``protect_layers`` and ``only`` are left out where there are none, so that plans and keys of
        all other targets read as they always did.
        """
        data = asdict(self) | {"protect_layers": list(self.protect_layers)}
        return {k: v for k, v in data.items() if v or k not in ("protect_layers", "only")}

    @property
    def protects(self) -> bool:
        """Whether any layer is named."""
        return bool(self.protect_first or self.protect_last or self.protect_layers)

    def protected(self, count: int) -> set[int]:
        """Return the indices of the protected ones of ``count`` layers.

        Raises:
            InputError: a layer is named that the model does not have.
        """
        if beyond := [layer for layer in self.protect_layers if layer >= count]:
            raise InputError(
                f"target protect: layer {beyond[0]} given; the model has layers 0..{count - 1}"
            )
        first, last = (
            # The share is the decimal that was written: 0.29 of 100 layers are 29.
            math.floor(count * Fraction(str(given))) if 0 < given < 1 else int(given)
            for given in (self.protect_first, self.protect_last)
        )
        ends = {*range(min(first, count)), *range(max(count - last, 0), count)}
        return ends | set(self.protect_layers)


@dataclass(frozen=True)
class Sharer:
    """What layers that share another block's weights add to them.

    Attributes:
        rank: of the adapters: a number, or a share of the residual stream's width in (0, 1].
        gain: initial gain of normalised outputs; None where they are not normalised.
        svd: whether adapters begin as the truncated difference to the removed block.
        seed: of random factors.
    """

    rank: float
    gain: float | None
    svd: bool
    seed: int = 0

    def __post_init__(self) -> None:
        share = isinstance(self.rank, float)
        if isinstance(self.rank, bool) or not (0 < self.rank <= 1 if share else self.rank >= 1):
            raise InputError(
                f"rank {self.rank!r} given; a whole number from 1, or a share in (0, 1], allowed"
            )
        if self.gain is not None and not (math.isfinite(self.gain) and self.gain > 0):
            raise InputError(f"gain {self.gain} given; a number above 0 allowed")

    def rank_of(self, family: Family, config: Config) -> int:
        """Return the rank in a model."""
        if isinstance(self.rank, float):
            return max(round(self.rank * family.dimensions(config).hidden), 1)
        return self.rank

    def parameters(self, family: Family, config: Config) -> int:
        """Return the parameters that one such layer adds."""
        rank = self.rank_of(family, config)
        return family.shared_parameters(config, rank, self.gain is not None)

    def sharing(self, family: Family, config: Config, blocks: Sequence[SharedBlock]) -> Sharing:
        """Return what a plan says of the layers ``blocks``."""
        return Sharing(
            blocks=tuple(blocks),
            rank=self.rank_of(family, config),
            gain=self.gain,
            svd=self.svd,
            seed=self.seed,
            parameters=len(blocks) * self.parameters(family, config),
        )


@dataclass(frozen=True)
class Repeat:
    """Which blocks a deeper model repeats (arXiv 2501.14713, section 3.4).

    Attributes:
        start: first block that is repeated.
        end: last block that is repeated.
        order: ``block`` (a a b b c c) or ``sequential`` (a b c a b c).
    """

    start: int
    end: int
    order: str = "block"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise InputError(f"order {self.order!r} is unknown; allowed: {', '.join(ORDERS)}")
        if not 0 <= self.start <= self.end:
            raise InputError(f"start {self.start}, end {self.end} given; 0 <= start <= end allowed")

    def blocks(self, layers: int, count: int) -> list[SharedBlock]:
        """Return the repetitions that make ``count`` layers of ``layers``.

        Raises:
            InputError: the model has no such blocks, or that is no whole number of repetitions.
        """
        if self.end >= layers:
            raise InputError(f"end {self.end} given; the model has blocks 0..{layers - 1}")
        repeated = range(self.start, self.end + 1)
        times, rest = divmod(count - layers, len(repeated))
        if rest or times < 0:
            raise InputError(
                f"target layers {count}: repeating blocks {self.start}..{self.end} adds a multiple "
                f"of {len(repeated)} to {layers} layers; allowed: "
                f"{layers + len(repeated)}, {layers + 2 * len(repeated)}, ..."
            )
        if self.order == "sequential":
            order = [*range(self.end + 1), *list(repeated) * times, *range(self.end + 1, layers)]
        else:
            order = [i for i in range(layers) for _ in range(times + 1 if i in repeated else 1)]
        seen: set[int] = set()
        shared = []
        for place, block in enumerate(order):
            if block in seen:
                shared.append(SharedBlock(place, block, block))
            seen.add(block)
        return shared


@dataclass(frozen=True)
class Rule:
    """How units are ranked.

    Attributes:
        kinds: unit kinds that are pruned, coarse before fine (``kv_group``, ``mlp_channel``); one
            that runs through the whole model is alone.
        ranking: ``local`` or ``global``.
        round_to: kept MLP channels per layer, or residual channels, are a multiple of this.
        sharer: what stands in the place of removed blocks, or repeats them; None: nothing.
        repeat: which blocks are repeated, by a method that removes none.
        stay: numbers of first and last layers whose blocks stay, whatever their scores.
        most: the share of all layers whose blocks may go, rounded down.
        merge: whether removed blocks are merged into others, as scores say.
        emulate: rank of the map in the place of removed blocks, 0 for a bias; None: nothing.
    """

    kinds: tuple[str, ...]
    ranking: str = "local"
    round_to: int = 1
    sharer: Sharer | None = None
    repeat: Repeat | None = None
    stay: tuple[int, int] = (0, 0)
    most: float = 1.0
    merge: bool = False
    emulate: int | None = None

    def __post_init__(self) -> None:
        if min(self.stay) < 0:
            raise InputError(f"keep_first {self.stay[0]}, keep_last {self.stay[1]}: from 0 allowed")
        if not 0 < self.most <= 1:
            raise InputError(f"most {self.most} given; a share of the blocks in (0, 1] allowed")
        if self.ranking not in RANKINGS:
            raise InputError(f"ranking {self.ranking!r} is unknown; allowed: {', '.join(RANKINGS)}")
        if self.round_to < 1:
            raise InputError(f"round_to {self.round_to} given; a whole number from 1 allowed")

    def within(self, target: Target) -> Rule:
        """Return the rule for the unit kinds that the target reaches.

        Raises:
            InputError: the method prunes no such units.
        """
        if target.only is None:
            return self
        if target.only not in self.kinds:
            raise InputError(
                f"target only: {target.only!r} given; of this method allowed: "
                f"{', '.join(self.kinds)}"
            )
        return replace(self, kinds=(target.only,))

    def removable(self, count: int) -> list[int]:
        """Return the layers, of ``count``, whose blocks (or parts of blocks) may go."""
        first, last = self.stay
        return list(range(count))[first : max(count - last, 0)]


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


def block_count(family: Family, config: Config, target: Target, rule: Rule) -> int:
    """Return the number of blocks (or parts of blocks) to remove: the one nearest to the target.

    A ``groups`` ratio is a share of the blocks, a ``parameters`` ratio a share of all parameters,
    net of what stands in the place of a removed block.

    Raises:
        InputError: what stands in a block's place is no smaller than the block.
    """
    if target.kind == "blocks":
        return int(target.value)
    if target.kind == "groups":
        return round(target.value * family.dimensions(config).layers)
    each = family.part_parameters(config, rule.kinds[0])
    if rule.sharer is not None:
        added = rule.sharer.parameters(family, config)
        if added >= each:
            raise InputError(
                f"rank {rule.sharer.rank_of(family, config)}: adapters and vectors of a block have "
                f"{added:,} parameters, the block {each:,}; a smaller rank allowed"
            )
        each -= added
    if rule.emulate is not None:
        each -= emulated_parameters(family, config, rule.emulate)
        if each <= 0:
            raise InputError(
                f"rank {rule.emulate}: what emulates a block has no fewer parameters than the "
                "block; a smaller rank allowed"
            )
    return round(target.value * family.parameters(config) / each)


def emulated_parameters(family: Family, config: Config, rank: int) -> int:
    """Return the parameters of what emulates one block: a bias and two factors."""
    return family.dimensions(config).hidden * (1 + 2 * rank)


def _merged(removed: Sequence[int], scores: Scores) -> tuple[MergedBlock, ...]:
    """Return the merged layers when ``removed`` blocks go, in this order."""
    bases = [int(scores[BASE][0][block]) for block in removed]
    if -1 in bases:
        raise InputError(
            f"target: {len(removed)} blocks are to be merged; at this threshold at most "
            f"{bases.index(-1)} are. A lower threshold or target allowed"
        )
    return merged_layers(removed, bases)


def _bases(removed: Sequence[int], distances: Sequence[npt.NDArray[np.float64]]) -> dict[int, int]:
    """Return for every removed block the nearest one that stays; ties go to the closer index."""
    stay = [j for j in range(len(distances)) if j not in set(removed)]
    return {i: min(stay, key=lambda j: (distances[i][j], abs(i - j), j)) for i in removed}


def _shared(
    removed: Sequence[int], scores: Scores, family: Family, config: Config, sharer: Sharer
) -> Sharing | None:
    """Return what stands in the place of the removed blocks."""
    count = family.dimensions(config).layers
    distances = scores.get(DISTANCE, ())
    if len(distances) != count or any(len(row) != count for row in distances):
        raise InputError(f"scores: {DISTANCE} must be {count} arrays of {count} distances")
    for i in removed:
        bad = [j for j in range(count) if j != i and not np.isfinite(distances[i][j])]
        if bad:
            raise NonFiniteError(f"scores: {DISTANCE} of blocks {i} and {bad[0]} is not finite")
    bases = _bases(removed, distances)
    # Nothing moves: a replaced block is where the removed one was.
    blocks = [SharedBlock(i, bases[i], i) for i in sorted(removed)]
    return sharer.sharing(family, config, blocks) if blocks else None


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
    depth = rule.kinds[0] in DEPTH_KINDS
    kinds = {} if depth else {k: family.kind(config, k) for k in rule.kinds}
    everything = {n: tuple(range(kind.count)) for n, kind in kinds.items() if not kind.whole}
    kept: list[dict[str, tuple[int, ...]] | None] = [dict(everything) for _ in range(count)]
    whole: dict[str, tuple[int, ...]] = {}
    sharing: Sharing | None = None
    skipped: dict[str, tuple[int, ...]] = {}
    merged: tuple[MergedBlock, ...] = ()
    emulation: Emulation | None = None
    if rule.repeat is not None:
        assert rule.sharer is not None
        wanted = int(target.value) if target.kind == "layers" else count
        if blocks := rule.repeat.blocks(count, wanted):
            sharing = rule.sharer.sharing(family, config, blocks)
    elif depth:
        candidates = np.array(rule.removable(count), dtype=np.int64)
        ranked = np.argsort(scores[rule.kinds[0]][0][candidates], kind="stable")
        order = candidates[ranked]
        lowest = [int(i) for i in order[: block_count(family, config, target, rule)]]
        gone = sorted(lowest)
        if rule.kinds == ("block",):
            for index in gone:
                kept[index] = None
        elif gone:
            skipped[rule.kinds[0]] = tuple(gone)
        if rule.merge:
            merged = _merged(lowest, scores)
        if rule.emulate is not None and gone:
            # Nothing moves.
            emulation = Emulation(
                tuple(EmulatedBlock(index, index) for index in gone),
                rule.emulate,
                len(gone) * emulated_parameters(family, config, rule.emulate),
            )
        if rule.sharer is not None:
            sharing = _shared(gone, scores, family, config, rule.sharer)
    elif len(everything) < len(kinds):
        for kind, dropped in local_counts(family, config, target, rule).items():
            whole[kind] = _highest(scores[kind][0], dropped)
    else:
        for (layer, kind), dropped in _dropped(scores, family, config, target, rule).items():
            layer_kept = kept[layer]
            assert layer_kept is not None
            layer_kept[kind] = _highest(scores[kind][layer], dropped)
    if previous is not None:
        _check_nested(kept, previous)
    return Plan(
        family=family.name,
        model_type=str(config["model_type"]),
        kept=tuple(kept),
        units={name: kind.count for name, kind in kinds.items()},
        parameters=(
            family.parameters(config),
            remaining_parameters(family, config, kept, whole, skipped)
            + (sharing.parameters if sharing else 0)
            + (emulation.parameters if emulation else 0),
        ),
        target=target.to_dict(),
        produced_by=dict(produced_by),
        whole=whole,
        sharing=sharing,
        skipped=skipped,
        merged=merged,
        emulation=emulation,
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
