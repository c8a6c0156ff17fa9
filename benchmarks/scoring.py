"""Time and memory of gradient scoring against a plain forward and a plain full backward pass.

Over the same calibration windows:

* ``forward``: the model's loss without a graph;
* ``backward``: one loss and one backward pass that keeps the gradients of all weights;
* ``first``: the first-order pass (``gradients``);
* ``all``: the pass of every gradient criterion (``fisher``);
* ``second``, ``mixed``: that pass with nothing but one criterion reduced.

Memory is measured with each pass in a fresh process: the peak resident memory (VmHWM, reset after
loading) above what is resident with the weights loaded. There glibc's threshold for mapping memory
is fixed, since it otherwise moves by itself and the peak with it, by hundreds of MB; with it fixed,
a third of the time goes into faulting pages in. Time is therefore measured without it, in one
process that runs all passes in turn, round after round; the median of the rounds' ratios counts.
CPU seconds, which suffer less from what else the machine does, are printed beside.

Models: the embedded one with 10 x 128 tokens of its calibration articles, and (``--large``) a
random one of TinyLlama's shape, 1.1 B parameters in fp32 (4.4 GB, and as much for the plain pass's
gradients: 12 GB of memory), with 4 x 128 random tokens.

    python benchmarks/scoring.py            # on the newest fetched model and text
    python benchmarks/scoring.py --large
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artefacts import newest_artefact

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from prunelib.families.base import Config

PASSES = ("forward", "backward", "first", "all", "second", "mixed")
LARGE = Path(__file__).parent.parent / "config" / "models" / "tinyllama-1.1b.json"
MOST_TIME = 1.0
MOST_MEMORY = 0.4
MOST_TOGETHER = 1.4
MOST_ANOTHER = 0.1


def status_bytes(field: str) -> int:
    """Return a field of this process's status, e.g. ``VmRSS``, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def embedded(
    model: Path, text: Path, count: int = 10, length: int = 128, seed: int = 0
) -> tuple[Any, Config, torch.Tensor]:
    """Return the fetched model, its config and windows [count, length] of the text."""
    import torch

    from prunelib.checkpoint import load_model, read_config
    from prunelib.data.calibration import sample_windows, tokenise
    from prunelib.data.text import read_articles
    from prunelib.data.tokenizer import load_tokenizer

    tokens = tokenise(read_articles(text, "calibration"), load_tokenizer(model))
    windows = torch.from_numpy(sample_windows(tokens, count, length, seed)[0])
    return load_model(model), read_config(model), windows


