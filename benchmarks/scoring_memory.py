"""Memory and time of scoring from forward passes against a forward and a backward pass.

Over the same calibration windows, each in a fresh process:

* ``forward``: the model's loss without a graph;
* ``chunked``: the same with logits for a few positions at a time;
* ``mini_llm``: gradients estimated along a few directions of all weights (``zeroth_order``);
* ``streamed``: the same with layers read from the checkpoint when their turn comes;
* ``cold``: the same, and the files not in the system's page cache when it begins;
* ``gates``: along directions of one factor per unit;
* ``direct``: gradients along the residual stream alone (``fms_direct``), two forward passes;
* ``backward``: one loss and one backward pass that keeps the gradients of all weights;
* ``first``: the pass with true gradients, a layer at a time (``fms_gradients``).

Weights are copied out of the mapped file. Memory is the peak resident memory (VmHWM, reset after
loading), above what is resident with the weights loaded and above the interpreter with its
imports. Limits on time hold the fastest repeat's, on the clock and as CPU seconds, which suffer
less from what else the machine does but count threads that wait for each other. Models: those of
``scoring.py``; the large one is written to a temporary directory (4.4 GB).

    python benchmarks/scoring_memory.py            # on the newest fetched model and text
    python benchmarks/scoring_memory.py --large

``--growth`` measures time instead: how it grows with perturbations and tokens, in one process, as
CPU seconds and as forward passes with loss over the same windows.

    python benchmarks/scoring_memory.py --growth
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artefacts import newest_artefact
from scoring import embedded, measure, measured, random_large, status_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

PASSES = (
    "forward",
    "chunked",
    "mini_llm",
    "streamed",
    "cold",
    "gates",
    "direct",
    "backward",
    "first",
)
MOST_MEMORY = 1.05
MOST_TIME = 1.1


def write_large(directory: Path) -> None:
    """Write the random model of 1.1 B parameters as a checkpoint."""
    model, config, _ = random_large()
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def worker(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one pass in this process."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 - part of the interpreter here

    from prunelib.checkpoint import load_model, read_config, weight_files
    from prunelib.families import family_of
    from prunelib.statistics import fms_direct, fms_gradients, zeroth_order
    from prunelib.statistics.inputs import PassInputs
    from prunelib.statistics.layerwise import Layers

    config = read_config(options.model)
    family = family_of(config)
    if options.large:
        windows = torch.randint(0, config["vocab_size"], (4, 128))
    else:
        windows = embedded(options.model, options.text)[2]
    interpreter = status_bytes("VmRSS")
    model: Any
    streams = options.worker in ("streamed", "cold")
    if streams:
        model = zeroth_order.StreamedLayers(options.model)
    else:
        model = load_model(options.model)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()

    def forward(windows: torch.Tensor) -> None:
        with torch.inference_mode():
            model(windows, labels=windows, use_cache=False)

    def chunked(windows: torch.Tensor) -> None:
        layers = Layers(model, family)
        stream = layers.begin(windows, len(windows))
        for index, layer in layers.sweep():
            layers.advance(index, layer, stream)
        layers.loss(stream)

    def backward(windows: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(windows, labels=windows, use_cache=False).loss.backward()

    def estimate(windows: torch.Tensor, **more: Any) -> None:
        count = options.perturbations
        zeroth_order.collect(
            PassInputs(model, family, config, windows, len(windows)),
            seed=0,
            perturbations=count,
            **more,
        )

    def cold(windows: torch.Tensor) -> None:
        for path in weight_files(options.model):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        estimate(windows)

    run: Callable[[torch.Tensor], Any] = {
        "forward": forward,
        "chunked": chunked,
        "cold": cold,
        "mini_llm": estimate,
        "streamed": estimate,
        "gates": lambda windows: estimate(windows, perturbation="gates"),
        "direct": lambda w: fms_direct.collect(PassInputs(model, family, config, w, len(w))),
        "backward": backward,
        "first": lambda w: fms_gradients.collect(PassInputs(model, family, config, w, len(w))),
    }[options.worker]
    run(windows[:2, :8])
    if not streams:
        model.zero_grad(set_to_none=True)
    figures: dict[str, Any] = measured(lambda: run(windows), options.repeats)
    return figures | {
        "interpreter_bytes": interpreter,
        "threads": torch.get_num_threads(),
        "tokens": windows.numel(),
        "parameters": family.parameters(config),
        "block": family.block_parameters(config),
        "layers": family.dimensions(config).layers,
    }


def growth(options: argparse.Namespace) -> int:
    """Print how the time of an estimate grows with perturbations and tokens."""
    import torch

    from prunelib.families import family_of
    from prunelib.statistics import zeroth_order
    from prunelib.statistics.inputs import PassInputs

    rows: list[dict[str, Any]] = []
    estimators: dict[str, dict[str, Any]] = {
        "gaussian": {},
        "rademacher": {"distribution": "rademacher"},
        "gates": {"perturbation": "gates"},
    }
    print(f"fp32, {torch.get_num_threads()} threads; the fastest of {options.repeats} counts")
    print("| tokens | estimator | perturbations | passes | CPU s | in forward passes | one more |")
    print("|---|---|---|---|---|---|---|")

    def seconds(run: Callable[[], Any]) -> float:
        return float(min(measured(run, options.repeats)["cpu_seconds"]))

    def forward(model: Any, windows: torch.Tensor) -> None:
        with torch.inference_mode():
            model(windows, labels=windows, use_cache=False)

    for length in (32, 128):
        model, config, windows = embedded(options.model, options.text, 10, length)
        inputs = PassInputs(model, family_of(config), config, windows, len(windows))
        estimate = partial(zeroth_order.collect, inputs, seed=0)
        forward(model, windows)
        one = seconds(partial(forward, model, windows))
        for name, settings in estimators.items():
            before: tuple[int, float] | None = None
            for count in (1, 4, 8):
                spent = seconds(partial(estimate, perturbations=count, **settings))
                more = (spent - before[1]) / (count - before[0]) / one if before else None
                before = (count, spent)
                rows.append(
                    {"tokens": windows.numel(), "estimator": name, "perturbations": count}
                    | {"cpu_seconds": spent, "forward_seconds": one, "one_more": more}
                )
                print(
                    f"| {windows.numel()} | {name} | {count} | {1 + 2 * count} | {spent:.1f} | "
                    f"{spent / one:.1f} | {'' if more is None else f'{more:.2f}'} |",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def report(options: argparse.Namespace) -> int:
    """Measure every pass, print the table and a verdict per limit."""
    found = {}
    print("pass       seconds, CPU seconds, GB above the weights, GB above the interpreter")
    for name in PASSES:
        figures = found[name] = measure(
            options, name, __file__, "--perturbations", str(options.perturbations)
        )
        whole = figures["loaded_bytes"] + figures["peak_bytes"] - figures["interpreter_bytes"]
        figures["whole_bytes"] = whole
        print(
            f"{name:10} {min(figures['seconds']):.2f} {min(figures['cpu_seconds']):.2f} "
            f"{figures['peak_bytes'] / 1e9:.3f} {whole / 1e9:.3f}",
            flush=True,
        )
    one = found["forward"]
    outer = one["parameters"] - one["layers"] * one["block"]
    print(
        f"{one['parameters']:,} parameters ({outer:,} outside the layers, {one['block']:,} in "
        f"one), {one['tokens']:,} tokens, fp32, {one['threads']} threads, "
        f"{options.perturbations} perturbations; the fastest of {options.repeats} counts"
    )
    cpu = {name: min(figures["cpu_seconds"]) for name, figures in found.items()}
    passes = 1 + 2 * options.perturbations
    for name in ("mini_llm", "streamed", "cold", "gates"):
        print(f"{name}: {cpu[name] / (passes * cpu['forward']):.2f} of {passes} forward passes")
    # Embeddings and one block, and what a forward pass with loss holds besides.
    room = 4 * (outer + one["block"]) + one["peak_bytes"]
    claims = [
        (
            "mini_llm / forward with loss, memory",
            found["mini_llm"]["peak_bytes"] / one["peak_bytes"],
            MOST_MEMORY,
        ),
        (
            "direct / forward with loss, memory",
            found["direct"]["peak_bytes"] / one["peak_bytes"],
            MOST_MEMORY,
        ),
        (
            "streamed / embeddings, one block and a forward pass, memory",
            found["streamed"]["whole_bytes"] / room,
            1.0,
        ),
        ("streamed / mini_llm, CPU time", cpu["streamed"] / cpu["mini_llm"], MOST_TIME),
        (
            "streamed / mini_llm, time",
            min(found["streamed"]["seconds"]) / min(found["mini_llm"]["seconds"]),
            MOST_TIME,
        ),
        (
            "streamed from a disk that has cached nothing / mini_llm, time",
            min(found["cold"]["seconds"]) / min(found["mini_llm"]["seconds"]),
            MOST_TIME,
        ),
    ]
    for line, value, most in claims:
        print(f"{'pass' if value <= most else 'FAIL'}  {line}: {value:.3f} <= {most}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(value <= most for _, value, most in claims) else 1


def main() -> int:
    """Measure, print a verdict per limit; the exit code is 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint directory")
    parser.add_argument("--text", type=Path, help="directory with articles.jsonl")
    parser.add_argument("--large", action="store_true", help="1.1 B random parameters instead")
    parser.add_argument("--growth", action="store_true", help="time by perturbations and tokens")
    parser.add_argument("--perturbations", type=int, default=4)
    parser.add_argument("--repeats", type=int, help="default 2; 1 with --large")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--worker", choices=PASSES, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.repeats = options.repeats or (1 if options.large else 2)
    if options.write:
        write_large(options.write)
        return 0
    if options.worker:
        print(json.dumps(worker(options)))
        return 0
    if not options.large:
        options.model = options.model or newest_artefact("fetch_model")
        options.text = options.text or newest_artefact("fetch_text")
        return growth(options) if options.growth else report(options)
    with tempfile.TemporaryDirectory() as directory:
        options.model = Path(directory)
        # In a process of its own, whose memory is free again.
        subprocess.run([sys.executable, __file__, "--write", directory], check=True)
        return report(options)


if __name__ == "__main__":
    sys.exit(main())
