"""Hold our LLM-Pruner against what its own library reached on the embedded model.

SmolLM2-135M, layers 4..25, group ratio 0.34 (1 of 3 kv groups, 523 of 1,536 channels):
108,144,576 parameters remain. Calibration 10 windows of 128 tokens, evaluation 128 windows of 128.
LLM-Pruner's library reached 2.97 times the dense perplexity there. It credits query head h to kv
head h mod 3, where the model assigns h // 3; a row shows element1 with that assignment. Also
measured: the gradient pass
against the body's forward pass over the same tokens, and its peak resident memory.

    python benchmarks/llm_pruner_parity.py            # on the newest fetched model and text
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artefacts import newest_artefact

from prunelib.errors import InputError
from prunelib.statistics.inputs import PassInputs

if TYPE_CHECKING:
    import torch

LIBRARY_RATIO = 2.97
REMAINING = 108_144_576
MOST_FORWARDS = 5.0
MOST_BYTES = 2.0e9


def calibration(model: Path, text: Path, seed: int) -> torch.Tensor:
    """Return 10 windows of 128 tokens out of the calibration articles."""
    import torch

    from prunelib.data.calibration import sample_windows, tokenise
    from prunelib.data.text import read_articles
    from prunelib.data.tokenizer import load_tokenizer

    tokens = tokenise(read_articles(text, "calibration"), load_tokenizer(model))
    return torch.from_numpy(sample_windows(tokens, 10, 128, seed)[0])


def gradient_worker(model: Path, text: Path, seed: int, repeats: int) -> dict[str, Any]:
    """Time the gradient pass beside the body's forward pass; the memory peak is the process's."""
    import torch

    from prunelib.checkpoint import load_model, read_config
    from prunelib.families import family_of
    from prunelib.provenance.environment import peak_memory_bytes
    from prunelib.statistics import gradients

    windows = calibration(model, text, seed)
    config = read_config(model)
    network = load_model(model)
    forward, backward = [], []
    for repeat in range(repeats + 1):
        begin = time.perf_counter()
        with torch.inference_mode():
            network.base_model(input_ids=windows, use_cache=False)
        middle = time.perf_counter()
        gradients.collect(PassInputs(network, family_of(config), config, windows, len(windows)))
        end = time.perf_counter()
        if repeat:  # the first round warms up
            forward.append(middle - begin)
            backward.append(end - middle)
    return {
        "forward_s": forward,
        "gradient_s": backward,
        "ratio": statistics.median(b / f for b, f in zip(backward, forward, strict=True)),
        "peak_bytes": peak_memory_bytes(),
        "threads": torch.get_num_threads(),
    }


def measure_gradient_pass(model: Path, text: Path, repeats: int) -> dict[str, Any]:
    """Run ``gradient_worker`` in a process of its own."""
    # glibc moves this threshold by itself, and the peak with it by hundreds of MB.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--model", str(model), "--text", str(text)]
    output = subprocess.run(
        [*command, "--worker", "--repeats", str(repeats)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def perplexities(model: Path, text: Path, seeds: int, windows: int) -> dict[str, list[float]]:
    """Return perplexity by method, one per seed (one for methods without a seed)."""
    import torch

    from prunelib.checkpoint import WeightReader, build_model, load_model, read_config, read_tensors
    from prunelib.data.calibration import evaluation_ids
    from prunelib.data.text import read_articles
    from prunelib.data.tokenizer import load_tokenizer
    from prunelib.evaluation.perplexity import cut_windows, perplexity
    from prunelib.families import family_of
    from prunelib.methods import create
    from prunelib.methods.base import ScoringInputs
    from prunelib.rules import Target
    from prunelib.selection import select
    from prunelib.statistics import gradients
    from prunelib.surgery import prune_tensors, pruned_config

    config = read_config(model)
    family = family_of(config)
    articles = read_articles(text, "evaluation")
    evaluation = cut_windows(evaluation_ids(articles, load_tokenizer(model)), 128, windows)
    dense = load_model(model)
    found: dict[str, list[float]] = {"dense": [perplexity(dense, evaluation).perplexity]}

    def run(
        name: str,
        method: str,
        seed: int,
        passes: dict[str, dict[str, torch.Tensor]],
        **parameters: object,
    ) -> None:
        chosen = create(method, parameters)
        scores = chosen.scores(ScoringInputs(family, config, WeightReader(model), passes, seed))
        target = Target("groups", 0.34, 4, 4)
        plan = select(scores, family, config, target, chosen.rule(), {})
        if plan.parameters[1] != REMAINING:
            raise InputError(f"{name}: {plan.parameters[1]:,} parameters remain, not {REMAINING:,}")
        new, _ = pruned_config(family, config, plan)
        with torch.device("meta"):
            small = build_model(new, lambda model_class, parsed: model_class(parsed))
        small.to_empty(device="cpu")
        small.tie_weights()
        tensors = dict(prune_tensors(read_tensors(model), family, config, plan))
        small.load_state_dict(tensors, strict=False)
        # Rotary tables are not part of the weights, and the same as the dense model's.
        small.base_model.rotary_emb = dense.base_model.rotary_emb
        found.setdefault(name, []).append(perplexity(small.eval(), evaluation).perplexity)
        print(f"{name} seed {seed}: perplexity {found[name][-1]:.2f}", flush=True)

    run("l2", "magnitude", 0, {}, order=2)
    for seed in range(seeds):
        run("random", "random", seed, {})
        batch = calibration(model, text, seed)
        passes = {
            "gradients": gradients.collect(PassInputs(dense, family, config, batch, len(batch)))
        }
        run("element1", "llm_pruner", seed, passes)
        run("element1, library's heads", "llm_pruner", seed, passes, attribution="library")
    return found


def main() -> int:
    """Measure, print a verdict per claim; the exit code is 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint directory")
    parser.add_argument("--text", type=Path, help="directory with articles.jsonl")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.model or newest_artefact("fetch_model")
    text = options.text or newest_artefact("fetch_text")
    if options.worker:
        print(json.dumps(gradient_worker(model, text, 0, options.repeats)))
        return 0
    cost = measure_gradient_pass(model, text, options.repeats)
    found = perplexities(model, text, options.seeds, options.windows)
    dense = found["dense"][0]
    ratios = {name: [value / dense for value in values] for name, values in found.items()}
    median = {name: statistics.median(values) for name, values in ratios.items()}
    print(f"dense perplexity {dense:.2f}; ratios to dense by seed:")
    for name, values in ratios.items():
        shown = ", ".join(f"{value:.2f}" for value in values)
        print(f"  {name:26} median {median[name]:.2f} ({shown})")
    print(
        f"gradient pass {statistics.median(cost['gradient_s']):.2f} s, body forward "
        f"{statistics.median(cost['forward_s']):.2f} s, {cost['threads']} threads"
    )
    claims = [
        (
            f"element1 {median['element1']:.2f} <= {LIBRARY_RATIO} times dense",
            median["element1"] <= LIBRARY_RATIO,
        ),
        (
            f"element1 below random {median['random']:.2f} and L2 {median['l2']:.2f}",
            median["element1"] < min(median["random"], median["l2"]),
        ),
        (
            f"gradient pass {cost['ratio']:.2f} <= {MOST_FORWARDS} body forwards",
            cost["ratio"] <= MOST_FORWARDS,
        ),
        (
            f"peak memory {cost['peak_bytes'] / 1e9:.2f} <= {MOST_BYTES / 1e9} GB",
            cost["peak_bytes"] <= MOST_BYTES,
        ),
    ]
    for line, held in claims:
        print(f"{'pass' if held else 'FAIL'}  {line}")
    if options.json:
        figures = {"perplexity": found, "ratios": ratios, "cost": cost}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if all(held for _, held in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
