"""The pruning plan: which units every layer keeps, as data.

A plan is all that surgery, checkpoints, exports and reports need to know of a method's decision.
It is written as JSON beside every pruned checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from prunelib.errors import InputError

VERSION = 1
FILE_NAME = "plan.json"
_KEYS = {
    "version",
    "family",
    "model_type",
    "layers",
    "kept",
    "removed_blocks",
    "original",
    "parameters",
    "target",
    "produced_by",
    "shared",
    "skipped",
    "merged",
    "emulated",
}
# Parts of a block that can go by themselves.
PARTS = ("attention", "mlp")
# What is ranked over all layers at once, one score per layer.
DEPTH_KINDS = ("block", *PARTS)
# Names among scores of the map that emulates a block: bias, and the two factors.
EMULATION = ("emulation_bias", "emulation_a", "emulation_b")


@dataclass(frozen=True)
class SharedBlock:
    """A layer of the new model that has no weights of its own but adapters on another block's.

    Attributes:
        place: its index among the layers of the new model.
        base: original index of the block whose weights it uses.
        like: original index of the block that it stands for: a removed one, or, where it repeats
            its base, that one.
    """

    place: int
    base: int
    like: int


@dataclass(frozen=True)
class Sharing:
    """The layers that share another block's weights, and what they add to them (FlexiGPT).

    Attributes:
        blocks: the layers, by place.
        rank: of the adapters; a matrix that has no such rank gets its full one.
        gain: initial gain of the normalised outputs of attention and MLP; None where outputs are
            not normalised.
        svd: whether the adapters begin as the truncated difference to what the layer stands for,
            or else at zero.
        seed: of random factors.
        parameters: what all these layers add: adapters, gains, and vectors of their own.
    """

    blocks: tuple[SharedBlock, ...]
    rank: int
    gain: float | None
    svd: bool
    seed: int
    parameters: int

    def __post_init__(self) -> None:
        places = [block.place for block in self.blocks]
        if not places or places != sorted(set(places)) or places[0] < 0:
            raise InputError("plan: shared blocks must have increasing places, at least one")
        if self.rank < 1:
            raise InputError(f"plan: shared rank {self.rank} given; at least 1 allowed")

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-serialisable data."""
        return asdict(self) | {"blocks": [asdict(block) for block in self.blocks]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sharing:
        """Read it back; raises KeyError, TypeError, ValueError or InputError."""
        gain = data["gain"]
        names = ("place", "base", "like")
        return cls(
            tuple(SharedBlock(*(int(block[name]) for name in names)) for block in data["blocks"]),
            int(data["rank"]),
            None if gain is None else float(gain),
            bool(data["svd"]),
            int(data["seed"]),
            int(data["parameters"]),
        )


@dataclass(frozen=True)
class MergedBlock:
    """A layer whose matrices are a sum of several blocks' (LaCo); its norms stay its own.

    Attributes:
        base: original index of the layer, which stays.
        terms: original indices, increasing, and the factors of their matrices; these add up to 1.
    """

    base: int
    terms: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        blocks = [block for block, _ in self.terms]
        if not blocks or blocks != sorted(set(blocks)):
            raise InputError(f"plan: the terms of layer {self.base} must be increasing")
        total = math.fsum(factor for _, factor in self.terms)
        if not abs(total - 1) < 1e-6:
            raise InputError(f"plan: the factors of layer {self.base} add up to {total}, not to 1")

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-serialisable data."""
        return {"base": self.base, "terms": [list(term) for term in self.terms]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MergedBlock:
        """Read it back; raises KeyError, TypeError, ValueError or InputError."""
        terms = ((int(block), float(factor)) for block, factor in data["terms"])
        return cls(int(data["base"]), tuple(terms))


def merged_layers(order: Sequence[int], bases: Sequence[int]) -> tuple[MergedBlock, ...]:
    """Return the sums of matrices that merging blocks in order amounts to (LaCo).

    Blocks that follow each other in the order and have the same base are merged into it at once:
    ``W = W_b + sum_k (W_k - W_b)`` (arXiv 2402.11187, equation 1), where any of them may be a sum
    already.

    Args:
        order: blocks as they are merged.
        bases: for each of them, the layer that it is merged into.
    """
    sums: dict[int, dict[int, float]] = {}
    for base, group in groupby(zip(order, bases, strict=True), key=itemgetter(1)):
        before = sums.get(base, {base: 1.0})
        after = dict(before)
        for block, _ in group:
            for index, factor in sums.pop(block, {block: 1.0}).items():
                after[index] = after.get(index, 0.0) + factor
            for index, factor in before.items():
                after[index] -= factor
        sums[base] = after
    return tuple(
        MergedBlock(base, tuple((i, f) for i, f in sorted(terms.items()) if f))
        for base, terms in sorted(sums.items())
    )


@dataclass(frozen=True)
class EmulatedBlock:
    """A layer of the new model that stands for a removed block.

    Attributes:
        place: its index among the layers of the new model.
        like: original index of the removed block.
    """

    place: int
    like: int


@dataclass(frozen=True)
class Emulation:
    """Removed blocks in whose place the residual stream gets ``bias + A B h``.

    Attributes:
        blocks: the layers, by place.
        rank: of A and B; 0 where there is the bias alone.
        parameters: what all these layers hold.
    """

    blocks: tuple[EmulatedBlock, ...]
    rank: int
    parameters: int

    def __post_init__(self) -> None:
        places = [block.place for block in self.blocks]
        if not places or places != sorted(set(places)) or places[0] < 0:
            raise InputError("plan: emulated blocks must have increasing places, at least one")
        if self.rank < 0:
            raise InputError(f"plan: emulated rank {self.rank} given; from 0 allowed")

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-serialisable data."""
        return asdict(self) | {"blocks": [asdict(block) for block in self.blocks]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Emulation:
        """Read it back; raises KeyError, TypeError, ValueError or InputError."""
        blocks = (EmulatedBlock(int(b["place"]), int(b["like"])) for b in data["blocks"])
        return cls(tuple(blocks), int(data["rank"]), int(data["parameters"]))


@dataclass(frozen=True)
class Plan:
    """A frozen pruning decision.

    Attributes:
        family: name of the model family.
        model_type: ``model_type`` of the model that the plan is for.
        kept: per original layer, the kept unit ids by kind (sorted), or None for a removed block.
        units: number of units of each kind in an unpruned layer, or in the whole model.
        parameters: total parameters before and after.
        target: what was asked for (kind, value, protected layers).
        produced_by: method, hyper-parameters, seed.
        whole: the kept unit ids (sorted) of the kinds that run through the whole model.
        sharing: the layers that use other blocks' weights, if any.
        skipped: by part of a block (``PARTS``), the layers that lose it alone.
        merged: the layers whose matrices are sums of several blocks', by index.
        emulation: what stands in the place of removed blocks and is no block, if anything.
    """

    family: str
    model_type: str
    kept: tuple[Mapping[str, tuple[int, ...]] | None, ...]
    units: Mapping[str, int]
    parameters: tuple[int, int]
    target: Mapping[str, Any] = field(default_factory=dict)
    produced_by: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sharing: Sharing | None = None
    skipped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    merged: tuple[MergedBlock, ...] = ()
    emulation: Emulation | None = None

    def __post_init__(self) -> None:
        if all(layer is None for layer in self.kept):
            raise InputError("plan: every block is removed; at least one must stay")
        for index, layer in enumerate(self.kept):
            for kind, ids in (layer or {}).items():
                self._check_units(f"plan: layer {index}, {kind}", kind, ids)
        for kind, ids in self.whole.items():
            self._check_units(f"plan: {kind}", kind, ids)
        if (self.sharing or self.skipped) and (self.units or self.whole):
            raise InputError("plan: shared blocks and removed parts need all other units whole")
        self._check_sharing()
        self._check_skipped()
        self._check_merged()
        self._check_emulation()

    def _check_sharing(self) -> None:
        blocks = self.sharing.blocks if self.sharing else ()
        count = len(self.kept_layers) + len(blocks)
        for block in blocks:
            if block.base not in self.kept_layers:
                raise InputError(f"plan: shared block {block.base} is not one that stays")
            if not 0 <= block.like < len(self.kept) or block.place >= count:
                raise InputError(f"plan: the shared block at place {block.place} is out of range")
        if blocks and self.skipped:
            raise InputError("plan: shared blocks and removed parts of blocks do not go together")

    def _check_skipped(self) -> None:
        for part, layers in self.skipped.items():
            if part not in PARTS:
                raise InputError(f"plan: unknown part {part!r}; allowed: {', '.join(PARTS)}")
            if list(layers) != sorted(set(layers)) or not set(layers) <= set(self.kept_layers):
                raise InputError(f"plan: layers without {part} must be increasing and stay")

    def _check_merged(self) -> None:
        bases = [layer.base for layer in self.merged]
        if bases != sorted(set(bases)) or not set(bases) <= set(self.kept_layers):
            raise InputError("plan: merged layers must be increasing and stay")
        for layer in self.merged:
            if layer.terms[0][0] < 0 or layer.terms[-1][0] >= len(self.kept):
                raise InputError(f"plan: the terms of layer {layer.base} are out of range")
        if bases and (self.units or self.whole or self.sharing or self.skipped):
            raise InputError("plan: merged layers go with removed blocks alone")

    def _check_emulation(self) -> None:
        blocks = self.emulation.blocks if self.emulation else ()
        count = len(self.kept_layers) + len(blocks)
        for block in blocks:
            if block.like not in self.removed_blocks or block.place >= count:
                raise InputError(f"plan: the emulated block at place {block.place} is out of range")
        if blocks and (self.units or self.whole or self.sharing or self.skipped or self.merged):
            raise InputError("plan: emulated blocks go with removed blocks alone")

    def _check_units(self, where: str, kind: str, ids: tuple[int, ...]) -> None:
        if kind not in self.units:
            raise InputError(f"{where}: unknown kind; allowed: {', '.join(self.units)}")
        if not ids:
            raise InputError(f"{where}: no unit is kept; at least one must stay")
        if list(ids) != sorted(set(ids)):
            raise InputError(f"{where}: unit ids must be increasing and without repeats")
        if ids[0] < 0 or ids[-1] >= self.units[kind]:
            raise InputError(f"{where}: unit ids must lie in 0..{self.units[kind] - 1}")

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Original indices of the layers that stay."""
        return tuple(i for i, layer in enumerate(self.kept) if layer is not None)

    @property
    def removed_blocks(self) -> tuple[int, ...]:
        """Original indices of the blocks that are removed as a whole."""
        return tuple(i for i, layer in enumerate(self.kept) if layer is None)

    @property
    def layers(self) -> tuple[int | SharedBlock | EmulatedBlock, ...]:
        """The layers of the new model: original indices, or what stands in other blocks' place."""
        others: dict[int, SharedBlock | EmulatedBlock] = {}
        if self.sharing:
            others |= {block.place: block for block in self.sharing.blocks}
        if self.emulation:
            others |= {block.place: block for block in self.emulation.blocks}
        own = iter(self.kept_layers)
        count = len(self.kept_layers) + len(others)
        return tuple(others[place] if place in others else next(own) for place in range(count))

    @property
    def places(self) -> dict[int, int]:
        """Places in the new model of the layers that stay, by original index."""
        return {layer: place for place, layer in enumerate(self.layers) if isinstance(layer, int)}

    @property
    def removed_ratio(self) -> float:
        """Parameters removed over all parameters, net of what stands in removed blocks' place."""
        before, after = self.parameters
        return (before - after) / before

    @property
    def gross_removed_ratio(self) -> float:
        """Parameters removed over all parameters; what stands in their place is not counted."""
        before, after = self.parameters
        added = self.sharing or self.emulation
        return (before - after + (added.parameters if added else 0)) / before

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-serialisable data."""
        before, after = self.parameters
        # Left out where there is none, so that most plans read as they always did.
        whole = {kind: list(ids) for kind, ids in self.whole.items()}
        skipped = {part: list(layers) for part, layers in self.skipped.items()}
        gross: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        if self.sharing:
            shared = {"shared": self.sharing.to_dict()}
            gross = {"shared": self.sharing.parameters, "gross_ratio": self.gross_removed_ratio}
        more = shared | ({"skipped": skipped} if skipped else {})
        if self.merged:
            more["merged"] = [layer.to_dict() for layer in self.merged]
        if self.emulation:
            more["emulated"] = self.emulation.to_dict()
            gross = {
                "emulated": self.emulation.parameters,
                "gross_ratio": self.gross_removed_ratio,
            }
        return (
            ({"kept": whole} if whole else {})
            | more
            | {
                "version": VERSION,
                "family": self.family,
                "model_type": self.model_type,
                "original": {"num_hidden_layers": len(self.kept), "units": dict(self.units)},
                "parameters": {
                    "original": before,
                    "remaining": after,
                    "removed_ratio": self.removed_ratio,
                    **gross,
                },
                "target": dict(self.target),
                "produced_by": dict(self.produced_by),
                "removed_blocks": list(self.removed_blocks),
                "layers": [
                    {"index": i, "kept": {kind: list(ids) for kind, ids in layer.items()}}
                    for i, layer in enumerate(self.kept)
                    if layer is not None
                ],
            }
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read a plan back, refusing anything that is not one.

        Raises:
            InputError: unknown version or key, a layer twice, units out of range.
        """
        if not isinstance(data, Mapping) or data.get("version") != VERSION:
            raise InputError(f"plan: version {VERSION} expected")
        if unknown := set(data) - _KEYS:
            raise InputError(f"plan: unknown keys {', '.join(sorted(unknown))}")
        try:
            count = int(data["original"]["num_hidden_layers"])
            kept: list[dict[str, tuple[int, ...]] | None] = [None] * count
            for layer in data["layers"]:
                index = layer["index"]
                if not 0 <= index < count or kept[index] is not None:
                    raise InputError(f"plan: layer {index} is out of range or given twice")
                kept[index] = {k: tuple(map(int, ids)) for k, ids in layer["kept"].items()}
            plan = cls(
                family=str(data["family"]),
                model_type=str(data["model_type"]),
                kept=tuple(kept),
                units={k: int(n) for k, n in data["original"]["units"].items()},
                parameters=(
                    int(data["parameters"]["original"]),
                    int(data["parameters"]["remaining"]),
                ),
                target=dict(data["target"]),
                produced_by=dict(data["produced_by"]),
                whole={k: tuple(map(int, ids)) for k, ids in data.get("kept", {}).items()},
                sharing=Sharing.from_dict(data["shared"]) if "shared" in data else None,
                skipped={k: tuple(map(int, ids)) for k, ids in data.get("skipped", {}).items()},
                merged=tuple(MergedBlock.from_dict(layer) for layer in data.get("merged", [])),
                emulation=Emulation.from_dict(data["emulated"]) if "emulated" in data else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"plan: malformed ({type(error).__name__}: {error})") from error
        if list(plan.removed_blocks) != sorted(data.get("removed_blocks", [])):
            raise InputError("plan: removed_blocks and layers disagree")
        return plan

    def save(self, directory: Path) -> None:
        """Write ``plan.json`` into ``directory``."""
        text = json.dumps(self.to_dict(), sort_keys=True, indent=None, separators=(",", ":"))
        (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Plan:
        """Read ``plan.json`` from ``directory``.

        Raises:
            InputError: the file is missing or is not a plan.
        """
        path = directory / FILE_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such plan") from error
        except (ValueError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not JSON ({error})") from error
        return cls.from_dict(data)
