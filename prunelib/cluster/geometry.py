"""Shapes of the models that an experiment's steps work on, from published configs alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from prunelib.depth_selection import block_count
from prunelib.experiment.graph import Node
from prunelib.families import family_of
from prunelib.methods import create
from prunelib.recovery.recipe import ROLES, LoraRecipe
from prunelib.rules import Target

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Model:
    """Shapes of an unpruned model.

    Attributes:
        parameters: tied ones once.
        block: parameters of one layer.
        layers: number of layers.
        hidden: width of the residual stream.
        attention: width of the queries of all heads.
        kv: width of the keys of all kv heads.
        inner: width of the MLP.
        vocabulary: entries of the head.
        tied: whether the embedding is the head.
        positions: longest sequence.
        dtype: of the stored weights.
        heads: number of query heads.
        plain_attention: whether the scores of all pairs of positions exist at once.
        linears: (outputs, inputs) of a layer's linear maps, by the last part of their names.
        roles: names of the linear maps of the attention and of the MLP.
    """

    parameters: int
    block: int
    layers: int
    hidden: int
    attention: int
    kv: int
    inner: int
    vocabulary: int
    tied: bool
    positions: int
    dtype: str
    heads: int
    plain_attention: bool
    linears: Mapping[str, tuple[int, int]]
    roles: Mapping[str, tuple[str, ...]]

    @property
    def item(self) -> int:
        """Bytes of a stored weight."""
        return ITEM_BYTES[self.dtype]

    @property
    def largest(self) -> int:
        """Entries of the largest tensor of a layer."""
        return max(rows * columns for rows, columns in self.linears.values())

    def kv_cache_bytes(self, tokens: int, item: int) -> int:
        """Return the size of the key-value cache of ``tokens`` positions, all sequences summed."""
        return 2 * self.layers * self.kv * tokens * item

    def lora_targets(self, recipe: LoraRecipe) -> list[tuple[int, int]]:
        """Return (outputs, inputs) of a layer's linear maps that get an adapter."""
        names = {name for target in recipe.targets for name in self.roles.get(target, (target,))}
        return [shape for name, shape in self.linears.items() if name in names]

    def lora_parameters(self, recipe: LoraRecipe) -> int:
        """Return the adapters' parameters: ``r (inputs + outputs)`` per target."""
        return recipe.r * self.layers * sum(map(sum, self.lora_targets(recipe)))

    def score_token_bytes(self, item: int, keys: int) -> int:
        """Return what one token's attention scores over ``keys`` positions take, if they exist.

        Scores, scores with the mask, their fp32 softmax and its copy in ``item``.
        """
        return self.heads * keys * (3 * item + 4) if self.plain_attention else 0

    def forward_token_bytes(self, item: int, keys: int) -> int:
        """Return what one token holds at the widest place of a layer's forward pass.

        The residual stream, its normalised copy and two temporaries; gate, up, activation and
        their product, or the attention scores.
        """
        widest = item * 4 * max(self.inner, self.attention)
        return item * 4 * self.hidden + max(widest, self.score_token_bytes(item, keys))

    def graph_token_bytes(self, item: int, keys: int) -> int:
        """Return what one layer keeps of one token for its backward pass.

        Both norms (fp32 input and normalised copy, output in ``item``); q, k, v with k and v
        repeated per query head, attention output and its copy; gate, up, activation, product;
        attention scores.
        """
        norms = 2 * self.hidden * (2 * 4 + item)
        linears = item * (5 * self.attention + 4 * self.inner)
        return norms + linears + self.score_token_bytes(item, keys)

    def flops(self, parameters: int) -> float:
        """Return the FLOPs of one token's forward pass through ``parameters`` weights.

        Looking an embedding up is no product, except that a tied one is the head, too.
        """
        looked_up = 0 if self.tied else self.vocabulary * self.hidden
        return 2.0 * (parameters - looked_up)


def model_of(node: Node) -> Model | None:
    """Return the unpruned model that a step works on; None for steps on texts alone."""
    source = source_of(node)
    return None if source is None else _model(source)


def model_name(node: Node) -> str | None:
    """Return the catalogue name of the model that a step works on; None for texts alone."""
    source = source_of(node)
    return None if source is None else str(source.params["name"])


