"""What a pruning method is: hyper-parameters, citation, and how it composes the parts.

A method is one file of this package: a frozen dataclass that derives from ``Method`` and is named
``METHOD`` in its module. Its fields are its hyper-parameters; a catalogue entry names the module
and gives values to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from prunelib.criteria.fold import Array
from prunelib.errors import InputError
from prunelib.families.base import RESIDUAL
from prunelib.plan import DEPTH_KINDS
from prunelib.rules import Rule, Scores
from prunelib.selection import check_iterative

if TYPE_CHECKING:
    import torch

    from prunelib.families.base import Config, Family, UnitKind, UnitSlice

HEAD_KINDS = ("kv_group", "query_slot")


@dataclass(frozen=True, eq=False)
class ScoringInputs:
    """All that a method may look at.

    Attributes:
        family: the model's family.
        config: config.json of the unpruned model.
        weight: returns one tensor of the checkpoint by its full name, on the CPU.
        statistics: per pass, its tensors by name (only the passes that the method names).
        seed: the run's seed.
    """

    family: Family
    config: Config
    weight: Callable[[str], torch.Tensor]
    statistics: Mapping[str, Mapping[str, torch.Tensor]]
    seed: int

    @property
    def layer_count(self) -> int:
        """Number of layers of the unpruned model."""
        return self.family.dimensions(self.config).layers

    def places(self, kind: str) -> Sequence[int | None]:
        """Return where units of ``kind`` are: in every layer, or once in the model (None)."""
        whole = self.family.kind(self.config, kind).whole
        return (None,) if whole else range(self.layer_count)

    def full_name(self, layer: int | None, part: UnitSlice) -> str:
        """Return the full name of the parameter of a slice in a layer or in the whole model."""
        prefix = "" if layer is None else f"{self.family.layer_prefix}.{layer}."
        return prefix + part.parameter


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods.

    Attributes:
        ranking: ``local`` (per layer) or ``global`` (all layers together).
        round_to: kept MLP channels per layer, or residual channels, are a multiple of this.
        strategy: what is pruned: ``block`` (heads and MLP channels of every layer) or, with
            methods that offer it, ``channel`` (channels of the residual stream).
        heads: what attention is pruned by: ``kv_group``, or ``query_slot`` for models whose few
            kv heads allow nothing fine.
        statistics: passes over calibration data that the method needs; empty for data-free ones.
        iterative_steps: in how many equal steps the target is reached, each with statistics and
            scores of what the steps before left (LLM-Pruner's option of that name).
        strategies: the values of ``strategy`` that the method has scores for.
        seeded: whether scores depend on the seed even without calibration data.
        selection_fields: hyper-parameters that no score depends on; variants that differ in these
            alone share their scores.
        title: name for tables.
        citation: BibTeX.
    """

    ranking: str = "local"
    round_to: int = 1
    strategy: str = "block"
    heads: str = "kv_group"
    iterative_steps: int = 1

    strategies: ClassVar[tuple[str, ...]] = ("block",)
    seeded: ClassVar[bool] = False
    selection_fields: ClassVar[tuple[str, ...]] = ("ranking", "round_to", "iterative_steps")
    title: ClassVar[str]
    citation: ClassVar[str]

    @property
    def statistics(self) -> tuple[str, ...]:
        """A class attribute where hyper-parameters do not decide."""
        return ()

    @property
    def statistic_options(self) -> Mapping[str, Mapping[str, Any]]:
        """What passes are told, by their names: JSON values. Such a pass also gets the seed."""
        return {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Unit kinds that it prunes, coarse before fine; ``("block",)`` for depth pruning."""
        return (RESIDUAL,) if self.strategy == "channel" else (self.heads, "mlp_channel")

    def rule(self) -> Rule:
        """Return how this method's units are ranked; raises InputError on bad values."""
        if self.heads not in HEAD_KINDS:
            raise InputError(f"heads {self.heads!r} is unknown; allowed: {', '.join(HEAD_KINDS)}")
        if self.strategy not in self.strategies:
            allowed = ", ".join(self.strategies)
            raise InputError(
                f"strategy {self.strategy!r} is not of this method; allowed: {allowed}"
            )
        if self.strategy == "channel" and (self.heads, self.ranking) != (HEAD_KINDS[0], "local"):
            raise InputError(
                "strategy channel has one ranking and no heads; allowed: neither ranking nor heads"
            )
        if self.iterative_steps < 1:
            raise InputError(
                f"iterative_steps {self.iterative_steps} given; a whole number from 1 allowed"
            )
        if self.iterative_steps > 1:
            check_iterative(self.kinds)
        return Rule(self.kinds, self.ranking, self.round_to)

    @abstractmethod
    def scores(self, inputs: ScoringInputs) -> Scores:
        """Return one score per unit: per kind a list of float64 arrays, one per layer [units].

        Low scores are pruned first. Units of the whole model have one array [units]; block methods
        return one array [layers] under ``block``.
        """


@dataclass(frozen=True, kw_only=True)
class DepthMethod(Method):
    """Base of methods that remove blocks, or only their attention or MLP.

    Attributes:
        remove: ``block``, ``attention`` or ``mlp``.
        keep_first: first layers that stay whatever their scores.
        keep_last: last layers that stay.
    """

    remove: str = "block"
    keep_first: int = 0
    keep_last: int = 0

    def __post_init__(self) -> None:
        if self.remove not in DEPTH_KINDS:
            raise InputError(
                f"remove {self.remove!r} is unknown; allowed: {', '.join(DEPTH_KINDS)}"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """As ``remove`` says."""
        return (self.remove,)

    def rule(self) -> Rule:
        """Return what is removed, and what stays."""
        return replace(super().rule(), stay=(self.keep_first, self.keep_last))


def score_members(
    inputs: ScoringInputs,
    kinds: tuple[str, ...],
    member: Callable[[int | None, UnitSlice], Array],
    aggregate: Callable[[UnitKind, Callable[[UnitSlice], Array]], Array],
) -> dict[str, list[Array]]:
    """Score all units of ``kinds`` from scores of their members.

    Args:
        inputs: the scoring inputs.
        kinds: unit kinds.
        member: (layer, slice) to a score per position of the slice [positions]; the layer is None
            for units of the whole model.
        aggregate: combines the members of a kind into [units].
    """
    units = {name: inputs.family.kind(inputs.config, name) for name in kinds}
    return {
        name: [
            aggregate(kind, lambda part, layer=layer: np.asarray(member(layer, part)))  # type: ignore[misc]
            for layer in inputs.places(name)
        ]
        for name, kind in units.items()
    }
