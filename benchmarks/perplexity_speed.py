"""Compare the perplexity evaluator with the machine's matrix-product rate and with a plain loop.

Goals, in one run on one machine: at least 0.80 of the fp32 rate of plain matrix products at the
model's own shapes; never slower than a plain ``model(batch).logits`` loop at its best batch size;
the same numbers to 1e-4; logits buffers of at most 1/8 of the full logits. The exit code is 1 when
a goal is missed.

    python benchmarks/perplexity_speed.py [--model DIR] [--text DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from artefacts import newest_artefact

from prunelib.data.calibration import evaluation_ids
from prunelib.data.text import read_articles
from prunelib.device import hardware
from prunelib.evaluation.perplexity import BATCH_TOKENS, PerplexityResult, cut_windows, perplexity

RATE_GOAL, DIFFERENCE_GOAL, MEMORY_GOAL = 0.80, 1e-4, 1 / 8
PLAIN_WINDOWS = (1, 2, 4, 8)  # batch sizes tried for the plain loop


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return (wall seconds, result)."""
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def product_shapes(model: nn.Module) -> list[tuple[int, int, bool]]:
    """Return (outputs, inputs, is head) of every linear that a token passes."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [
        (*module.weight.shape, module is head)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]


class Products:
    """fp32 products at the model's shapes on random data, as plain ``torch.mm``.

    Every linear has weights of its own, as in the model; the head sees the targets' positions
    only, as in any evaluation. Outputs are allocated beforehand.
    """

    def __init__(self, model: nn.Module, windows: int, length: int) -> None:
        rows, head_rows = windows * length, windows * (length - 1)
        self.operands = []
        outputs: dict[tuple[int, int], torch.Tensor] = {}
        inputs: dict[tuple[int, int], torch.Tensor] = {}
        for out_size, in_size, is_head in product_shapes(model):
            count = head_rows if is_head else rows
            weight = torch.randn(out_size, in_size)
            left = inputs.setdefault((count, in_size), torch.randn(count, in_size))
            output = outputs.setdefault((count, out_size), torch.empty(count, out_size))
            self.operands.append((left, weight, output))
        self.flops = sum(2 * x.shape[0] * w.numel() for x, w, _ in self.operands)

    def __call__(self, batches: int) -> None:
        """Run the products of ``batches`` batches."""
        with torch.inference_mode():
            for _ in range(batches):
                for left, weight, output in self.operands:
                    torch.mm(left, weight.t(), out=output)


@torch.inference_mode()
def plain_loop(model: Any, windows: torch.Tensor, batch: int) -> list[float]:
    """Return the mean NLL per window from full logits and cross entropy."""
    means: list[float] = []
    for first in range(0, len(windows), batch):
        ids = windows[first : first + batch]
        logits = model(ids).logits[:, :-1]
        # The class dimension is last: the other layout is imprecise in fp32 on a CPU.
        nll = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none"
        )
        means += nll.view(len(ids), -1).double().mean(1).tolist()
    return means


def best_plain_batch(model: Any, windows: torch.Tensor) -> int:
    """Return the batch size at which the plain loop is fastest, best of two passes each."""
    sizes = [size for size in PLAIN_WINDOWS if size <= len(windows)]
    sample = windows[: max(sizes)]
    seconds = dict.fromkeys(sizes, math.inf)
    for _ in range(2):
        for size in sizes:
            spent, _ = timed(lambda size=size: plain_loop(model, sample, size))  # type: ignore[misc]
            seconds[size] = min(seconds[size], spent)
    return min(seconds, key=seconds.__getitem__)


def relative(first: float, second: float) -> float:
    """Return |first - second| / |second|."""
    return abs(first - second) / abs(second)


def measure(model: Any, windows: torch.Tensor, repeats: int, batch_tokens: int) -> dict[str, Any]:
    """Time products, evaluator and plain loop in turn; return medians, ratios and differences."""
    length = windows.shape[1]
    batch = min(len(windows), max(1, batch_tokens // length))
    windows = windows[: len(windows) // batch * batch]
    batches = len(windows) // batch
    products = Products(model, batch, length)
    plain_batch = best_plain_batch(model, windows)

    def ours() -> PerplexityResult:
        return perplexity(model, windows, batch_tokens=batch_tokens)

    perplexity(model, windows[:batch], batch_tokens=batch_tokens)
    products(1)
    times: dict[str, list[float]] = {"products": [], "evaluator": [], "plain": []}
    for _ in range(repeats):
        # Products on both sides of the evaluator: a slow drift of the machine cancels.
        before, _ = timed(lambda: products(batches))
        spent, result = timed(ours)
        after, _ = timed(lambda: products(batches))
        plain, means = timed(lambda: plain_loop(model, windows, plain_batch))
        times["products"].append((before + after) / 2)
        times["evaluator"].append(spent)
        times["plain"].append(plain)
    rate = [a / b for a, b in zip(times["products"], times["evaluator"], strict=True)]
    speed = [c / b for c, b in zip(times["plain"], times["evaluator"], strict=True)]
    plain_perplexity = math.exp(math.fsum(means) / len(means))
    return {
        "windows": len(windows),
        "window": length,
        "evaluator_batch_windows": batch,
        "plain_batch_windows": plain_batch,
        "seconds": times,
        "products_gflops": products.flops * batches / statistics.median(times["products"]) / 1e9,
        "evaluator_tokens_per_s": windows.numel() / statistics.median(times["evaluator"]),
        "achieved_fraction": statistics.median(rate),
        "achieved_fraction_all": rate,
        "speed_ratio": statistics.median(speed),
        "speed_ratio_all": speed,
        "perplexity": result.perplexity,
        "plain_perplexity": plain_perplexity,
        "perplexity_difference": relative(result.perplexity, plain_perplexity),
        "window_nll_difference": max(map(relative, result.window_nll, means)),
        "logits_bytes": result.logits_bytes,
        "full_logits_bytes": result.full_logits_bytes,
        "logits_share": result.logits_bytes / result.full_logits_bytes,
    }


def verdicts(figures: dict[str, Any]) -> list[tuple[str, bool]]:
    """Return one line and pass or fail per goal."""
    fraction, ratio = figures["achieved_fraction"], figures["speed_ratio"]
    difference = max(figures["perplexity_difference"], figures["window_nll_difference"])
    share = figures["logits_share"]
    return [
        (
            f"achieved fraction of the fp32 product rate {fraction:.3f} (goal >= {RATE_GOAL})",
            fraction >= RATE_GOAL,
        ),
        (f"plain loop time / evaluator time {ratio:.3f} (goal >= 1)", ratio >= 1),
        (
            f"largest relative difference {difference:.2e} (goal <= {DIFFERENCE_GOAL:g})",
            difference <= DIFFERENCE_GOAL,
        ),
        (
            f"logits buffers {figures['logits_bytes']:,} of {figures['full_logits_bytes']:,} bytes"
            f" = {share:.4f} (goal <= {MEMORY_GOAL:g})",
            share <= MEMORY_GOAL,
        ),
    ]


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint directory")
    parser.add_argument("--text", type=Path, help="directory with articles.jsonl")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS["cpu"])
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    from prunelib.checkpoint import load_model
    from prunelib.data.tokenizer import load_tokenizer

    directory = arguments.model or newest_artefact("fetch_model")
    articles = read_articles(arguments.text or newest_artefact("fetch_text"), "evaluation")
    ids = evaluation_ids(articles, load_tokenizer(directory))
    windows = cut_windows(ids, arguments.window, arguments.windows)
    model = load_model(directory)
    before = os.getloadavg()
    figures = measure(model, windows, arguments.repeats, arguments.batch_tokens)
    figures |= {"hardware": hardware(), "load_average_before": before, "model": str(directory)}
    print(
        f"{figures['windows']} windows of {figures['window']} tokens, batches of "
        f"{figures['evaluator_batch_windows']} (plain loop, its best: "
        f"{figures['plain_batch_windows']}), {figures['products_gflops']:.0f} GFLOP/s, "
        f"{figures['evaluator_tokens_per_s']:.0f} tokens/s, load {before[0]:.2f}"
    )
    print(f"perplexity {figures['perplexity']:.6f}, plain {figures['plain_perplexity']:.6f}")
    lines = verdicts(figures)
    for line, passed in lines:
        print(f"{'pass' if passed else 'FAIL'}  {line}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if all(passed for _, passed in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
