"""Time and memory of gradient scoring against a plain forward and a plain full backward pass.

Over the same calibration windows, each in a fresh process:

* ``forward``: the model's loss without a graph;
* ``backward``: one loss and one backward pass that keeps the gradients of all weights;
* ``first``: the first-order pass (``gradients``);
* ``all``: the pass of every gradient criterion (``fisher``);
* ``second``, ``mixed``: that pass with nothing but one criterion reduced.

Limits hold seconds of wall time; CPU seconds, which suffer less from what else the machine does,
are printed beside them. Memory is the peak resident memory (VmHWM, reset after loading) above what
is resident with the weights loaded. Models: the embedded one with 10 x 128 tokens of its
calibration articles, and (``--large``) a random one of TinyLlama's shape, 1.1 B parameters in fp32
(4.4 GB, and as much for the plain pass's gradients: 12 GB of memory), with 4 x 128 random tokens.

    python benchmarks/scoring.py            # on the newest fetched model and text
    python benchmarks/scoring.py --large
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artefacts import newest_artefact

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from prunelib.families.base import Config

PASSES = ("forward", "backward", "first", "all", "second", "mixed")
LARGE = Path(__file__).parent.parent / "config" / "models" / "tinyllama-1.1b.json"
MOST_TIME = 1.0
MOST_MEMORY = 0.4
MOST_TOGETHER = 1.4


def status_bytes(field: str) -> int:
    """Return a field of this process's status, e.g. ``VmRSS``, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def embedded(model: Path, text: Path) -> tuple[Any, Config, torch.Tensor]:
    """Return the fetched model, its config and 10 windows of 128 tokens."""
    import torch

    from prunelib.checkpoint import load_model, read_config
    from prunelib.data.calibration import sample_windows, tokenise
    from prunelib.data.text import read_articles
    from prunelib.data.tokenizer import load_tokenizer

    tokens = tokenise(read_articles(text, "calibration"), load_tokenizer(model))
    windows = torch.from_numpy(sample_windows(tokens, 10, 128, 0)[0])
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

            def add(self, found: Any) -> None:
                if criterion == "mixed":
                    super().add(found)
                    return
                if self.squares:
                    torch._foreach_addcmul_(self.squares, list(found), list(found))
                else:
                    self.squares = [gradient.square() for gradient in found]

            def reduce(self, number: int, name: str, weight: Any) -> dict[str, torch.Tensor]:
                weight = weight.detach()
                values = self.squares[number].mul_(weight).mul_(weight)
                if criterion == "mixed":
                    values.mul_(-0.5).add_(self.first[number] * weight).abs_()
                return gradients.rows_and_columns(f"{name}.{criterion}", values)

        return lambda windows: gradients.sweep(
            model, family, windows.split(1), windows.shape[1] - 1, One, criterion
        )

    return {
        "forward": forward,
        "backward": backward,
        "first": lambda w: gradients.collect(model, family, config, w, len(w)),
        "all": lambda w: fisher.collect(model, family, config, w, len(w)),
        "second": alone("second"),
        "mixed": alone("mixed"),
    }


def worker(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one pass in this process."""
    import torch

    model, config, windows = (
        random_large() if options.large else embedded(options.model, options.text)
    )
    run = passes(model, config)[options.worker]
    # Warm up, and bring mapped weights into memory.
    run(windows[:2, :8])
    model.zero_grad(set_to_none=True)
    touched = sum(parameter.detach().sum().item() for parameter in model.parameters())
    loaded = status_bytes("VmRSS")
    # 5 sets the peak back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    seconds, cpu = [], []
    for _ in range(options.repeats):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        run(windows)
        cpu.append(time.process_time() - begin_cpu)
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "loaded_bytes": loaded,
        "peak_bytes": status_bytes("VmHWM") - loaded,
        "threads": torch.get_num_threads(),
        "tokens": windows.numel(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "checksum": touched,
    }


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Run ``worker`` for one pass in a process of its own."""
    # glibc moves this threshold by itself, and the peak with it by hundreds of MB.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--worker", name, "--repeats", str(options.repeats)]
    command += ["--large"] if options.large else []
    command += ["--model", str(options.model), "--text", str(options.text)]
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
    parser.add_argument("--repeats", type=int, help="default 2; 1 with --large")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--worker", choices=PASSES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.repeats = options.repeats or (1 if options.large else 2)
    if not options.large:
        options.model = options.model or newest_artefact("fetch_model")
        options.text = options.text or newest_artefact("fetch_text")
    if options.worker:
        print(json.dumps(worker(options)))
        return 0
    found = {}
    for name in PASSES:
        figures = found[name] = measure(options, name)
        shown = ", ".join(f"{seconds:.2f}" for seconds in figures["seconds"])
        print(
            f"{name:9} {shown} s, {min(figures['cpu_seconds']):.2f} CPU s, "
            f"{figures['peak_bytes'] / 1e9:.3f} GB above the weights",
            flush=True,
        )
    first = found["forward"]
    print(
        f"{first['parameters']:,} parameters, {first['tokens']:,} tokens, fp32, "
        f"{first['threads']} threads; the fastest of {options.repeats} counts"
    )
    seconds = {name: min(figures["seconds"]) for name, figures in found.items()}
    cpu = {name: min(figures["cpu_seconds"]) for name, figures in found.items()}
    memory = {name: figures["peak_bytes"] for name, figures in found.items()}
    for name in ("first", "all"):
        print(
            f"{name}: {seconds[name] / seconds['forward']:.2f} forward, "
            f"{seconds[name] / seconds['backward']:.2f} backward passes "
            f"(CPU {cpu[name] / cpu['forward']:.2f}, {cpu[name] / cpu['backward']:.2f}); "
            f"{memory[name] / memory['backward']:.3f} of the backward pass's memory"
        )
    slowest = max(seconds[name] for name in ("first", "second", "mixed"))
    separate = (seconds["first"] + seconds["all"]) / max(seconds["first"], seconds["all"])
    print(f"both passes, as when an experiment names both: {separate:.2f} times the slower one")
    claims = [
        ("first order / backward, time", seconds["first"] / seconds["backward"], MOST_TIME),
        ("first order / backward, memory", memory["first"] / memory["backward"], MOST_MEMORY),
        ("all criteria in one pass / slowest alone", seconds["all"] / slowest, MOST_TOGETHER),
    ]
    for line, value, most in claims:
        print(f"{'pass' if value <= most else 'FAIL'}  {line}: {value:.3f} <= {most}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(value <= most for _, value, most in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
