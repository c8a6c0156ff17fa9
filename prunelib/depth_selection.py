"""Scores of blocks and a target to what becomes of the blocks.

A method may put in the place of every removed block another one's weights with low-rank adapters
(FlexiGPT). A share of parameters is then net: what the adapters add counts against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from prunelib.errors import InputError, NonFiniteError
from prunelib.plan import EmulatedBlock, Emulation, MergedBlock, SharedBlock, Sharing, merged_layers
from prunelib.rules import BASE, DISTANCE, Rule, Scores, Sharer, Target

if TYPE_CHECKING:
    from prunelib.families.base import Config, Family


@dataclass(frozen=True)
class Blocks:
    """What becomes of a model's blocks; in the terms of ``Plan``.

    Attributes:
        removed: blocks that go.
        skipped: layers that lose their attention or their MLP, by part.
        sharing: what stands in the place of blocks, or repeats them.
        merged: what others are merged into.
        emulation: of removed blocks, by linear maps.
    """

    removed: tuple[int, ...] = ()
    skipped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sharing: Sharing | None = None
    merged: tuple[MergedBlock, ...] = ()
    emulation: Emulation | None = None


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


def repeated_blocks(family: Family, config: Config, target: Target, rule: Rule) -> Blocks:
    """Return the repetitions of a method that makes the model deeper."""
    assert rule.repeat is not None
    assert rule.sharer is not None
    count = family.dimensions(config).layers
    wanted = int(target.value) if target.kind == "layers" else count
    blocks = rule.repeat.blocks(count, wanted)
    return Blocks(sharing=rule.sharer.sharing(family, config, blocks) if blocks else None)


def lowest_blocks(
    scores: Scores, family: Family, config: Config, target: Target, rule: Rule
) -> Blocks:
    """Return the blocks (or parts of blocks) of the lowest scores, and what takes their place.

    Raises:
        InputError: scores do not say what blocks are merged into or replaced by.
        NonFiniteError: a distance is NaN or infinite.
    """
    (kind,) = rule.kinds
    candidates = np.array(rule.removable(family.dimensions(config).layers), dtype=np.int64)
    order = candidates[np.argsort(scores[kind][0][candidates], kind="stable")]
    lowest = [int(i) for i in order[: block_count(family, config, target, rule)]]
    gone = tuple(sorted(lowest))
    emulation = None
    if rule.emulate is not None and gone:
        # Nothing moves.
        emulation = Emulation(
            tuple(EmulatedBlock(index, index) for index in gone),
            rule.emulate,
            len(gone) * emulated_parameters(family, config, rule.emulate),
        )
    return Blocks(
        removed=gone if kind == "block" else (),
        skipped={kind: gone} if kind != "block" and gone else {},
        sharing=_shared(gone, scores, family, config, rule.sharer) if rule.sharer else None,
        merged=_merged(lowest, scores) if rule.merge else (),
        emulation=emulation,
    )
