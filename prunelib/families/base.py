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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import numpy.typing as npt

from prunelib.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

Config = Mapping[str, Any]
Shape = tuple[int, ...]

RESIDUAL = "residual_channel"
# The field of a config whose layers share weights or lack a part, and the file of their classes.
VIRTUAL = "virtual_layers"
SHARED_MODULE = "modeling_shared"


@dataclass(frozen=True, eq=False)
class UnitSlice:
    """One axis of one parameter, and the unit that owns each position of it.

    Attributes:
        parameter: name relative to the layer, e.g. ``self_attn.q_proj.weight``; in full for units
            of the whole model.
        axis: 0 for output rows (and biases), 1 for input columns.
        owner: int64 array over the positions of that axis.
    """

    parameter: str
    axis: int
    owner: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class UnitKind:
    """All units of one kind: in one layer, or channels of the residual stream in the whole model.

    Attributes:
        name: of the kind.
        count: units per layer, or in the whole model.
        slices: what the units own, in the order in which a forward pass uses the parameters, a
            bias behind its weight; criteria that look at the last member rely on it.
        whole: whether the units run through the whole model.
    """

    name: str
    count: int
    slices: tuple[UnitSlice, ...]
    whole: bool = False

    def cost(self, shapes: Mapping[str, Shape]) -> int:
        """Return the number of parameters that one unit holds (all units of a kind are equal).

        Args:
            shapes: of all parameters that the slices name.
        """
        return sum(
            math.prod(shapes[s.parameter]) // len(s.owner) * (len(s.owner) // self.count)
            for s in self.slices
        )


