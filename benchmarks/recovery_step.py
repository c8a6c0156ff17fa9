"""Time of a recovery step against a plain forward pass over the same tokens.

``forward`` is the model's loss without a graph. ``step`` is one optimiser step of the recovery
loop: forward, chunked loss, backward through frozen weights, clipping, AdamW; with adapters on all
linear maps and at LoRA dropout 0 and 0.05. ``shared`` is a FlexiGPT checkpoint of the fetched
model, a fifth of its parameters removed net of adapters of rank 32: its forward pass, and a step
that trains its adapters and gains. All run in one process in turn, round after round; the median of
the rounds' ratios counts. CPU seconds, which suffer less from what else the machine does, are
printed beside. The floor is 2: a backward pass through frozen weights needs one product per weight
where the forward pass needed one.

Also printed: the useful share, tokens that are not padding in the positions computed, of packed
articles, of the same articles as a stream, and of their paragraphs as padded examples.

    python benchmarks/recovery_step.py            # on the newest fetched model and text
    python benchmarks/recovery_step.py --random   # a random model of the same shape, random tokens
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artefacts import newest_artefact

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

SHAPE = Path(__file__).parent.parent / "config" / "models" / "smollm2-135m.json"
DROPOUTS = (0.0, 0.05)
SHARED = "shared "
MOST_FORWARDS = 2.4
LEAST_USEFUL = 0.95


def random_model() -> Any:
    """Return a random model of the embedded one's shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads(SHAPE.read_text(encoding="utf-8"))
    settings = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings)).float().eval()


def shared_model(model: Path, text: Path) -> Any:
    """Return a checkpoint of ``model`` whose removed blocks share others' weights."""
    import torch
    from checkpoint_speed import prune

    from prunelib.checkpoint import load_model

    with tempfile.TemporaryDirectory() as place:
        loaded = load_model(prune(model, text, 0.213, 32, Path(place))["flexigpt"])
        for parameter in loaded.parameters():
            # Out of the mapped file, which is about to go.
            parameter.data = parameter.data.to(torch.float32, copy=True)
    return loaded


def models_and_windows(
    options: argparse.Namespace,
) -> tuple[dict[str, Callable[[], Any]], torch.Tensor]:
    """Return what makes the models, and windows [count, length]."""
    import torch

    if options.random:
        shape = (options.windows, options.length)
        return {"": random_model}, torch.randint(0, 1000, shape, generator=torch.Generator())
    from prunelib.checkpoint import load_model
    from prunelib.data.tokenizer import load_tokenizer
    from prunelib.recovery.data import load_data

    model, text = newest_artefact("fetch_model"), newest_artefact("fetch_text")
    data, _ = load_data(text, load_tokenizer(model), options.length, validate=False)
    picked = torch.arange(options.windows)
    (batch,) = data.batches(picked, options.windows)
    shared = shared_model(model, text)
    return {"": lambda: load_model(model), SHARED: lambda: copy.deepcopy(shared)}, batch.ids


def stepper(model: Any, windows: torch.Tensor, dropout: float) -> Callable[[], Any]:
    """Return one optimiser step of recovery over all windows, in one micro-batch."""
    import torch

    from prunelib.recovery import lora
    from prunelib.recovery.data import Batch
    from prunelib.recovery.fused import fuse
    from prunelib.recovery.recipe import LoraRecipe
    from prunelib.recovery.step import train_step
    from prunelib.recovery.trainable import own_parameters, with_adapters

    count, length = windows.shape
    recipe = LoraRecipe(dropout=dropout, batch=count, micro_batch=count, length=length)
    place = torch.device("cpu")
    lora._place(model, place, torch.float32)
    own = own_parameters(model, recipe)
    adapted = with_adapters(model, recipe).train()
    for parameter in own.values():
        parameter.requires_grad_(True)
    fuse(adapted)
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trainable.values(), lr=recipe.lr)
    batches = [Batch(windows)]
    return lambda: train_step(model, trainable, optimiser, batches, recipe, place, 1, "")


