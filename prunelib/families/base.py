"""What the rest of the library may know about a model family.

A family declares, for every kind of unit (what is removed as a whole), which slices of which
parameters belong to it. A slice is one axis of one parameter with an *owner* array: position ``j``
of that axis belongs to unit ``owner[j]``. Folding scores onto units is then a scatter-sum over the
owner array, and surgery keeps position ``j`` if unit ``owner[j]`` is kept, for every family alike.

Nothing here imports torch at module level: the workflow plans, counts and refuses with it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from prunelib.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

Config = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class UnitSlice:
    """One axis of one parameter of a layer, and the unit that owns each position of it.

    Attributes:
        parameter: name relative to the layer, e.g. ``self_attn.q_proj.weight``.
        axis: 0 for output rows (and biases), 1 for input columns.
        owner: int64 array over the positions of that axis.
    """

    parameter: str
    axis: int
    owner: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class UnitKind:
    """All units of one kind in one layer: a kv group, a query slot or an MLP channel.

    Attributes:
        name: of the kind.
        count: units per layer.
        slices: what the units own, in the order in which a forward pass uses the parameters, a
            bias behind its weight; criteria that look at the last member rely on it.
    """

    name: str
    count: int
    slices: tuple[UnitSlice, ...]

    def cost(self, shapes: Mapping[str, Shape]) -> int:
        """Return the number of parameters that one unit holds (all units of a kind are equal)."""
        return sum(
            math.prod(shapes[s.parameter]) // len(s.owner) * (len(s.owner) // self.count)
            for s in self.slices
        )


@dataclass(frozen=True)
class LayerWidths:
    """Widths of one layer of a pruned model, in the terms of a transformers config."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


class Family(ABC):
    """One model family: parameter shapes, units, and how a pruned config is written."""

    name: ClassVar[str]
    layer_prefix: ClassVar[str]

    @abstractmethod
    def check(self, config: Config) -> None:
        """Refuse (InputError) a config that this family cannot prune exactly."""

    @abstractmethod
    def layer_shapes(self, config: Config) -> dict[str, Shape]:
        """Return the shape of every parameter of one unpruned layer, by its relative name."""

    @abstractmethod
    def outer_shapes(self, config: Config) -> dict[str, Shape]:
        """Return the shapes of all parameters outside the layers; a tied head is left out."""

    @abstractmethod
    def units(self, config: Config) -> dict[str, UnitKind]:
        """Return the kinds of units of one unpruned layer, by name."""

    @abstractmethod
    def activation_inputs(self) -> tuple[str, ...]:
        """Return the modules of a layer whose inputs cover all distinct linear inputs."""

    @abstractmethod
    def widths(self, config: Config, kept: Mapping[str, Sequence[int]]) -> LayerWidths:
        """Return the widths that a layer has with the units ``kept``."""

    @abstractmethod
    def pruned_config(
        self, config: Config, layers: Sequence[LayerWidths], kept_layers: Sequence[int]
    ) -> tuple[dict[str, Any], bool]:
        """Return the config of a pruned model and whether stock transformers can build it."""

    @abstractmethod
    def model_class(self, config: Config) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        """Return the config and model classes of a config, by its ``model_type``."""

    @abstractmethod
    def modeling_file(self) -> str:
        """Return the path of the self-contained modelling file saved beside non-stock weights."""

    @abstractmethod
    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return the model's decoder layers."""

    @abstractmethod
    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        """Return what stands between the last layer's output and the language-model head."""

    def parameters(self, config: Config) -> int:
        """Return the number of parameters of the unpruned model (tied ones counted once)."""
        return self.block_parameters(config) * int(config["num_hidden_layers"]) + sum(
            math.prod(shape) for shape in self.outer_shapes(config).values()
        )

    def block_parameters(self, config: Config) -> int:
        """Return the number of parameters of one unpruned layer."""
        return sum(math.prod(shape) for shape in self.layer_shapes(config).values())

    def linears(self, config: Config, role: str) -> tuple[str, ...]:
        """Return the last parts of the names of a layer's linear maps: recovery's targets.

        Args:
            config: config.json of the unpruned model.
            role: ``mlp`` for those that own a piece of every MLP channel, ``attention`` for the
                others.
        """
        mlp = {part.parameter for part in self.kind(config, "mlp_channel").slices}
        names = (
            name
            for name, shape in self.layer_shapes(config).items()
            if len(shape) == 2 and (name in mlp) == (role == "mlp")
        )
        return tuple(name.removesuffix(".weight").rpartition(".")[2] for name in names)

    def kind(self, config: Config, name: str) -> UnitKind:
        """Return the unit kind ``name``.

        Raises:
            InputError: this family has no such kind.
        """
        kinds = self.units(config)
        if name not in kinds:
            raise InputError(
                f"unit kind {name!r} does not exist in family {self.name}; "
                f"allowed: {', '.join(kinds)}"
            )
        return kinds[name]

    def kept_positions(
        self, config: Config, kept: Mapping[str, Sequence[int]]
    ) -> dict[tuple[str, int], npt.NDArray[np.int64]]:
        """Return the positions that stay, by (parameter, axis), for one layer.

        Several kinds may own the same axis (kv groups and query slots both own query rows):
        a position stays when all of its owners do.
        """
        masks: dict[tuple[str, int], npt.NDArray[np.bool_]] = {}
        for name, unit_ids in kept.items():
            kind = self.kind(config, name)
            alive = np.zeros(kind.count, dtype=bool)
            alive[list(unit_ids)] = True
            for part in kind.slices:
                mask = alive[part.owner]
                place = (part.parameter, part.axis)
                masks[place] = masks[place] & mask if place in masks else mask
        return {place: np.flatnonzero(mask) for place, mask in masks.items()}
