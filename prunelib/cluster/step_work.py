"""Work of every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from prunelib.checkpoint import SHARD_BYTES
from prunelib.cluster.geometry import (
    computed_parameters,
    parameter_bound,
    shared_layers,
    with_repeated,
)
from prunelib.cluster.scoring_work import HEAP_SHARE, decomposition, scores_work, statistics_work
from prunelib.cluster.work import (
    GB,
    SMALL_BYTES,
    TOKEN_BYTES,
    Case,
    Term,
    Work,
    billions,
    loaded,
    tokenised,
)
from prunelib.experiment.graph import Node
from prunelib.recovery.recipe import LoraRecipe, parse_recipe, total_steps

# Buffers that the steps' code fixes. Their modules import torch, so they are repeated here; a test
# holds the copies equal.
LOSS_CHUNK = 256
EVALUATION_TOKENS = {"cpu": 1024, "cuda": 16384}
LOGITS_CHUNK = 2048
LOGITS_SHARE = 8

# Instructions are tokenised in pieces, of which only the ids are kept: twice while they are put
# together, beside the records' strings.
INSTRUCTION_TOKEN_BYTES = 32
CHARACTERS_PER_TOKEN = 4
TOKENIZER_BYTES = 10 * 10**6
# A backward pass goes through every product twice; LoRA's frozen weights need one of the two.
RECOVERY_FORWARDS = 2.5


def _fetch_model(case: Case) -> Work:
    stored = case.model.parameters * case.model.item
    host: tuple[Term, ...] = ()
    if str(case.param("source")).endswith(".gguf"):
        count = billions(case.model.parameters)
        host = (Term(f"dequantised weights {count} x 4 B, twice", 8 * case.model.parameters),)
    elif case.node.params.get("weights") == "bin":
        shard = min(stored, case.cluster.host.shard_gb * GB)
        host = (Term("a pickled shard and its copy", 2 * shard),)
    seconds = stored / GB / case.cluster.host.network_gbs + case.read_seconds(stored)
    return Work(host=host, host_seconds=seconds, disk=stored + TOKENIZER_BYTES)


def _fetch_text(case: Case) -> Work:
    size = case.cluster.tokens_of(case.param("name")) * CHARACTERS_PER_TOKEN
    if case.node.params.get("stream"):
        # Local files are hashed; of a hub data set one row is read.
        local = not str(case.param("source")).startswith("hf:")
        return Work(host_seconds=60 + local * size / GB / case.cluster.host.hash_gbs)
    return Work(host=(Term("the articles, twice", 2 * size),), host_seconds=60, disk=size)


def _fetch_analogies(case: Case) -> Work:
    return Work(disk=2 * SMALL_BYTES)


def _calibration(case: Case) -> Work:
    tokens = case.text_tokens("calibration")
    return Work(host=(tokenised(tokens),), host_seconds=tokens / 1e5)


def _tasks_data(case: Case) -> Work:
    text = case.text_tokens("evaluation") * CHARACTERS_PER_TOKEN
    return Work(host=(Term("the articles and their sentences", 10 * text),), host_seconds=10)


def _written(case: Case, parameters: int) -> tuple[Term, float]:
    """Return the shard in memory while a checkpoint is written, and the seconds for all of it."""
    stored = parameters * case.model.item
    shard = Term("an output shard and what is being cut for it", 2 * min(stored, SHARD_BYTES))
    return shard, case.read_seconds(stored)


def _prune(case: Case) -> Work:
    """Return the work of surgery: one mapped source file, one output shard."""
    model = case.model
    kept = parameter_bound(case.node)
    stored = model.parameters * model.item
    # Views of unchanged tensors keep the file before mapped until their shard is written.
    source = min(stored, case.cluster.host.shard_gb * GB + SHARD_BYTES)
    shard, written = _written(case, kept)
    host = [case.mapped("mapped source file", source), shard]
    flops = 0.0
    if (shared := shared_layers(case.node)) and not shared.repeated:
        # Two matrices, their difference in fp32 and what its decomposition takes, fp64 if exact.
        host.append(Term("a difference of matrices, decomposed", model.largest * 40))
        each = sum(decomposition(shape, shared.rank) for shape in model.linears.values())
        flops = shared.layers * each
    return Work(
        host=tuple(host),
        flops=flops,
        host_seconds=case.read_seconds(stored) + written,
        disk=kept * model.item + TOKENIZER_BYTES,
    )


def _adapter(case: Case, node: Node) -> tuple[LoraRecipe, int]:
    """Return a recovery's recipe and what it trains: LoRA, or what layers that share weights add.

    Of these, norms and biases are counted with what is trained, which they are not.
    """
    recipe = parse_recipe(node.params["recipe"])
    shared = shared_layers(node.inputs["checkpoint"])
    if shared is None:
        return recipe, case.model.lora_parameters(recipe)
    lora = case.model.lora_parameters(recipe) if recipe.kept_lora else 0
    return recipe, lora + shared.layers * shared.each


def _recover(case: Case) -> Work:
    """Return the work of LoRA: frozen weights, adapters with Adam's moments, all layers' graphs."""
    checkpoint, item = case.node.inputs["checkpoint"], case.item
    model = with_repeated(case.model, checkpoint)
    recipe, adapter = _adapter(case, case.node)
    kept = parameter_bound(checkpoint)
    device, host, seconds = loaded(case, kept)
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
        Term(f"adapters {billions(adapter)} x {size} B", adapter * size, estimated=False),
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
        (*host, tokenised(text, INSTRUCTION_TOKEN_BYTES if records else TOKEN_BYTES)),
        flops=forwards * model.flops(computed_parameters(checkpoint)),
        host_seconds=seconds + (steps if streamed else 1) * text / 1e5,
        disk=adapter * 4 + SMALL_BYTES,
        replicas=recipe.processes,
    )


def _merge(case: Case) -> Work:
    """Return the work of merging: the whole model in fp32 on the host."""
    model = case.model
    kept = parameter_bound(case.node.inputs["checkpoint"])
    count = billions(kept)
    host = [Term(f"weights {count} x 4 B", kept * 4, estimated=False)]
    if model.dtype != "float32":
        host.append(case.mapped(f"mapped weight file {count} x {model.item} B", kept * model.item))
    _, adapter = _adapter(case, case.node.inputs["adapter"])
    shard, written = _written(case, kept)
    host += [
        Term(f"adapters {billions(adapter)} x 8 B", adapter * 8),
        Term("the largest tensor and its change", model.largest * 8),
        shard,
    ]
    return Work(
        host=tuple(host),
        host_seconds=case.read_seconds(kept * model.item) + written,
        disk=kept * model.item + TOKENIZER_BYTES,
    )


def _evaluated(case: Case) -> tuple[int, tuple[Term, ...], tuple[Term, ...], float, int]:
    """Return a checkpoint's parameters, its terms and seconds, and an adapter's bytes per token."""
    kept = parameter_bound(case.node.inputs["checkpoint"])
    device, host, seconds = loaded(case, kept)
    if "adapter" not in case.node.inputs:
        return kept, device, host, seconds, 0
    _, adapter = _adapter(case, case.node.inputs["adapter"])
    device += (Term(f"adapter {billions(adapter)} x 4 B", adapter * 4, estimated=False),)
    # Adapters are fp32, and so are the copies of their inputs.
    widest = 4 * max(case.model.inner, case.model.hidden)
    return kept, device, host, seconds, widest


def _perplexity(case: Case) -> Work:
    """Return the work of perplexity: one body pass per batch, logits in blocks of entries."""
    item, checkpoint = case.item, case.node.inputs["checkpoint"]
    model = with_repeated(case.model, checkpoint)
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
        (*host, tokenised(text)),
        flops=count * window * model.flops(computed_parameters(checkpoint)),
        host_seconds=seconds + text / 1e5,
    )


def _tasks(case: Case) -> Work:
    """Return the work of the tasks: whole logits and their fp32 log-softmax, and a cache."""
    item, checkpoint = case.item, case.node.inputs["checkpoint"]
    model = with_repeated(case.model, checkpoint)
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


def _efficiency(case: Case) -> Work:
    """Return the work of the timings: prefill and decode with a cache, then MACs once."""
    item, checkpoint = case.item, case.node.inputs["checkpoint"]
    model = with_repeated(case.model, checkpoint)
    _, device, host, seconds, extra = _evaluated(case)
    first, length, new = (case.param(name) for name in ("batch", "length", "new_tokens"))
    batches = (first, *case.node.params.get("batches", ()))
    batch = max(batches)
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
        flops=((repeats + 2) * first + repeats * sum(batches[1:]))
        * length
        * model.flops(computed_parameters(checkpoint)),
        # Every new token reads all weights once.
        moved=repeats * len(batches) * new * computed_parameters(checkpoint) * item,
        host_seconds=seconds,
    )


STEPS: Mapping[str, Callable[[Case], Work]] = {
    "fetch_model": _fetch_model,
    "fetch_text": _fetch_text,
    "fetch_analogies": _fetch_analogies,
    "calibration": _calibration,
    "tasks_data": _tasks_data,
    "statistics": statistics_work,
    "scores": scores_work,
    "prune": _prune,
    "recover": _recover,
    "merge": _merge,
    "perplexity": _perplexity,
    "tasks": _tasks,
    "efficiency": _efficiency,
}
