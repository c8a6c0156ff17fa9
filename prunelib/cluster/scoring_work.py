"""Work of scoring: of the passes over calibration windows, and of the scores themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prunelib.cluster.geometry import source_of
from prunelib.cluster.work import GB, MIB, SMALL_BYTES, Case, Term, Work, billions, loaded
from prunelib.families import family_of
from prunelib.methods import create
from prunelib.rules import Sharer

# Buffers that the steps' code fixes. Their modules import torch, so they are repeated here; a test
# holds the copies equal.
KEPT_BYTES = 640 * MIB
KEPT_WEIGHTS = 5
HEAD_BYTES = 32 * MIB
STREAM_BYTES = 32 * MIB
# Randomised decompositions: further directions, and iterations of two products each.
OVERSAMPLE = 32
ITERATIONS = 3

# glibc takes larger blocks from the system one by one and gives them back.
HEAP_BLOCK_BYTES = 32 * MIB
# Measured: by this share the heap around the graphs of all layers is larger than they are.
HEAP_SHARE = 0.2
# Forward, and once more with a graph before the way back through every product twice.
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


def _weights(case: Case, walks: float) -> tuple[tuple[Term, ...], tuple[Term, ...], float]:
    """Return what ``loaded`` does, or that of streamed layers, which every walk reads anew."""
    device, host, seconds = loaded(case, case.model.parameters)
    if not case.node.params.get("options", {}).get("streamed"):
        return device, host, seconds
    model, item = case.model, case.item
    held = (model.parameters - (model.layers - 1) * model.block) * item
    read = walks * model.layers * model.block * model.item
    return (
        (Term("weights outside the layers and one block", held, estimated=False),),
        # As it is stored, and in the type it is computed with.
        (Term("a tensor on its way", 2 * model.largest * model.item),),
        seconds + read / GB / case.cluster.host.disk_gbs,
    )


def statistics_work(case: Case) -> Work:
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
    if name in DEPTH_PASSES:
        return _depth(case, DEPTH_PASSES[name])
    outside, name = name.endswith("_whole"), name.removesuffix("_whole")
    calibration = case.node.inputs["calibration"].params
    windows, length = calibration["windows"], calibration["length"]
    per_batch = 1 if name == "fisher" else case.param("batch_windows")
    batches = math.ceil(windows / per_batch)
    batch = min(windows, per_batch) * length
    tokens = windows * length
    # Of these passes fms_direct alone streams: two walks.
    device, host, seconds = _weights(case, 2)
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


def _zeroth_order(case: Case) -> Work:
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
    # Layer by layer every group of directions goes through what follows, from every layer.
    walks = 2 + math.ceil(count / together) * depth + by_layer
    device, host, seconds = _weights(case, walks)
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
        drawn = count * model.layers * model.block * (sides + 1)
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


DEPTH_PASSES: dict[str, Callable[[int, Mapping[str, Any]], _Walks]] = {
    "removal": _removal,
    "greedy": _greedy,
    "coalitions": _coalitions,
    "updates": _one_walk,
    "emulation": _one_walk,
    "laco": _laco,
}


def _depth(case: Case, walks: Callable[[int, Mapping[str, Any]], _Walks]) -> Work:
    """Return the work of the passes that try the model without some of its blocks."""
    model, item = case.model, case.item
    calibration = case.node.inputs["calibration"].params
    options = case.node.params.get("options", {})
    windows = min(calibration["windows"], options.get("sentences", calibration["windows"]))
    tokens = windows * calibration["length"]
    batch = min(windows, case.param("batch_windows")) * calibration["length"]
    work = walks(model.layers, options)
    device, host, seconds = loaded(case, model.parameters)
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


def scores_work(case: Case) -> Work:
    """Return the work of scoring: weights are read one tensor at a time from the mapped files."""
    model = case.model
    disk = model.layers * 8 * (model.inner + model.kv) + SMALL_BYTES
    if (maps := case.node.inputs.get("emulation")) is not None:
        disk += model.layers * 8 * model.hidden * (1 + 2 * maps.params["options"]["rank"])
    if case.param("method") in case.cluster.methods_without_weights:
        return Work(host=(Term("statistics and scores", 10 * disk),), host_seconds=5, disk=disk)
    stored = model.parameters * model.item
    mapped = case.mapped(f"mapped weights {billions(model.parameters)} x {model.item} B", stored)
    method = create(case.param("method"), case.param("parameters"))
    sharer, distance = method.rule().sharer, getattr(method, "distance", None)
    if sharer is not None and distance == "nearest":
        return Work(host=(Term("statistics and scores", 10 * disk),), host_seconds=5, disk=disk)
    if sharer is not None and distance is not None:
        return _distances(case, distance, sharer, mapped, disk)
    tensor = Term("three fp64 copies of the largest tensor", 3 * 8 * model.largest)
    # fp64 copy, absolute value and power: each written and read.
    passes = model.parameters * 6 * 8 / GB / case.cluster.host.memory_gbs
    seconds = stored / GB / case.cluster.host.disk_gbs + passes
    return Work(host=(mapped, tensor), host_seconds=seconds, disk=disk)


def decomposition(shape: tuple[int, int], rank: int) -> float:
    """Return the operations of a truncated singular value decomposition."""
    small, large = sorted(shape)
    if 2 * (rank + OVERSAMPLE) >= small:
        return float(SVD_OPERATIONS * large * small**2)
    width = rank + OVERSAMPLE
    products = 2 * (2 * ITERATIONS + 2) * large * small * width
    return float(products + (2 * ITERATIONS + 2) * 4 * (large + small) * width**2)


def _distances(case: Case, distance: str, sharer: Sharer, mapped: Term, disk: float) -> Work:
    """Return the work of distances between all blocks: a decomposition of every matrix or pair.

    The factors of all layers' matrices of one name are held, fp32; a pair takes two products of
    factors and two symmetric eigenvalue problems of twice the rank, fp64.
    """
    model = case.model
    disk += 8 * model.layers**2
    seconds = model.parameters * model.item / GB / case.cluster.host.disk_gbs
    pairs = model.layers * (model.layers - 1) / 2
    if distance == "frobenius":
        # Pieces of rows, fp64, with their product.
        piece = Term("pieces of all layers' rows", 3 * 256 * MIB + model.largest * 4)
        flops = 2.0 * model.layers**2 * sum(r * c for r, c in model.linears.values())
        # Every piece opens all layers' matrices again.
        return Work(host=(mapped, piece), flops=2 * flops, host_seconds=2 * seconds, disk=disk)
    source = source_of(case.node)
    assert source is not None
    geometry = source.params["geometry"]
    rank = sharer.rank_of(family_of(geometry), geometry)
    widest = max(sum(shape) for shape in model.linears.values())
    exact = any(2 * (rank + OVERSAMPLE) >= min(shape) for shape in model.linears.values())
    decomposed = Term("a matrix while it is decomposed", model.largest * (32 if exact else 12))
    if distance == "residual":
        flops = pairs * sum(decomposition(shape, rank) for shape in model.linears.values())
        both = Term("a pair of matrices, and their difference in fp64", model.largest * 16)
        # All before it are read again for every layer.
        seconds *= (model.layers + 1) / 2
        return Work(host=(mapped, decomposed, both), flops=flops, host_seconds=seconds, disk=disk)
    terms = (
        Term("factors of all layers' matrices of a name", 4 * model.layers * rank * widest),
        decomposed,
        Term("a pair's products and eigenvectors", 8 * 6 * (2 * rank) ** 2),
    )
    flops = 0.0
    for shape in model.linears.values():
        pair = 2 * rank**2 * sum(shape) + 4 * EIGEN_OPERATIONS * (2 * rank) ** 3
        flops += model.layers * decomposition(shape, rank) + pairs * pair
    return Work(host=(mapped, *terms), flops=flops, host_seconds=seconds, disk=disk)
