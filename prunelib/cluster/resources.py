"""Resources of every step: memory, GPUs, time and disk, from the arithmetic of what it does.

Everything follows from the model's shapes and the step's parameters; nothing is fetched or loaded,
and nothing here imports torch: the workflow asks while it plans. Rates, factors and limits come
from ``config/cluster.yaml``. Where a formula takes an upper bound it says so; a pruned model has
the unpruned model's widths as its bound, and its target's ratio for its weights.

Sizes are in bytes and rates per second unless a name says otherwise; ``_mb`` is MiB, as in SLURM.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from prunelib.checkpoint import SHARD_BYTES
from prunelib.cluster.settings import DEVICE_STEPS, Cluster, Gpu
from prunelib.errors import InputError
from prunelib.experiment.graph import Node
from prunelib.families import family_of
from prunelib.methods import create
from prunelib.recovery.lora import ROLES, LoraRecipe, parse_recipe, total_steps
from prunelib.selection import Target, block_count

MIB = 1024**2
GB = 10**9
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# Buffers that the steps' code fixes. Their modules import torch, so they are repeated here; a test
# holds the copies equal.
KEPT_BYTES = 640 * MIB
KEPT_WEIGHTS = 5
HEAD_BYTES = 32 * MIB
STREAM_BYTES = 32 * MIB
LOSS_CHUNK = 256
# Randomised decompositions: further directions, and iterations of two products each.
OVERSAMPLE = 32
ITERATIONS = 3
EVALUATION_TOKENS = {"cpu": 1024, "cuda": 16384}
LOGITS_CHUNK = 2048
LOGITS_SHARE = 8

# glibc takes larger blocks from the system one by one and gives them back.
HEAP_BLOCK_BYTES = 32 * MIB
# Measured: by this share the heap around the graphs of all layers is larger than they are.
HEAP_SHARE = 0.2
# A tokenised text: ids, masks, offsets and the tokens' strings, until the ids alone are kept.
TOKEN_BYTES = 300
# Instructions are tokenised in pieces, of which only the ids are kept: twice while they are put
# together, beside the records' strings.
INSTRUCTION_TOKEN_BYTES = 32
CHARACTERS_PER_TOKEN = 4
TOKENIZER_BYTES = 10 * 10**6
# Metrics, windows, summaries.
SMALL_BYTES = 10**6
# A backward pass goes through every product twice; LoRA's frozen weights need one of the two.
RECOVERY_FORWARDS = 2.5
GRADIENT_FORWARDS = 4
# Passes over one window's gradients of the whole model: written, read to be added and to be
# squared; both sums read and written.
FISHER_TRANSFERS = 7
# Operations of an exact decomposition of a matrix m x n, m >= n, and of the eigenvalues of n x n,
# in units of m n^2 and n^3.
SVD_OPERATIONS = 20
EIGEN_OPERATIONS = 10
# Normally distributed numbers that one CPU core draws in a second.
DRAWN_PER_SECOND = 80e6


@dataclass(frozen=True)
class Request:
    """What one job asks for.

    Attributes:
        gpus: GPUs of the type asked about.
        mem_mb: host memory, MiB.
        runtime: minutes.
        cpus: CPU cores.
        exclusive: whether the node must run nothing else (timings).
        gpu_mem_mb: estimated need on the device, MiB, all GPUs together; 0 without GPUs.
        disk_mb: size of the artefact that it leaves, MiB.
        seconds: expected time, before the safety factor.
        explanation: one sentence, how memory follows from the step's arithmetic.
    """

    gpus: int
    mem_mb: int
    runtime: int
    cpus: int
    exclusive: bool
    gpu_mem_mb: int
    disk_mb: int
    seconds: float
    explanation: str


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
    source = _source(node)
    return None if source is None else _model(source)


def model_name(node: Node) -> str | None:
    """Return the catalogue name of the model that a step works on; None for texts alone."""
    source = _source(node)
    return None if source is None else str(source.params["name"])


def _source(node: Node) -> Node | None:
    """Return the step that fetches the model of ``node``."""
    found: Node | None = node
    while found is not None and found.step != "fetch_model":
        found = found.inputs.get("model") or found.inputs.get("checkpoint")
    return found


@cache
def _model(source: Node) -> Model:
    return _model_of_geometry(json.dumps(source.params["geometry"], sort_keys=True))


@cache
def _model_of_geometry(text: str) -> Model:
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


def remaining_parameters(checkpoint: Node) -> int:
    """Return an upper bound of a checkpoint's parameters.

    Parameter targets are met to half a block (depth pruning takes the nearest count of blocks), so
    the ratio is believed up to that; other targets bound nothing that holds for every method. Where
    layers share weights the number is known.
    """
    checkpoint = _pruned(checkpoint)
    model = model_of(checkpoint)
    assert model is not None
    if shared := shared_layers(checkpoint):
        gone = 0 if shared.repeated else shared.layers * model.block
        return model.parameters - gone + shared.layers * shared.each
    if checkpoint.step != "prune" or checkpoint.params["target"]["kind"] != "parameters":
        return model.parameters
    share = 1 - float(checkpoint.params["target"]["value"])
    return min(model.parameters, math.ceil(model.parameters * share + model.block / 2))


def _pruned(checkpoint: Node) -> Node:
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
    checkpoint = _pruned(checkpoint)
    if checkpoint.step != "prune":
        return None
    params = checkpoint.params
    rule = create(params["method"], params["parameters"]).rule()
    if rule.sharer is None:
        return None
    source = _source(checkpoint)
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
    return remaining_parameters(checkpoint) + again


def _deep(model: Model, checkpoint: Node) -> Model:
    """Return ``model`` with the layers of a checkpoint that repeats some."""
    shared = shared_layers(checkpoint)
    more = shared.layers if shared and shared.repeated else 0
    return replace(model, layers=model.layers + more)


@dataclass(frozen=True)
class Term:
    """A part of the memory need; ``estimated`` ones get the step's safety factor."""

    label: str
    size: float
    estimated: bool = True


