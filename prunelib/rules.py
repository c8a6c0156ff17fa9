"""How much is to go and how units are ranked: targets, and the rules of methods.

A target is one of
* ``groups``: the share of the units of every kind in every prunable layer, with LLM-Pruner's
  integer arithmetic (``dropped = C - int(C * (1 - ratio))``, whole heads only), or in the model;
* ``parameters``: the share of all parameters to remove, solved for; the realised share is in the
  plan;
* ``blocks``: a number of whole blocks (or of their attentions or MLPs);
* ``layers``: the number of layers of a model that is made deeper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prunelib.errors import InputError
from prunelib.plan import SharedBlock, Sharing

if TYPE_CHECKING:
    from prunelib.families.base import Config, Family

Scores = Mapping[str, Sequence[npt.NDArray[np.float64]]]
TARGET_KINDS = ("parameters", "groups", "blocks", "layers")
RANKINGS = ("local", "global")
ORDERS = ("block", "sequential")
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


def rank_in(rank: float, family: Family, config: Config) -> int:
    """Return the rank in a model: a whole number, or a share of the residual stream's width."""
    if isinstance(rank, float):
        return max(round(rank * family.dimensions(config).hidden), 1)
    return rank


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
        return rank_in(self.rank, family, config)

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