def measure(options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds of every repeat by name, on the clock and of the CPU."""
    import torch

    torch.set_num_threads(options.threads)
    makers, windows = models_and_windows(options)

    def forward(model: Any) -> None:
        with torch.inference_mode():
            model(windows, labels=windows, use_cache=False)

    work: dict[str, Callable[[], Any]] = {}
    for kind, make in makers.items():
        work[f"{kind}forward"] = partial(forward, make())
        # Shared layers' own adapters have no dropout.
        for dropout in DROPOUTS[: 1 if kind else None]:
            work[f"{kind}step, dropout {dropout:g}"] = stepper(make(), windows, dropout)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for number in range(options.repeats + 1):
        for name, run in work.items():
            begun, cpu = time.perf_counter(), time.process_time()
            run()
            # The first round warms caches up.
            if number:
                spent = (time.perf_counter() - begun, time.process_time() - cpu)
                seconds[name].append(spent)
    return seconds


def useful_shares(length: int) -> dict[str, float]:
    """Return the useful share of the fetched text, packed, streamed and padded."""
    import torch

    from prunelib.data.calibration import packed_windows, tokenise
    from prunelib.data.stream import FileDocuments
    from prunelib.data.text import Article, read_articles
    from prunelib.data.tokenizer import load_tokenizer
    from prunelib.recovery.data import Examples, PackedWindows, StreamedWindows, TrainingData
    from prunelib.recovery.recipe import LoraRecipe

    articles = read_articles(newest_artefact("fetch_text"), "recovery")
    tokenizer = load_tokenizer(newest_artefact("fetch_model"))
    lines = [line for a in articles for line in a.text.split("\n") if line]
    paragraphs = tokenise((Article(0, "", line) for line in lines[:1000]), tokenizer)
    tokens = [paragraph[:length] for paragraph in paragraphs if len(paragraph) > 1]
    starts = torch.tensor([0, *map(len, tokens)]).cumsum(0)
    joined = torch.cat([torch.from_numpy(paragraph) for paragraph in tokens])
    recipe = LoraRecipe(length=length, batch=4, micro_batch=4)

    def share(data: TrainingData, steps: int) -> float:
        data.check(length, tokenizer.vocab_size + 1000)
        picked = [data.pick(step, recipe, 0) for step in range(steps)]
        batches = [batch for items in picked for batch in data.batches(items, 4)]
        return sum(b.tokens for b in batches) / sum(b.ids.numel() for b in batches)

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "text.jsonl")
        path.write_text("".join(json.dumps({"text": a.text}) + "\n" for a in articles))
        windows = packed_windows(tokenise(articles, tokenizer), length)
        return {
            "packed": share(PackedWindows(torch.from_numpy(windows)), 4),
            "streamed": share(StreamedWindows(FileDocuments([path], "text"), tokenizer, length), 4),
            "one paragraph an example": share(
                Examples(joined, starts, torch.zeros(len(tokens), dtype=torch.int64)), 32
            ),
        }


def main() -> int:
    """Print seconds, ratios and shares; fail if a bound is missed."""
    parser = argparse.ArgumentParser(description="Time of a recovery step in forward passes.")
    parser.add_argument("--random", action="store_true", help="a random model and random tokens")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    seconds = measure(options)
    ratios: dict[str, float] = {}
    for name, values in seconds.items():
        base = f"{SHARED if name.startswith(SHARED) else ''}forward"
        pairs = list(zip(values, seconds[base], strict=True))
        rounds, cpu = ([own[i] / one[i] for own, one in pairs] for i in (0, 1))
        ratios[name] = statistics.median(rounds)
        print(
            f"{name}: median {statistics.median(clock for clock, _ in values):.3f} s, "
            f"{ratios[name]:.2f} forwards ({min(rounds):.2f} to {max(rounds):.2f}), "
            f"{statistics.median(cpu):.2f} in CPU seconds"
        )
    failed = False
    for name in (name for name in ratios if name.endswith("dropout 0")):
        missed = ratios[name] > MOST_FORWARDS
        print(f"{name}, bound of {MOST_FORWARDS} forwards: {'missed' if missed else 'met'}")
        failed |= missed
    if not options.random:
        for name, share in useful_shares(options.length).items():
            print(f"useful tokens, {name}: {share:.1%}")
            failed |= name != "one paragraph an example" and share < LEAST_USEFUL
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
