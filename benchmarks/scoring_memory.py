"""Memory and time of scoring from forward passes against a forward and a backward pass.

Over the same calibration windows, each in a fresh process:

* ``forward``: the model's loss without a graph;
* ``chunked``: the same with logits for a few positions at a time;
* ``mini_llm``: gradients estimated along a few directions of all weights (``zeroth_order``);
* ``streamed``: the same with layers read from the checkpoint when their turn comes;
* ``cold`` (time alone): the same, and the files not in the system's page cache when it begins;
* ``gates``: along directions of one factor per unit;
* ``direct``: gradients along the residual stream alone (``fms_direct``), two forward passes;
* ``backward``: one loss and one backward pass that keeps the gradients of all weights;
* ``first``: the pass with true gradients, a layer at a time (``fms_gradients``).

Weights are copied out of the mapped file. Memory is the peak resident memory (VmHWM, reset after
loading), above what is resident with the weights loaded and above the interpreter with its
imports; glibc's threshold for mapping memory is fixed, as in ``scoring.py``. What streaming costs
in time is measured without that, in one process that runs the three in turn, round after round;
the medians of the rounds' ratios count. Models: those of ``scoring.py``; the large one is written
to a temporary directory (4.4 GB) and gets random tokens.

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
import statistics
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

    from prunelib.families.base import Config

PASSES = (
    "forward",
    "chunked",
    "mini_llm",
    "streamed",
    "gates",
    "direct",
    "backward",
    "first",
)
TURNS = ("mini_llm", "streamed", "cold")
MOST_MEMORY = 1.05
MOST_TIME = 1.1


def write_large(directory: Path) -> None:
    """Write the random model of 1.1 B parameters as a checkpoint."""
    model, config, _ = random_large()
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def inputs_of(options: argparse.Namespace) -> tuple[Config, torch.Tensor]:
    """Return the config of the model and its windows [n, 128]."""
    import torch

    from prunelib.checkpoint import read_config

    if not options.large:
        _, config, windows = embedded(options.model, options.text, options.windows)
        return config, windows
    config = read_config(options.model)
    torch.manual_seed(0)
    return config, torch.randint(0, config["vocab_size"], (options.windows, 128))


def in_memory(directory: Path) -> Any:
    """Return the model with weights in memory of its own."""
    from prunelib.checkpoint import load_model

    model = load_model(directory)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def worker(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the memory of one pass in this process."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 - part of the interpreter here

    from prunelib.families import family_of
    from prunelib.statistics import fms_direct, fms_gradients, zeroth_order
    from prunelib.statistics.inputs import PassInputs
    from prunelib.statistics.layerwise import Layers, StreamedLayers

    config, windows = inputs_of(options)
    family = family_of(config)
    interpreter = status_bytes("VmRSS")
    streams = options.worker == "streamed"
    model: Any = StreamedLayers(options.model) if streams else in_memory(options.model)

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
        inputs = PassInputs(model, family, config, windows, len(windows))
        zeroth_order.collect(inputs, seed=0, perturbations=options.perturbations, **more)

    run: Callable[[torch.Tensor], Any] = {
        "forward": forward,
        "chunked": chunked,
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
    figures: dict[str, Any] = measured(lambda: run(windows), 1)
    return figures | {
        "interpreter_bytes": interpreter,
        "threads": torch.get_num_threads(),
        "tokens": windows.numel(),
        "parameters": family.parameters(config),
        "block": family.block_parameters(config),
        "layers": family.dimensions(config).layers,
    }


def turns(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the time of an estimate, from memory and streamed, in turn in this process."""
    from prunelib.checkpoint import weight_files
    from prunelib.families import family_of
    from prunelib.statistics import zeroth_order
    from prunelib.statistics.inputs import PassInputs
    from prunelib.statistics.layerwise import StreamedLayers

    config, windows = inputs_of(options)
    family = family_of(config)
    held: Any = in_memory(options.model)
    streamed: Any = StreamedLayers(options.model)

    def estimate(model: Any, windows: torch.Tensor) -> None:
        inputs = PassInputs(model, family, config, windows, len(windows))
        zeroth_order.collect(inputs, seed=0, perturbations=options.perturbations)

    def forget() -> None:
        for path in weight_files(options.model):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    found: dict[str, Any] = {"seconds": {}, "cpu_seconds": {}}
    for number in range(-1, options.repeats):
        for name in TURNS:
            model = held if name == "mini_llm" else streamed
            if number < 0:
                estimate(model, windows[:2, :8])
                continue
            if name == "cold":
                forget()
            figures = measured(partial(estimate, model, windows), 1)
            for kind, seconds in found.items():
                seconds.setdefault(name, []).extend(figures[kind])
            shown = f"{figures['seconds'][0]:.1f} s, {figures['cpu_seconds'][0]:.1f} CPU s"
            print(f"round {number}, {name}: {shown}", file=sys.stderr, flush=True)
    return found


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
    more = ["--perturbations", str(options.perturbations), "--windows", str(options.windows)]
    print("pass       seconds, CPU seconds, GB above the weights, GB above the interpreter")
    for name in PASSES:
        figures = found[name] = measure(options, name, __file__, *more)
        whole = figures["loaded_bytes"] + figures["peak_bytes"] - figures["interpreter_bytes"]
        figures["whole_bytes"] = whole
        print(
            f"{name:10} {figures['seconds'][0]:.2f} {figures['cpu_seconds'][0]:.2f} "
            f"{figures['peak_bytes'] / 1e9:.3f} {whole / 1e9:.3f}",
            flush=True,
        )
    found["time"] = measure(options, "time", __file__, *more)
    one = found["forward"]
    outer = one["parameters"] - one["layers"] * one["block"]
    print(
        f"{one['parameters']:,} parameters ({outer:,} outside the layers, {one['block']:,} in "
        f"one), {one['tokens']:,} tokens, fp32, {one['threads']} threads, "
        f"{options.perturbations} perturbations, {1 + 2 * options.perturbations} passes"
    )
    seconds = found["time"]["seconds"]
    for name in TURNS:
        print(f"{name}, {options.repeats} rounds: median {statistics.median(seconds[name]):.1f} s")

    def against_memory(name: str, kind: str) -> float:
        """Return the median over rounds of a pass's time by that of the one in memory."""
        taken = found["time"][kind]
        ratios = [mine / base for mine, base in zip(taken[name], taken["mini_llm"], strict=True)]
        return float(statistics.median(ratios))

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
        ("streamed / mini_llm, CPU time", against_memory("streamed", "cpu_seconds"), MOST_TIME),
        ("streamed / mini_llm, time", against_memory("streamed", "seconds"), MOST_TIME),
        (
            "streamed from a disk that has cached nothing / mini_llm, time",
            against_memory("cold", "seconds"),
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
    parser.add_argument("--windows", type=int, default=10, help="of 128 tokens")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of what is timed")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--worker", choices=(*PASSES, "time"), help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_large(options.write)
        return 0
    if options.worker:
        print(json.dumps(turns(options) if options.worker == "time" else worker(options)))
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