@dataclass(frozen=True)
class Work:
    """What a step holds and does.

    Attributes:
        device: memory on the compute device.
        host: memory of the host besides.
        flops: matrix products on the device.
        moved: bytes that must pass through the device's memory beyond the products.
        host_seconds: reading, writing, hashing and plain loops on the host.
        disk: size of the artefact.
        replicas: processes that hold all of it and share the products; on GPUs one for each.
    """

    device: tuple[Term, ...] = ()
    host: tuple[Term, ...] = ()
    flops: float = 0.0
    moved: float = 0.0
    host_seconds: float = 0.0
    disk: float = SMALL_BYTES
    replicas: int = 1


@dataclass(frozen=True, eq=False)
class _Case:
    """A step on a cluster, with what its formulas look at."""

    node: Node
    cluster: Cluster
    gpu: Gpu

    @property
    def on_gpu(self) -> bool:
        return self.cluster.wants_gpu(self.node)

    @property
    def model(self) -> Model:
        model = model_of(self.node)
        assert model is not None
        return model

    @property
    def usable(self) -> float:
        """Bytes of one GPU that tensors get."""
        return self.gpu.memory_gb * GB * self.cluster.usable

    @property
    def item(self) -> int:
        """Bytes of a number in the step's products; a CPU computes in fp32."""
        return ITEM_BYTES[str(self.node.params["dtype"])] if self.on_gpu else 4

    def param(self, name: str) -> Any:
        return self.node.params[name]

    def text_tokens(self, split: str) -> int:
        """Expected tokens of a split of the step's text."""
        text = self.node.inputs["text"].params
        share = float(text.get("split", {}).get(split, 1))
        return math.ceil(self.cluster.tokens_of(str(text["name"])) * share)

    def records(self) -> tuple[int, int]:
        """Expected records of the step's text for training and for validation; 0 for articles."""
        text = self.node.inputs["text"].params
        if text["format"] != "alpaca":
            return 0, 0
        count, validation = self.cluster.records_of(str(text["name"])), text["validation"]
        aside = validation if validation >= 1 else math.floor(count * validation)
        return max(count - aside, 1), aside

    def read_seconds(self, size: float) -> float:
        return size / GB * (1 / self.cluster.host.disk_gbs + 1 / self.cluster.host.hash_gbs)

    def mapped(self, what: str, size: float) -> Term:
        share = self.cluster.host.mapped_share
        counted = "" if share == 1 else f", of which {share:.0%} count"
        return Term(what + counted, size * share, estimated=False)


def _billions(count: float) -> str:
    return f"{count / GB:.4g}e9" if count >= GB else f"{count / 1e6:.4g}e6"


def _loaded(case: _Case, parameters: int) -> tuple[tuple[Term, ...], tuple[Term, ...], float]:
    """Return device terms, host terms and seconds of ``checkpoint.load_model``.

    On a CPU fp32 weights are views of the mapped file; weights of another dtype are converted in
    memory, and bf16 weights are rounded first and widened after. Before they go to a single GPU,
    weights of another dtype are converted on the host; with several each goes there by itself.
    """
    stored = parameters * case.model.item
    seconds = case.read_seconds(stored)
    item, count = case.item, _billions(parameters)
    if case.on_gpu:
        weights = Term(f"weights {count} x {item} B", parameters * item, estimated=False)
        host = [case.mapped(f"mapped weight file {count} x {case.model.item} B", stored)]
        if case.param("dtype") != case.model.dtype and weights.size <= case.usable:
            label = f"their conversion to {case.param('dtype')}"
            host.append(Term(label, weights.size, estimated=False))
        return (weights,), tuple(host), seconds
    terms = [Term(f"weights {count} x 4 B", parameters * 4, estimated=False)]
    if case.param("dtype") == "bfloat16":
        terms.append(Term(f"their rounding to {count} x 2 B", parameters * 2, estimated=False))
    elif case.model.dtype != "float32":
        terms.append(case.mapped(f"mapped weight file {count} x {case.model.item} B", stored))
    return tuple(terms), (), seconds


def _tokenised(tokens: int, size: int = TOKEN_BYTES) -> Term:
    return Term(f"tokenised text {tokens:,} x {size} B", tokens * size)


def _fetch_model(case: _Case) -> Work:
    stored = case.model.parameters * case.model.item
    host: tuple[Term, ...] = ()
    if str(case.param("source")).endswith(".gguf"):
        count = _billions(case.model.parameters)
        host = (Term(f"dequantised weights {count} x 4 B, twice", 8 * case.model.parameters),)
    elif case.node.params.get("weights") == "bin":
        shard = min(stored, case.cluster.host.shard_gb * GB)
        host = (Term("a pickled shard and its copy", 2 * shard),)
    seconds = stored / GB / case.cluster.host.network_gbs + case.read_seconds(stored)
    return Work(host=host, host_seconds=seconds, disk=stored + TOKENIZER_BYTES)