def source_of(node: Node) -> Node | None:
    """Return the step that fetches the model of ``node``."""
    found: Node | None = node
    while found is not None and found.step != "fetch_model":
        found = found.inputs.get("model") or found.inputs.get("checkpoint")
    return found


@cache
def _model(source: Node) -> Model:
    return model_of_geometry(json.dumps(source.params["geometry"], sort_keys=True))


@cache
def model_of_geometry(text: str) -> Model:
    """Return the shapes of a published config, given as JSON."""
    geometry = json.loads(text)
    family = family_of(geometry)
    size = family.dimensions(geometry)
    stored = str(geometry.get("dtype") or geometry.get("torch_dtype")).removeprefix("torch.")
    return Model(
        parameters=family.parameters(geometry),
        block=family.block_parameters(geometry),
        layers=size.layers,
        hidden=size.hidden,
        attention=size.heads * size.head_dim,
        kv=size.kv_heads * size.head_dim,
        inner=size.inner,
        vocabulary=size.vocabulary,
        tied=size.tied,
        positions=size.positions or 1 << 30,
        dtype=stored if stored in ITEM_BYTES else "float32",
        heads=size.heads,
        plain_attention=family.plain_attention,
        linears={
            name.removesuffix(".weight").rpartition(".")[2]: (shape[0], shape[1])
            for name, shape in family.layer_shapes(geometry).items()
            if len(shape) == 2
        },
        roles={role: family.linears(geometry, role) for role in ROLES},
    )


def parameter_bound(checkpoint: Node) -> int:
    """Return an upper bound of a checkpoint's parameters.

    Parameter targets are met to half a block (depth pruning takes the nearest count of blocks), so
    the ratio is believed up to that; other targets bound nothing that holds for every method. Where
    layers share weights the number is known.
    """
    checkpoint = pruned_of(checkpoint)
    model = model_of(checkpoint)
    assert model is not None
    if shared := shared_layers(checkpoint):
        gone = 0 if shared.repeated else shared.layers * model.block
        return model.parameters - gone + shared.layers * shared.each
    if checkpoint.step != "prune" or checkpoint.params["target"]["kind"] != "parameters":
        return model.parameters
    share = 1 - float(checkpoint.params["target"]["value"])
    return min(model.parameters, math.ceil(model.parameters * share + model.block / 2))


def pruned_of(checkpoint: Node) -> Node:
    """Return the step that pruned what is merged in ``checkpoint``."""
    while checkpoint.step == "merge":
        checkpoint = checkpoint.inputs["checkpoint"]
    return checkpoint


@dataclass(frozen=True)
class SharedLayers:
    """Layers of a checkpoint that use the weights of others.

    Attributes:
        layers: how many.
        each: parameters that one holds itself.
        rank: of its adapters.
        repeated: whether they come on top of all original layers.
    """

    layers: int
    each: int
    rank: int
    repeated: bool


def shared_layers(checkpoint: Node) -> SharedLayers | None:
    """Return the layers of a checkpoint that share weights; None where there are none."""
    checkpoint = pruned_of(checkpoint)
    if checkpoint.step != "prune":
        return None
    params = checkpoint.params
    rule = create(params["method"], params["parameters"]).rule()
    if rule.sharer is None:
        return None
    source = source_of(checkpoint)
    assert source is not None
    geometry = source.params["geometry"]
    family, target = family_of(geometry), Target(**params["target"])
    if rule.repeat is None:
        count = block_count(family, geometry, target, rule)
    else:
        layers = family.dimensions(geometry).layers
        wanted = int(target.value) if target.kind == "layers" else layers
        count = len(rule.repeat.blocks(layers, wanted))
    each = rule.sharer.parameters(family, geometry)
    rank = rule.sharer.rank_of(family, geometry)
    return SharedLayers(count, each, rank, rule.repeat is not None) if count else None


def computed_parameters(checkpoint: Node) -> int:
    """Return the parameters that a token meets: shared ones as often as they are used."""
    shared, model = shared_layers(checkpoint), model_of(checkpoint)
    assert model is not None
    again = shared.layers * model.block if shared else 0
    return parameter_bound(checkpoint) + again


def with_repeated(model: Model, checkpoint: Node) -> Model:
    """Return ``model`` with the layers of a checkpoint that repeats some."""
    shared = shared_layers(checkpoint)
    more = shared.layers if shared and shared.repeated else 0
    return replace(model, layers=model.layers + more)