def random_large() -> tuple[Any, Config, torch.Tensor]:
    """Return a random model of 1.1 B parameters, its config and 4 windows of 128 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads(LARGE.read_text(encoding="utf-8"))
    settings = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings)).float().eval()
    return model, config, torch.randint(0, config["vocab_size"], (4, 128))


def passes(model: Any, config: Config) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Return what is measured, by name; each takes windows [n, length]."""
    import torch

    from prunelib.families import family_of
    from prunelib.statistics import fisher, gradients
    from prunelib.statistics.inputs import PassInputs

    family = family_of(config)

    def forward(windows: torch.Tensor) -> None:
        with torch.inference_mode():
            model(windows, labels=windows, use_cache=False)

    def backward(windows: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(windows, labels=windows, use_cache=False).loss.backward()

    def alone(criterion: str) -> Callable[[torch.Tensor], Any]:
        class One(fisher.SquaredSums):
            """Reduces one criterion; second order by itself needs no sum of gradients."""

            def add(self, gradient: torch.Tensor) -> None:
                if criterion == "mixed":
                    super().add(gradient)
                    return
                if self.batches:
                    self.squares.addcmul_(gradient, gradient)
                else:
                    self.squares = gradient.square()
                self.batches += 1

            def reduce(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
                weight = weight.detach()
                values = self.squares.mul_(weight).mul_(weight)
                if criterion == "mixed":
                    values.mul_(-0.5).add_(self.first * weight).abs_()
                return gradients.rows_and_columns(f"{name}.{criterion}", values)

        return lambda windows: gradients.sweep(
            model, family, windows.split(1), windows.shape[1] - 1, One, criterion
        )

    return {
        "forward": forward,
        "backward": backward,
        "first": lambda w: gradients.collect(PassInputs(model, family, config, w, len(w))),
        "all": lambda w: fisher.collect(PassInputs(model, family, config, w, len(w))),
        "second": alone("second"),
        "mixed": alone("mixed"),
    }


def measured(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Return seconds of every repeat, and the peak memory above what is resident now."""
    loaded = status_bytes("VmRSS")
    # 5 sets the peak back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    seconds, cpu = [], []
    for _ in range(repeats):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        run()
        cpu.append(time.process_time() - begin_cpu)
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "loaded_bytes": loaded,
        "peak_bytes": status_bytes("VmHWM") - loaded,
    }


def load(options: argparse.Namespace) -> tuple[dict[str, Callable[[Any], Any]], Any, torch.Tensor]:
    """Return what is measured by name, the model and its windows."""
    model, config, windows = (
        random_large() if options.large else embedded(options.model, options.text)
    )
    return passes(model, config), model, windows


def peak(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the memory of one pass in this process."""
    runs, model, windows = load(options)
    run = runs[options.worker]
    # Warm up, and bring mapped weights into memory.
    run(windows[:2, :8])
    model.zero_grad(set_to_none=True)
    touched = sum(parameter.detach().sum().item() for parameter in model.parameters())
    return measured(lambda: run(windows), 1) | {"checksum": touched}


def rounds(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the time of all passes in turn in this process."""
    import torch

    runs, model, windows = load(options)
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "tokens": windows.numel(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": {name: [] for name in PASSES},
        "cpu_seconds": {name: [] for name in PASSES},
    }
    for run in runs.values():
        run(windows[:2, :8])
    found["ratios"] = []
    for _ in range(options.repeats):
        if not options.large:
            found["ratios"].append(ratios(options.model, model, windows))
        for name in PASSES:
            model.zero_grad(set_to_none=True)
            begin, begin_cpu = time.perf_counter(), time.process_time()
            runs[name](windows)
            found["cpu_seconds"][name].append(time.process_time() - begin_cpu)
            found["seconds"][name].append(time.perf_counter() - begin)
    return found


def ratios(source: Path, model: Any, windows: torch.Tensor) -> tuple[float, float]:
    """Return the seconds from windows to a first pruned checkpoint, and to one of another ratio."""
    from prunelib.checkpoint import WeightReader, prune_checkpoint, read_config
    from prunelib.families import family_of
    from prunelib.methods import create
    from prunelib.methods.base import ScoringInputs
    from prunelib.rules import Target
    from prunelib.selection import select
    from prunelib.statistics import gradients
    from prunelib.statistics.inputs import PassInputs

    config = read_config(source)
    family, method = family_of(config), create("llm_pruner", {})

    def prune(value: float) -> None:
        target = Target("parameters", value, protect_first=4, protect_last=4)
        with tempfile.TemporaryDirectory(dir="results") as place:
            plan = select(scores, family, config, target, method.rule(), {})
            prune_checkpoint(source, plan, Path(place))

    begin = time.perf_counter()
    found = gradients.collect(PassInputs(model, family, config, windows, len(windows)))
    inputs = ScoringInputs(family, config, WeightReader(source), {"gradients": found}, 0)
    scores = method.scores(inputs)
    prune(0.2)
    middle = time.perf_counter()
    prune(0.1)
    return middle - begin, time.perf_counter() - middle


def measure(
    options: argparse.Namespace, name: str, script: str = __file__, *more: str
) -> dict[str, Any]:
    """Let ``script`` measure what it calls ``name`` in a process of its own."""
    environment = dict(os.environ)
    if name != "time":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, script, "--worker", name, "--repeats", str(options.repeats)]
    command += ["--large"] if options.large else []
    command += ["--model", str(options.model), "--text", str(options.text), *more]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def main() -> int:
    """Measure, print a verdict per limit; the exit code is 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint directory")
    parser.add_argument("--text", type=Path, help="directory with articles.jsonl")
    parser.add_argument("--large", action="store_true", help="1.1 B random parameters instead")
    parser.add_argument("--repeats", type=int, help="rounds; default 3, 1 with --large")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--worker", choices=(*PASSES, "time"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.repeats = options.repeats or (1 if options.large else 3)
    if not options.large:
        options.model = options.model or newest_artefact("fetch_model")
        options.text = options.text or newest_artefact("fetch_text")
    if options.worker:
        print(json.dumps(rounds(options) if options.worker == "time" else peak(options)))
        return 0
    time_ = measure(options, "time")
    seconds, cpu = time_["seconds"], time_["cpu_seconds"]
    memory = {}
    for name in PASSES:
        memory[name] = measure(options, name)["peak_bytes"]
        shown = ", ".join(f"{value:.2f}" for value in seconds[name])
        print(
            f"{name:9} {shown} s, {min(cpu[name]):.2f} CPU s, "
            f"{memory[name] / 1e9:.3f} GB above the weights",
            flush=True,
        )
    print(
        f"{time_['parameters']:,} parameters, {time_['tokens']:,} tokens, fp32, "
        f"{time_['threads']} threads; medians of {options.repeats} rounds"
    )

    def ratio(
        name: str, others: Sequence[str], of: Mapping[str, Sequence[float]] = seconds
    ) -> float:
        """Return the median over rounds of a pass's time by that of the slowest of others."""
        slowest = map(max, *(of[other] for other in others), [0.0] * len(of[name]))
        middle: float = statistics.median(
            mine / theirs for mine, theirs in zip(of[name], slowest, strict=True)
        )
        return middle

    for name in ("first", "all"):
        print(
            f"{name}: {ratio(name, ['forward']):.2f} forward, "
            f"{ratio(name, ['backward']):.2f} backward passes "
            f"(CPU {ratio(name, ['forward'], cpu):.2f}, {ratio(name, ['backward'], cpu):.2f}); "
            f"{memory[name] / memory['backward']:.3f} of the backward pass's memory"
        )
    together = 1 + statistics.median(
        min(pair) / max(pair) for pair in zip(seconds["first"], seconds["all"], strict=True)
    )
    print(f"both passes, as when an experiment names both: {together:.2f} times the slower one")
    claims = [
        ("first order / backward, time", ratio("first", ["backward"]), MOST_TIME),
        ("first order / backward, memory", memory["first"] / memory["backward"], MOST_MEMORY),
        (
            "all criteria in one pass / slowest alone",
            ratio("all", ["first", "second", "mixed"]),
            MOST_TOGETHER,
        ),
    ]
    if time_["ratios"]:
        another = statistics.median(second / first for first, second in time_["ratios"])
        claims.append(("another ratio of a scored method / the first", another, MOST_ANOTHER))
        print("seconds to the first checkpoint, to another:", time_["ratios"])
    for line, value, most in claims:
        print(f"{'pass' if value <= most else 'FAIL'}  {line}: {value:.3f} <= {most}")
    if options.json:
        options.json.write_text(
            json.dumps(time_ | {"peak_bytes": memory}, indent=1) + "\n", encoding="utf-8"
        )
    return 0 if all(value <= most for _, value, most in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