@dataclass(frozen=True)
class Dimensions:
    """The sizes of an unpruned model, whatever its config calls them.

    Attributes:
        layers: number of decoder layers.
        hidden: width of the residual stream.
        heads: query heads of a layer.
        kv_heads: key-value heads of a layer.
        head_dim: width of one head.
        inner: MLP channels of a layer.
        vocabulary: entries of the embedding.
        positions: longest sequence; None where the architecture sets none.
        tied: whether the embedding is the output head.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    positions: int | None
    tied: bool


# Fields of a transformers config that hold for one layer, as in `per_layer_config`.
LayerFields = dict[str, Any]


def linear_shapes(linears: Mapping[str, tuple[int, int, bool]]) -> dict[str, Shape]:
    """Return parameter shapes of linear maps given as name -> (outputs, inputs, has a bias)."""
    shapes: dict[str, Shape] = {}
    for name, (rows, columns, bias) in linears.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    return shapes


def rows(
    shapes: Mapping[str, Shape], module: str, owner: npt.NDArray[np.int64]
) -> tuple[UnitSlice, ...]:
    """Return the slices of a linear map's outputs: its weight's rows and, if it has one, its bias.

    Args:
        shapes: the layer's parameters.
        module: the linear map's name relative to the layer.
        owner: unit of every output.
    """
    names = (f"{module}.weight", f"{module}.bias")
    return tuple(UnitSlice(name, 0, owner) for name in names if name in shapes)


def columns(module: str, owner: npt.NDArray[np.int64]) -> tuple[UnitSlice, ...]:
    """Return the slice of a linear map's inputs, its weight's columns; its bias stays whole."""
    return (UnitSlice(f"{module}.weight", 1, owner),)


def residual_channels(
    width: int,
    prefix: str,
    layers: int,
    first: tuple[UnitSlice, ...],
    layer: tuple[UnitSlice, ...],
    last: tuple[UnitSlice, ...],
) -> dict[str, UnitKind]:
    """Return the kind ``residual_channel``: one unit per channel of the residual stream.

    Args:
        width: of the residual stream.
        prefix: the family's ``layer_prefix``.
        layers: number of layers.
        first: slices that precede the layers, named in full.
        layer: slices of one layer, named relative to it.
        last: slices that follow the layers, named in full.
    """
    inside = (
        replace(part, parameter=f"{prefix}.{index}.{part.parameter}")
        for index in range(layers)
        for part in layer
    )
    return {RESIDUAL: UnitKind(RESIDUAL, width, (*first, *inside, *last), whole=True)}


def residual_width(kept: Mapping[str, Sequence[int]]) -> LayerFields:
    """Return the field of a narrower residual stream; none where it keeps its width."""
    return {"hidden_size": len(kept[RESIDUAL])} if RESIDUAL in kept else {}


def kept_count(kept: Mapping[str, Sequence[int]], kind: str, count: int) -> int:
    """Return how many units of ``kind`` stay; a kind that ``kept`` does not name is not pruned."""
    return len(kept[kind]) if kind in kept else count


def per_layer(
    config: Config,
    layers: Sequence[LayerFields],
    *,
    title: str,
    module: str,
) -> dict[str, Any]:
    """Return ``config`` as that of a model whose layers are built one by one.

    Args:
        config: config of the pruned model but for what differs between layers.
        layers: per layer, the fields that are its own.
        title: what the classes of the architecture begin with, e.g. ``Llama``.
        module: name of the modelling file, without ``.py``.
    """
    return dict(config) | {
        "model_type": f"pruned_{config['model_type']}",
        "architectures": [f"Pruned{title}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.Pruned{title}Config",
            "AutoModelForCausalLM": f"{module}.Pruned{title}ForCausalLM",
        },
        "per_layer_config": {str(i): dict(fields) for i, fields in enumerate(layers)},
    }


def class_title(config: Config) -> str:
    """Return what the classes of an architecture begin with, e.g. ``Llama``."""
    model_type = str(config["model_type"]).removeprefix("pruned_")
    return "OPT" if model_type == "opt" else model_type.capitalize()


def check_virtual(config: Config) -> None:
    """Refuse ``virtual_layers`` that say nothing a model could be built from.

    Raises:
        InputError: with the first layer that does not fit.
    """
    entries, count = config.get(VIRTUAL), config.get("num_hidden_layers")
    if not isinstance(entries, list) or len(entries) != count:
        raise InputError(f"config.json: {VIRTUAL} must be a list of {count} layers")
    own = [place for place, entry in enumerate(entries) if entry == {}]
    parts = [{"without": part} for part in Family.parts]
    for place, entry in enumerate(entries):
        fits = entry == {} or entry in parts
        if isinstance(entry, Mapping) and set(entry) == {"base", "rank", "normalise"}:
            rank, whole = entry["rank"], type(entry["base"]) is int
            fits = whole and entry["base"] in own and type(rank) is int and rank >= 1
            fits = fits and isinstance(entry["normalise"], bool)
        if isinstance(entry, Mapping) and set(entry) == {"emulate"}:
            fits = type(entry["emulate"]) is int and entry["emulate"] >= 0
        if not fits:
            raise InputError(
                f"config.json: {VIRTUAL}[{place}] is {entry!r}; allowed: {{}}, a part that it is "
                "without, base (a layer with weights of its own), rank and normalise, or emulate "
                "(a rank)"
            )


def refuse_pruned(config: Config) -> None:
    """Refuse a config whose layers differ already.

    Raises:
        InputError: it has ``per_layer_config`` or ``virtual_layers``.
    """
    for key in ("per_layer_config", VIRTUAL):
        if config.get(key):
            raise InputError(
                f"the model is already pruned layer by layer (config.json has {key}); "
                "prune the original model instead"
            )


class Family(ABC):
    """One model family: parameter shapes, units, and how a pruned config is written."""

    name: ClassVar[str]
    layer_prefix: ClassVar[str]
    # What the last layer's output passes before the head.
    last_norm: ClassVar[str]
    # The embedding of tokens, which a tied head shares, and further ones, of positions.
    embedding: ClassVar[str]
    other_embeddings: ClassVar[tuple[str, ...]] = ()
    # By part of a block, its modules in a layer; the last is the norm that it begins with.
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("self_attn", "input_layernorm"),
        "mlp": ("mlp", "post_attention_layernorm"),
    }
    # Whether transformers' code of it always forms the scores of all pairs of positions.
    plain_attention: ClassVar[bool] = False

    @abstractmethod
    def check(self, config: Config) -> None:
        """Refuse (InputError) a config that this family cannot prune exactly."""

    @abstractmethod
    def dimensions(self, config: Config) -> Dimensions:
        """Return the sizes of the unpruned model."""

    @abstractmethod
    def layer_shapes(self, config: Config) -> dict[str, Shape]:
        """Return the shape of every parameter of one unpruned layer, by its relative name."""

    @abstractmethod
    def outer_shapes(self, config: Config) -> dict[str, Shape]:
        """Return the shapes of all parameters outside the layers; a tied head is left out."""

    @abstractmethod
    def units(self, config: Config) -> dict[str, UnitKind]:
        """Return the kinds of units of one unpruned layer, by name."""

    def model_units(self, config: Config) -> dict[str, UnitKind]:
        """Return the kinds of units that run through the whole model, by name."""
        return {}

    @abstractmethod
    def activation_inputs(self) -> tuple[str, ...]:
        """Return the modules of a layer whose inputs cover all distinct linear inputs."""

    @abstractmethod
    def widths(self, config: Config, kept: Mapping[str, Sequence[int]]) -> LayerFields:
        """Return the config fields of a layer with the units ``kept``, of the model's the same."""

    @abstractmethod
    def pruned_config(
        self, config: Config, layers: Sequence[LayerFields], kept_layers: Sequence[int]
    ) -> tuple[dict[str, Any], bool]:
        """Return the config of a pruned model and whether stock transformers can build it."""

    @abstractmethod
    def model_class(self, config: Config) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        """Return the config and model classes of a config, by its ``model_type``."""

    @abstractmethod
    def modeling_file(self) -> str:
        """Return the path of the self-contained modelling file saved beside non-stock weights."""

    def classes(self, config: Config) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        """Return the classes of a config, also of one with layers that share weights."""
        if config.get(VIRTUAL) is None:
            return self.model_class(config)
        from prunelib.families import modeling_shared

        title = class_title(config)
        return (
            getattr(modeling_shared, f"Shared{title}Config"),
            getattr(modeling_shared, f"Shared{title}ForCausalLM"),
        )

    def source_file(self, config: Config) -> str:
        """Return the path of the modelling file that a config needs which is not stock."""
        if config.get(VIRTUAL) is None:
            return self.modeling_file()
        from prunelib.families import modeling_shared

        return modeling_shared.__file__

    def virtual_config(
        self, config: Config, sources: Sequence[int], layers: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return the config of a model whose layers share weights or lack a part.

        Args:
            config: config.json of the unpruned model.
            sources: per layer of the new model, the original layer that it is or stands for.
            layers: per layer, what is its own, see ``modeling_shared.py``.
        """
        whole = [self.widths(config, {})] * len(sources)
        new, _ = self.pruned_config(config, whole, sources)
        title = class_title(new)
        return new | {
            "model_type": f"pruned_{new['model_type']}",
            "architectures": [f"Shared{title}ForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{SHARED_MODULE}.Shared{title}Config",
                "AutoModelForCausalLM": f"{SHARED_MODULE}.Shared{title}ForCausalLM",
            },
            # Whoever reads the file without its classes, as tokenizers do, looks for this name.
            "num_hidden_layers": len(sources),
            VIRTUAL: [dict(layer) for layer in layers],
        }

    def output_maps(self, config: Config) -> tuple[str, ...]:
        """Return the linear maps of a layer whose outputs join the residual stream."""
        kinds = self.units(config)
        return tuple(
            part.parameter.removesuffix(".weight")
            for name in ("kv_group", "mlp_channel")
            for part in kinds[name].slices
            if part.axis == 1
        )

    def shared_shapes(self, config: Config, rank: int, normalised: bool) -> dict[str, Shape]:
        """Return the parameters of a layer that shares another block's matrices.

        A matrix [out, in] becomes its adapter's factors ``A`` [out, r] and ``B`` [r, in] (the
        paper's names, arXiv 2501.14713, section 3.2; peft calls them B and A), r being at most the
        matrix's rank. Norms are the layer's own, and so are biases, as what they differ by. With
        ``normalised`` outputs there is a ``gain`` [out] per output map.
        """
        shapes: dict[str, Shape] = {}
        for name, shape in self.layer_shapes(config).items():
            if len(shape) != 2:
                shapes[name] = shape
                continue
            module, most = name.removesuffix(".weight"), min(rank, *shape)
            shapes[f"{module}.A"] = (shape[0], most)
            shapes[f"{module}.B"] = (most, shape[1])
            if normalised and module in self.output_maps(config):
                shapes[f"{module}.gain"] = (shape[0],)
        return shapes

    def shared_parameters(self, config: Config, rank: int, normalised: bool) -> int:
        """Return the number of parameters of a layer that shares another block's matrices."""
        return sum(map(math.prod, self.shared_shapes(config, rank, normalised).values()))

    def part_of(self, name: str) -> str:
        """Return the part of a block that owns the parameter ``name``, relative to the layer."""
        for part, modules in self.parts.items():
            if name.startswith(tuple(f"{module}." for module in modules)):
                return part
        raise InputError(f"parameter {name!r} belongs to no part of a block")

    def part_parameters(self, config: Config, part: str) -> int:
        """Return the number of parameters of one unpruned layer's attention or MLP, or of all."""
        return sum(
            math.prod(shape)
            for name, shape in self.layer_shapes(config).items()
            if part in ("block", self.part_of(name))
        )

    def check_parts(self, config: Config, part: str) -> None:
        """Refuse to remove a part of a block where what stays would compute something else.

        Raises:
            InputError: a block normalises the residual stream, or caches differ by layer.
        """
        if not self.zero_block_is_neutral(config):
            raise InputError(
                f"remove {part}: this {config['model_type']} model normalises the residual stream "
                "in every block; allowed: block"
            )
        if part == "attention" and len(set(config.get("layer_types") or ())) > 1:
            raise InputError(
                "remove attention: the layers of this model differ in their attention "
                "(layer_types), and so do their caches; allowed: block, mlp"
            )

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return the model's decoder layers."""
        return cast("nn.ModuleList", model.get_submodule(self.layer_prefix))

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        """Return what stands between the last layer's output and the language-model head."""
        return model.get_submodule(self.last_norm)

    def zero_block_is_neutral(self, config: Config) -> bool:
        """Return whether a block of zeros hands its input on unchanged, as a removed one does."""
        return True

    def full_name(self, name: str) -> str:
        """Return a stored tensor's name in the whole model.

        transformers also loads weights that were saved from the body alone, without its prefix;
        some published checkpoints are of that kind.
        """
        prefix = self.layer_prefix.partition(".")[0] + "."
        return name if name.startswith((prefix, "lm_head.")) else prefix + name

    def shapes(self, config: Config) -> dict[str, Shape]:
        """Return the shape of every parameter of the unpruned model by its full name."""
        layer = self.layer_shapes(config)
        return self.outer_shapes(config) | {
            f"{self.layer_prefix}.{index}.{name}": shape
            for index in range(self.dimensions(config).layers)
            for name, shape in layer.items()
        }

    def unit_cost(self, config: Config, name: str) -> int:
        """Return the number of parameters that one unit of the kind ``name`` holds."""
        kind = self.kind(config, name)
        return kind.cost(self.shapes(config) if kind.whole else self.layer_shapes(config))

    def parameters(self, config: Config) -> int:
        """Return the number of parameters of the unpruned model (tied ones counted once)."""
        return self.block_parameters(config) * self.dimensions(config).layers + sum(
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
            # These have members in every layer and are asked for by few methods.
            kinds |= self.model_units(config)
        if name not in kinds:
            raise InputError(
                f"unit kind {name!r} does not exist in family {self.name}; "
                f"allowed: {', '.join(kinds)}"
            )
        return kinds[name]

    def kept_positions(
        self, config: Config, kept: Mapping[str, Sequence[int]]
    ) -> dict[tuple[str, int], npt.NDArray[np.int64]]:
        """Return the positions that stay, by (parameter, axis), for one layer or the model.

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