def _fetch_text(case: _Case) -> Work:
    size = case.cluster.tokens_of(case.param("name")) * CHARACTERS_PER_TOKEN
    if case.node.params.get("stream"):
        # Local files are hashed; of a hub data set one row is read.
        local = not str(case.param("source")).startswith("hf:")
        return Work(host_seconds=60 + local * size / GB / case.cluster.host.hash_gbs)
    return Work(host=(Term("the articles, twice", 2 * size),), host_seconds=60, disk=size)


def _fetch_analogies(case: _Case) -> Work:
    return Work(disk=2 * SMALL_BYTES)


def _calibration(case: _Case) -> Work:
    tokens = case.text_tokens("calibration")
    return Work(host=(_tokenised(tokens),), host_seconds=tokens / 1e5)


def _tasks_data(case: _Case) -> Work:
    text = case.text_tokens("evaluation") * CHARACTERS_PER_TOKEN
    return Work(host=(Term("the articles and their sentences", 10 * text),), host_seconds=10)


def _statistics(case: _Case) -> Work:
    """Return the work of a statistic pass: one forward, or one forward and one backward pass.

    ``fisher`` goes back window by window. Its products are those of one backward pass, but a layer
    holds the sums of gradients and of their squares, fp32, beside one window's gradients, and
    their fp32 copy where they are in half precision: block x (8 + item, and 4 if item < 4) bytes.
    Every window's gradients pass through the memory ``FISHER_TRANSFERS`` times, its weights
    twice forward and once back.

    The passes over the whole model (``..._whole``) hold the gradients of what is outside the layers
    beside that, fp32, with a product and, over several batches, their sums. ``fms_gradients`` goes
    forward once more before, ``fms_direct`` forward twice and through the head alone back.
    """
    model, item = case.model, case.item
    name = str(case.param("name"))
    if name == "zeroth_order":
        return _zeroth_order(case)
    if name in _DEPTH_PASSES:
        return _depth(case, _DEPTH_PASSES[name])
    outside, name = name.endswith("_whole"), name.removesuffix("_whole")
    calibration = case.node.inputs["calibration"].params
    windows, length = calibration["windows"], calibration["length"]
    per_batch = 1 if name == "fisher" else case.param("batch_windows")
    batches = math.ceil(windows / per_batch)
    batch = min(windows, per_batch) * length
    tokens = windows * length
    device, host, seconds = _loaded(case, model.parameters)
    linears = model.linears.values()
    moved = 0.0
    if name in ("gradients", "fisher", "fms_gradients"):
        # Bounded by one layer's gradients: they are reduced before the next layer's exist.
        fisher = name == "fisher"
        # Sums are fp32; gradients of half precision are there twice while they are widened.
        widened = 4 if item < 4 else 0
        sums = 8 + widened if fisher else item + widened if batches > 1 else 0
        layer = model.block * (item + sums) + model.largest * 4
        # A recomputed layer beside the kept products, and the gradients of its intermediates.
        gradients = item * 4 * (model.hidden + model.inner) + model.score_token_bytes(item, length)
        backward = batch * (model.graph_token_bytes(item, length) + gradients)
        products = max(KEPT_BYTES, model.parameters * item // KEPT_WEIGHTS)
        device += (
            Term(
                f"inputs of {model.layers} layers x {tokens:,} tokens x {model.hidden} x {item} B",
                tokens * (model.layers + 2) * model.hidden * item,
            ),
            Term("kept products", min(products, backward * model.layers)),
            Term(f"one layer's graph of {batch:,} tokens", backward),
            Term("one layer's gradients", layer),
            Term("four chunks of logits", 4 * HEAD_BYTES),
        )
        # Two sums over rows and two over columns, fp32; second order has four.
        kept = 16 if fisher else 8
        disk = model.layers * kept * sum(rows + columns for rows, columns in linears)
        if fisher:
            blocks = model.layers * model.block
            moved = windows * blocks * (4 * FISHER_TRANSFERS + 3 * item)
        forwards = GRADIENT_FORWARDS + (name == "fms_gradients")
        flops = forwards * tokens * model.flops(model.parameters)
        if outside:
            outer = model.parameters - model.layers * model.block
            # A part of the gradient in the weights' type, the batch's in fp32, their product and
            # absolute value; sums and squares.
            each = item + 12 + (8 if fisher else 4 if batches > 1 else 0)
            device += (Term("gradients outside the layers", outer * each),)
            disk += kept * (outer // model.hidden + model.hidden)
            flops += GRADIENT_FORWARDS * tokens * model.flops(outer)
    else:
        # The hooks square the widest input in fp32 and sum it in fp64; block influence normalises
        # the residual stream.
        hooks = max(16 * model.inner, 20 * model.hidden)
        device += (
            Term(
                f"a layer's forward pass over {batch:,} tokens",
                batch * (model.forward_token_bytes(item, length) + hooks),
            ),
        )
        if not case.on_gpu:
            # The small results that every layer leaves keep the heap below them from shrinking.
            hole = min(HEAP_BLOCK_BYTES, batch * model.inner * 4)
            label = f"holes in the heap, {model.layers} layers x {hole / 1e6:.3g} MB"
            device += (Term(label, model.layers * hole),)
        disk = model.layers * 8 * sum(columns for _, columns in linears)
        flops = tokens * model.flops(model.parameters)
        if name == "influence":
            device += (Term("hidden states, thrice", 3 * tokens * model.hidden * item),)
            # One layer fewer in every pass.
            flops *= (model.layers + 1) / 2 if case.param("options")["recompute"] else 1
        if name == "fms_direct":
            device += (
                Term("hidden states and gradients", 4 * tokens * model.hidden * item),
                Term("a projection's gradient and product", 2 * model.largest * 4),
                Term("three chunks of logits", 3 * HEAD_BYTES),
            )
            # Twice forward, the head back, and a product of the output projections' shape.
            flops *= 3
    return Work(device, host, flops, moved, host_seconds=seconds, disk=disk + SMALL_BYTES)


def _zeroth_order(case: _Case) -> Work:
    """Return the work of gradients from forward passes: many of them, and nothing weight-sized.

    Directions of weights are drawn for every side and once more for the estimate, and every moved
    matrix is written. Streamed layers are read in every walk, which as many directions share as
    have their hidden states in ``STREAM_BYTES``.
    """
    model, item, options = case.model, case.item, case.param("options")
    calibration = case.node.inputs["calibration"].params
    windows, length = calibration["windows"], calibration["length"]
    tokens = windows * length
    batch = min(windows, case.param("batch_windows")) * length
    count, sides, by_layer = options["perturbations"], options["sides"], options["scope"] == "layer"
    minibatch = (options["minibatch"] or windows) * length
    states = minibatch * model.hidden * item
    pair = sides * states
    together = min(max(STREAM_BYTES // pair, 1), count)
    begun = count if options["fresh"] else 1
    depth = (model.layers + 1) / 2 if by_layer else 1
    gates = options["perturbation"] == "gates"
    device, host, seconds = _loaded(case, model.parameters)
    walks = 2 + math.ceil(count / together) * (model.layers * depth if by_layer else 1)
    if options["streamed"]:
        outer = model.parameters - model.layers * model.block
        held = (outer + 2 * model.block) * item
        device = (Term("weights outside the layers and two blocks", held, estimated=False),)
        # A mapped layer while it is copied.
        host = (Term("a layer on its way", 2 * model.block * model.item),)
        seconds += walks * model.layers * model.block * model.item / GB / case.cluster.host.disk_gbs
    moved = 0.0
    device += (
        Term(
            f"hidden states of {together} directions and {begun} minibatches",
            together * pair + begun * states + 2 * tokens * model.hidden * item,
        ),
        Term(
            f"a layer's forward pass over {batch:,} tokens",
            batch * (model.forward_token_bytes(item, length) + 16 * model.inner),
        ),
        Term("three chunks of logits", 3 * HEAD_BYTES),
    )
    if not gates:
        device += (Term("a moved matrix, its estimate and product", model.largest * (item + 8)),)
        drawn = count * model.layers * model.block * (sides * depth + 1)
        if case.on_gpu:
            moved = drawn * (8 + 2 * item)
        else:
            seconds += drawn / DRAWN_PER_SECOND
    passes = 2 + count * sides * depth * minibatch / tokens
    flops = passes * tokens * model.flops(model.parameters)
    disk = model.layers * 4 * sum(rows + columns for rows, columns in model.linears.values())
    return Work(device, host, flops, moved, host_seconds=seconds, disk=disk + SMALL_BYTES)


@dataclass(frozen=True)
class _Walks:
    """What a pass over the model without some of its blocks computes and holds.

    Attributes:
        blocks: blocks gone through, all candidates together; those without a part count in full.
        heads: times that the head is applied.
        states: hidden states of all windows that are held at once.
    """

    blocks: float
    heads: float
    states: int


def _removal(layers: int, options: Mapping[str, Any]) -> _Walks:
    # What is behind each candidate, and the whole model.
    return _Walks(layers * (layers + 3) / 2, layers + 1, 2)


def _greedy(layers: int, options: Mapping[str, Any]) -> _Walks:
    # No candidate is given up: an upper bound.
    left = [layers - gone for gone in range(math.floor(options["most"] * layers))]
    return _Walks(sum(n * (layers + 1) / 2 + layers for n in left), sum(left), 3)


def _coalitions(layers: int, options: Mapping[str, Any]) -> _Walks:
    # Counted as if nothing were missing: an upper bound. The whole model's logits are made anew.
    draws = options["draws"] * {"leave_one_out": layers, "chains": layers + 1}.get(
        options["scheme"], 1
    )
    return _Walks((draws + 1) * layers, 2 * (draws + 1), 3)


def _one_walk(layers: int, options: Mapping[str, Any]) -> _Walks:
    # Inputs, what is between attention and MLP, outputs; norms in fp32.
    return _Walks(layers, 0, 6)


def _laco(layers: int, options: Mapping[str, Any]) -> _Walks:
    # A merge is tried at most once per layer; what is in front of it is kept, at every layer.
    return _Walks(layers * (layers + 3) / 2, 0, layers + 3)


_DEPTH_PASSES: dict[str, Callable[[int, Mapping[str, Any]], _Walks]] = {
    "removal": _removal,
    "greedy": _greedy,
    "coalitions": _coalitions,
    "updates": _one_walk,
    "emulation": _one_walk,
    "laco": _laco,
}


def _depth(case: _Case, walks: Callable[[int, Mapping[str, Any]], _Walks]) -> Work:
    """Return the work of the passes that try the model without some of its blocks."""
    model, item = case.model, case.item
    calibration = case.node.inputs["calibration"].params
    options = case.node.params.get("options", {})
    windows = min(calibration["windows"], options.get("sentences", calibration["windows"]))
    tokens = windows * calibration["length"]
    batch = min(windows, case.param("batch_windows")) * calibration["length"]
    work = walks(model.layers, options)
    device, host, seconds = _loaded(case, model.parameters)
    device += (
        Term(f"hidden states at {work.states} places", work.states * tokens * model.hidden * item),
        Term(
            f"a layer's forward pass over {batch:,} tokens",
            batch * model.forward_token_bytes(item, calibration["length"]),
        ),
        Term("three chunks of logits", 3 * HEAD_BYTES),
    )
    products = work.blocks * model.block + work.heads * model.vocabulary * model.hidden
    disk = SMALL_BYTES
    name = str(case.param("name"))
    if name == "laco":
        device += (
            Term("a merged layer and a sum in fp32", model.block * item + model.largest * 8),
        )
    if name == "emulation":
        rank, square = options["rank"], model.hidden**2
        disk += model.layers * model.hidden * 4 * (2 + 2 * rank)
        if rank:
            # Two products, a copy of each, the solution, eigenvectors and their work space.
            device += (
                Term("products of hidden states, fp64", 10 * 8 * square),
                Term("a batch's tokens in fp64", 2 * 8 * batch * model.hidden),
            )
            # In fp64; a solution and eigenvectors are some twenty products of squares.
            products += model.layers * 2 * square * (2 + 10 * model.hidden / tokens)
    return Work(device, host, 2.0 * tokens * products, host_seconds=seconds, disk=disk)


def _scores(case: _Case) -> Work:
    """Return the work of scoring: weights are read one tensor at a time from the mapped files."""
    model = case.model
    disk = model.layers * 8 * (model.inner + model.kv) + SMALL_BYTES
    if (maps := case.node.inputs.get("emulation")) is not None:
        disk += model.layers * 8 * model.hidden * (1 + 2 * maps.params["options"]["rank"])
    if case.param("method") in case.cluster.methods_without_weights:
        return Work(host=(Term("statistics and scores", 10 * disk),), host_seconds=5, disk=disk)
    stored = model.parameters * model.item
    mapped = case.mapped(f"mapped weights {_billions(model.parameters)} x {model.item} B", stored)
    distance = _distance(case)
    if distance == "nearest":
        return Work(host=(Term("statistics and scores", 10 * disk),), host_seconds=5, disk=disk)
    if distance is not None:
        return _distances(case, mapped, disk)
    tensor = Term("three fp64 copies of the largest tensor", 3 * 8 * model.largest)
    # fp64 copy, absolute value and power: each written and read.
    passes = model.parameters * 6 * 8 / GB / case.cluster.host.memory_gbs
    seconds = stored / GB / case.cluster.host.disk_gbs + passes
    return Work(host=(mapped, tensor), host_seconds=seconds, disk=disk)


def _distance(case: _Case) -> str | None:
    """Return how a method measures distances between blocks; None for those that do not."""
    method = create(case.param("method"), case.param("parameters"))
    return getattr(method, "distance", None) if method.rule().sharer else None


def _decomposition(shape: tuple[int, int], rank: int) -> float:
    """Return the operations of a truncated singular value decomposition."""
    small, large = sorted(shape)
    if 2 * (rank + OVERSAMPLE) >= small:
        return float(SVD_OPERATIONS * large * small**2)
    width = rank + OVERSAMPLE
    products = 2 * (2 * ITERATIONS + 2) * large * small * width
    return float(products + (2 * ITERATIONS + 2) * 4 * (large + small) * width**2)


def _distances(case: _Case, mapped: Term, disk: float) -> Work:
    """Return the work of distances between all blocks: a decomposition of every matrix.

    The factors of all layers' matrices of one name are held, fp32; a pair takes two products of
    factors and two symmetric eigenvalue problems of twice the rank, fp64.
    """
    model = case.model
    disk += 8 * model.layers**2
    seconds = model.parameters * model.item / GB / case.cluster.host.disk_gbs
    pairs = model.layers * (model.layers - 1) / 2
    if _distance(case) == "frobenius":
        # Pieces of rows, fp64, with their product.
        piece = Term("pieces of all layers' rows", 3 * 256 * MIB + model.largest * 4)
        flops = 2.0 * model.layers**2 * sum(r * c for r, c in model.linears.values())
        # Every piece opens all layers' matrices again.
        return Work(host=(mapped, piece), flops=2 * flops, host_seconds=2 * seconds, disk=disk)
    source = _source(case.node)
    assert source is not None
    sharer = create(case.param("method"), case.param("parameters")).rule().sharer
    assert sharer is not None
    geometry = source.params["geometry"]
    rank = sharer.rank_of(family_of(geometry), geometry)
    widest = max(sum(shape) for shape in model.linears.values())
    exact = any(2 * (rank + OVERSAMPLE) >= min(shape) for shape in model.linears.values())
    terms = (
        Term("factors of all layers' matrices of a name", 4 * model.layers * rank * widest),
        Term("a matrix while it is decomposed", model.largest * (32 if exact else 12)),
        Term("a pair's products and eigenvectors", 8 * 6 * (2 * rank) ** 2),
    )
    flops = 0.0
    for shape in model.linears.values():
        pair = 2 * rank**2 * sum(shape) + 4 * EIGEN_OPERATIONS * (2 * rank) ** 3
        flops += model.layers * _decomposition(shape, rank) + pairs * pair
    return Work(host=(mapped, *terms), flops=flops, host_seconds=seconds, disk=disk)


def _written(case: _Case, parameters: int) -> tuple[Term, float]:
    """Return the shard in memory while a checkpoint is written, and the seconds for all of it."""
    stored = parameters * case.model.item
    shard = Term("an output shard and what is being cut for it", 2 * min(stored, SHARD_BYTES))
    return shard, case.read_seconds(stored)


def _prune(case: _Case) -> Work:
    """Return the work of surgery: one mapped source file, one output shard."""
    model = case.model
    kept = remaining_parameters(case.node)
    stored = model.parameters * model.item
    # Views of unchanged tensors keep the file before mapped until their shard is written.
    source = min(stored, case.cluster.host.shard_gb * GB + SHARD_BYTES)
    shard, written = _written(case, kept)
    host = [case.mapped("mapped source file", source), shard]
    flops = 0.0
    if (shared := shared_layers(case.node)) and not shared.repeated:
        # Two matrices, their difference in fp32 and what its decomposition takes, fp64 if exact.
        host.append(Term("a difference of matrices, decomposed", model.largest * 40))
        each = sum(_decomposition(shape, shared.rank) for shape in model.linears.values())
        flops = shared.layers * each
    return Work(
        host=tuple(host),
        flops=flops,
        host_seconds=case.read_seconds(stored) + written,
        disk=kept * model.item + TOKENIZER_BYTES,
    )


def _adapter(case: _Case, node: Node) -> tuple[LoraRecipe, int]:
    """Return a recovery's recipe and what it trains: LoRA, or what layers that share weights add.

    Of these, norms and biases are counted with what is trained, which they are not.
    """
    recipe = parse_recipe(node.params["recipe"])
    shared = shared_layers(node.inputs["checkpoint"])
    if shared is None:
        return recipe, case.model.lora_parameters(recipe)
    lora = case.model.lora_parameters(recipe) if recipe.kept_lora else 0
    return recipe, lora + shared.layers * shared.each


def _recover(case: _Case) -> Work:
    """Return the work of LoRA: frozen weights, adapters with Adam's moments, all layers' graphs."""
    checkpoint, item = case.node.inputs["checkpoint"], case.item
    model = _deep(case.model, checkpoint)
    recipe, adapter = _adapter(case, case.node)
    kept = remaining_parameters(checkpoint)
    device, host, seconds = _loaded(case, kept)
    batch = recipe.micro_batch * recipe.length
    # Each target keeps its input as the adapter sees it: a bf16 copy, or what dropout leaves of it
    # with the mask, which is fp32 on a CPU.
    mask = 1 if case.on_gpu else 4
    copies = (item + mask) if recipe.dropout else (item if item == 2 else 0)
    inputs = sum(columns for _, columns in model.lora_targets(recipe))
    graphs = batch * model.layers * (model.graph_token_bytes(item, recipe.length) + copies * inputs)
    if shared := shared_layers(checkpoint):
        # Inputs of all maps, what their factors give, and normalised outputs in fp32.
        own = item * sum(columns + shared.rank for _, columns in model.linears.values())
        graphs += batch * shared.layers * (own + 4 * 4 * model.hidden)
    # Logits, their exponentials and, below fp32, a copy in each dtype.
    logits = LOSS_CHUNK * model.vocabulary * (8 if item == 4 else 12)
    # Weight, gradient and two moments; the best weights so far.
    size = 20 if recipe.eval_every else 16
    device += (
        Term(f"adapters {_billions(adapter)} x {size} B", adapter * size, estimated=False),
        Term(f"graphs of {model.layers} layers x {batch:,} tokens", graphs),
        Term(f"{LOSS_CHUNK} positions of logits", logits),
    )
    if not case.on_gpu:
        device += (Term("holes in the heap", HEAP_SHARE * graphs),)
    streamed = bool(case.node.inputs["text"].params.get("stream"))
    # Of a stream no more is held than one step reads.
    text = recipe.batch * recipe.length if streamed else case.text_tokens("recovery")
    records, validated = case.records()
    count = None if streamed else records or max(text // recipe.length, 1)
    steps = total_steps(count, recipe)
    tokens = steps * recipe.batch * recipe.length
    looks = math.ceil(steps / recipe.eval_every) if recipe.eval_every else 0
    forwards = RECOVERY_FORWARDS * tokens + looks * validated * recipe.length
    return Work(
        device,
        (*host, _tokenised(text, INSTRUCTION_TOKEN_BYTES if records else TOKEN_BYTES)),
        flops=forwards * model.flops(computed_parameters(checkpoint)),
        host_seconds=seconds + (steps if streamed else 1) * text / 1e5,
        disk=adapter * 4 + SMALL_BYTES,
        replicas=recipe.processes,
    )


def _merge(case: _Case) -> Work:
    """Return the work of merging: the whole model in fp32 on the host."""
    model = case.model
    kept = remaining_parameters(case.node.inputs["checkpoint"])
    count = _billions(kept)
    host = [Term(f"weights {count} x 4 B", kept * 4, estimated=False)]
    if model.dtype != "float32":
        host.append(case.mapped(f"mapped weight file {count} x {model.item} B", kept * model.item))
    _, adapter = _adapter(case, case.node.inputs["adapter"])
    shard, written = _written(case, kept)
    host += [
        Term(f"adapters {_billions(adapter)} x 8 B", adapter * 8),
        Term("the largest tensor and its change", model.largest * 8),
        shard,
    ]
    return Work(
        host=tuple(host),
        host_seconds=case.read_seconds(kept * model.item) + written,
        disk=kept * model.item + TOKENIZER_BYTES,
    )


def _evaluated(case: _Case) -> tuple[int, tuple[Term, ...], tuple[Term, ...], float, int]:
    """Return a checkpoint's parameters, its terms and seconds, and an adapter's bytes per token."""
    kept = remaining_parameters(case.node.inputs["checkpoint"])
    device, host, seconds = _loaded(case, kept)
    if "adapter" not in case.node.inputs:
        return kept, device, host, seconds, 0
    _, adapter = _adapter(case, case.node.inputs["adapter"])
    device += (Term(f"adapter {_billions(adapter)} x 4 B", adapter * 4, estimated=False),)
    # Adapters are fp32, and so are the copies of their inputs.
    widest = 4 * max(case.model.inner, case.model.hidden)
    return kept, device, host, seconds, widest


def _perplexity(case: _Case) -> Work:
    """Return the work of perplexity: one body pass per batch, logits in blocks of entries."""
    item, checkpoint = case.item, case.node.inputs["checkpoint"]
    model = _deep(case.model, checkpoint)
    _, device, host, seconds, extra = _evaluated(case)
    text = case.text_tokens("evaluation")
    window = case.param("window")
    count = max(text // window, 1)
    if case.param("windows") is not None:
        count = min(count, case.param("windows"))
    most = case.node.params.get("batch_tokens")
    most = most or EVALUATION_TOKENS["cuda" if case.on_gpu else "cpu"]
    batch = min(count, max(1, most // window)) * window
    entry = 4 if item == 4 else 4 + item
    block = min(LOGITS_CHUNK, model.vocabulary * item // (LOGITS_SHARE * entry))
    device += (
        Term(
            f"a layer's forward pass over {batch:,} tokens",
            batch * (model.forward_token_bytes(item, window) + extra),
        ),
        Term(f"blocks of {block:,} logits", batch * block * entry),
    )
    return Work(
        device,
        (*host, _tokenised(text)),
        flops=count * window * model.flops(computed_parameters(checkpoint)),
        host_seconds=seconds + text / 1e5,
    )


def _tasks(case: _Case) -> Work:
    """Return the work of the tasks: whole logits and their fp32 log-softmax, and a cache."""
    item, checkpoint = case.item, case.node.inputs["checkpoint"]
    model = _deep(case.model, checkpoint)
    _, device, host, seconds, extra = _evaluated(case)
    table, names = case.cluster.tasks, case.param("tasks")
    sizes = [table.get(name, table["default"]) for name in names]
    longest = min(max(size.longest for size in sizes), model.positions)
    batch = case.param("batch_size") * longest
    # Below fp32 the log-softmax converts its input first.
    logits = model.vocabulary * (8 if item == 4 else item + 8)
    device += (
        Term(f"logits of {batch:,} tokens x {model.vocabulary:,}, twice", batch * logits),
        Term("key-value cache", model.kv_cache_bytes(batch, item), estimated=False),
        Term("a layer's forward pass", batch * (model.forward_token_bytes(item, longest) + extra)),
    )
    limit = case.node.params.get("limit") or math.inf
    requests = [(min(size.documents, limit) * size.choices, size.tokens) for size in sizes]
    tokens = sum(count * length for count, length in requests)
    return Work(
        device,
        host,
        flops=tokens * model.flops(computed_parameters(checkpoint)),
        # lm-eval builds, tokenises and collects every request in Python.
        host_seconds=seconds + sum(count for count, _ in requests) / 500 + 10 * len(names),
        disk=SMALL_BYTES * len(names),
    )


def _efficiency(case: _Case) -> Work:
    """Return the work of the timings: prefill and decode with a cache, then MACs once."""
    item, checkpoint = case.item, case.node.inputs["checkpoint"]
    model = _deep(case.model, checkpoint)
    _, device, host, seconds, extra = _evaluated(case)
    batch, length, new = (case.param(name) for name in ("batch", "length", "new_tokens"))
    prompt = batch * length
    repeats = case.param("warmup") + case.param("repeats")
    # MACs are counted on plain attention: scores and their fp32 softmax over all positions.
    scores = max(model.heads * length * (item + 4), model.score_token_bytes(item, length))
    device += (
        Term(
            f"key-value cache of {batch} x {length + new:,} tokens",
            model.kv_cache_bytes(batch * (length + new), item),
            estimated=False,
        ),
        Term(
            f"a layer's forward pass over {prompt:,} tokens",
            prompt * (model.forward_token_bytes(item, 0) + extra + scores),
        ),
        Term(f"logits of {prompt:,} tokens", prompt * model.vocabulary * item),
    )
    return Work(
        device,
        host,
        flops=(repeats + 2) * prompt * model.flops(computed_parameters(checkpoint)),
        # Every new token reads all weights once.
        moved=repeats * new * computed_parameters(checkpoint) * item,
        host_seconds=seconds,
    )


_STEPS: Mapping[str, Callable[[_Case], Work]] = {
    "fetch_model": _fetch_model,
    "fetch_text": _fetch_text,
    "fetch_analogies": _fetch_analogies,
    "calibration": _calibration,
    "tasks_data": _tasks_data,
    "statistics": _statistics,
    "scores": _scores,
    "prune": _prune,
    "recover": _recover,
    "merge": _merge,
    "perplexity": _perplexity,
    "tasks": _tasks,
    "efficiency": _efficiency,
}


def _need(terms: tuple[Term, ...], factor: float) -> float:
    return sum(term.size * (factor if term.estimated else 1) for term in terms)


def _seconds(case: _Case, work: Work, cpus: int) -> float:
    """Return the expected time; layers spread over several GPUs compute one after another."""
    host, share = case.cluster.host, case.cluster.utilisation
    if case.on_gpu:
        dtype = case.param("dtype")
        tflops = case.gpu.float32_tflops if dtype == "float32" else case.gpu.bfloat16_tflops
        rate, bandwidth = tflops * 1e12 * share.gpu, case.gpu.bandwidth_gbs
    else:
        rate, bandwidth = host.gflops_per_core * GB * cpus * share.cpu, host.memory_gbs
    moved = work.moved / (bandwidth * GB * share.bandwidth)
    return host.startup_seconds + work.host_seconds + work.flops / work.replicas / rate + moved


def _sum(terms: tuple[Term, ...]) -> str:
    return " + ".join(f"{term.label} ({term.size / GB:.3g} GB)" for term in terms)


def _gpus(case: _Case, need: float, growth: float, gpu_type: str) -> int:
    """Return the GPUs for ``need`` bytes; refuse what one node cannot hold at the first attempt."""
    device, most = str(case.param("device")), case.cluster.limits.gpus
    least = math.ceil(need / case.usable)
    index = int(device.partition(":")[2] or -1)
    if index >= most:
        raise InputError(
            f"{case.cluster.path}: limits.gpus is {most}; device {device} needs {index + 1} GPUs"
        )
    # A device with a number is one GPU, which must be visible under that number.
    room = 1 if index >= 0 else most
    if least > room:
        raise InputError(
            f"{case.cluster.path}: {case.node.step} of {'/'.join(case.node.labels)} needs "
            f"{need / GB:.1f} GB on device {device}, {least} x {gpu_type} with "
            f"{case.usable / GB:.1f} GB usable each; allowed: at most {room} on one node"
        )
    if index >= 0:
        return index + 1
    return min(math.ceil(need * growth / case.usable), most)


def _gpus_of_replicas(case: _Case, need: float, replicas: int) -> int:
    """Return the GPUs of data parallel processes; refuse more than a node has, or a split model."""
    if need > case.usable or replicas > case.cluster.limits.gpus:
        raise InputError(
            f"{case.cluster.path}: {case.node.step} of {'/'.join(case.node.labels)} asks for "
            f"{replicas} processes of {need / GB:.1f} GB, one per GPU; allowed: at most "
            f"{case.cluster.limits.gpus} on one node, {case.usable / GB:.1f} GB usable each"
        )
    return replicas


def request(node: Node, cluster: Cluster, attempt: int = 1, gpu_type: str | None = None) -> Request:
    """Return what the job of a step asks for.

    Args:
        node: the step.
        cluster: rates, factors, floors and limits.
        attempt: 1 for the first try; memory, GPUs and time grow with every other one.
        gpu_type: a type of the cluster file; None for its default.

    Raises:
        InputError: the GPU type is unknown, or the first attempt does not fit on one node.
    """
    name, _ = cluster.gpu(gpu_type)
    return _request(node, cluster, attempt, name)


def is_local(step: str, nodes: Iterable[Node], cluster: Cluster) -> bool:
    """Return whether a step's jobs run where the workflow was started.

    Some always do; those without a GPU also when all of them are expected to compute for less than
    ``local_below_seconds``.
    """
    if step in cluster.local_steps or step in DEVICE_STEPS:
        return step in cluster.local_steps
    most = cluster.host.startup_seconds + cluster.local_below_seconds
    return all(request(node, cluster).seconds < most for node in nodes if node.step == step)


@cache
def _request(node: Node, cluster: Cluster, attempt: int, gpu_type: str) -> Request:
    case = _Case(node, cluster, cluster.gpus[gpu_type])
    rules, host, limits = cluster.steps[node.step], cluster.host, cluster.limits
    work = _STEPS[node.step](case)
    cpus = max(rules.cpus, work.replicas * int(node.params.get("threads") or 1))
    seconds = _seconds(case, work, int(node.params.get("threads") or 1))
    growth = rules.memory_growth ** (attempt - 1)
    base = (host.python_mb + host.snakemake_mb) * MIB
    gpus, gpu_need, where = 0, 0.0, ""
    terms, replicas = work.host, work.replicas
    if case.on_gpu:
        base += host.cuda_mb * MIB
        gpu_need = _need(work.device, rules.memory_factor)
        gpus = _gpus(case, gpu_need, growth, gpu_type)
        if replicas > 1:
            gpus, gpu_need = _gpus_of_replicas(case, gpu_need, replicas), gpu_need * replicas
        where = f"GPU memory {gpu_need / GB:.1f} GB: {_sum(work.device)}"
    else:
        terms = work.device + work.host
    memory = (base + _need(terms, rules.memory_factor)) * replicas / MIB
    if memory > limits.mem_mb:
        raise InputError(
            f"{cluster.path}: {node.step} of {'/'.join(node.labels)} needs "
            f"{math.ceil(memory):,} MiB of host memory; limits.mem_mb is {limits.mem_mb:,}"
        )
    runtime = max(rules.min_runtime, math.ceil(seconds * rules.time_factor / 60))
    what = "; host memory" if gpus else "Host memory"
    processes = Term("Python and Snakemake" + (" and CUDA" if gpus else ""), base, False)
    return Request(
        gpus=gpus,
        mem_mb=min(math.ceil(max(memory, rules.min_mem_mb) * growth), limits.mem_mb),
        runtime=min(
            math.ceil(runtime * rules.time_growth ** (attempt - 1)),
            limits.runtime,
        ),
        cpus=cpus,
        exclusive=node.step == "efficiency",
        gpu_mem_mb=math.ceil(gpu_need / MIB),
        disk_mb=math.ceil(work.disk / MIB),
        seconds=seconds,
        explanation=f"{where}{what} {memory * MIB / GB:.1f} GB: "
        f"{_sum((processes, *terms))}; estimated parts x {rules.memory_factor:g}"
        + (f", all of it in each of {replicas} processes." if replicas > 1 else "."),
    )
