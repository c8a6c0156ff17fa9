"""Disk, memory and decoding speed of FlexiGPT's checkpoint, ShortGPT's and the unpruned model.

Both are pruned to one share of parameters, FlexiGPT's net of adapters, by the influence of blocks
on 10 x 128 calibration tokens. Each figure comes from a process of its own:

* disk: the weight files;
* weights: anonymous memory after loading less that before, weights copied out of the mapped file;
* peak: VmHWM over a prompt and decoding, less what the interpreter and its imports hold; loading,
  which has the file mapped beside the copies, is over. glibc's threshold for mapping memory is
  fixed for both;
* tokens/s of greedy decoding with a cache, the median of a process's repeats. Processes take turns,
  round after round; the ratio to the unpruned model is taken within a round, and its mean over
  rounds has a 95 % t-interval (of logarithms).

    OMP_NUM_THREADS=1 python benchmarks/checkpoint_speed.py --json checkpoint_speed.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artefacts import newest_artefact
from scoring import embedded, status_bytes

from prunelib.command import reporting_errors
from prunelib.reporting.stats import estimate

if TYPE_CHECKING:
    from collections.abc import Sequence

WORKERS = ("memory", "speed")


def prune(model: Path, text: Path, share: float, rank: int, out: Path) -> dict[str, Path]:
    """Write both pruned checkpoints under ``out``; return all by name, the unpruned one first."""
    from prunelib.checkpoint import WeightReader, prune_checkpoint
    from prunelib.families import family_of
    from prunelib.methods import create
    from prunelib.methods.base import ScoringInputs
    from prunelib.rules import Target
    from prunelib.selection import select
    from prunelib.statistics import activations
    from prunelib.statistics.inputs import PassInputs

    loaded, config, windows = embedded(model, text)
    family = family_of(config)
    found = activations.collect(PassInputs(loaded, family, config, windows, len(windows)))
    inputs = ScoringInputs(family, config, WeightReader(model), {"activations": found}, 0)
    made = {"unpruned": model}
    for name, parameters in (("shortgpt", {}), ("flexigpt", {"rank": rank})):
        method = create(name, parameters)
        target = Target("parameters", share)
        plan = select(method.scores(inputs), family, config, target, method.rule(), {})
        made[name] = out / name
        made[name].mkdir()
        prune_checkpoint(model, plan, made[name])
        print(f"{name}: {plan.parameters[1]:,} of {plan.parameters[0]:,} parameters", flush=True)
    return made


def worker(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the checkpoint ``options.model`` in this process."""
    import transformers.models.llama.modeling_llama  # noqa: F401 - part of the interpreter here

    import prunelib.families.modeling_shared  # noqa: F401 - the same
    from prunelib.checkpoint import load_model, weight_files
    from prunelib.evaluation.efficiency import EfficiencySettings, measure_latency

    interpreter, before = status_bytes("VmRSS"), status_bytes("RssAnon")
    model = load_model(options.model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    weights = status_bytes("RssAnon") - before
    # 5 sets the peak back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    settings = EfficiencySettings(
        length=options.length, new_tokens=options.new_tokens, repeats=options.repeats
    )
    prefill, decode = measure_latency(model, settings)
    return {
        "disk_bytes": sum(path.stat().st_size for path in weight_files(options.model)),
        "weights_bytes": weights,
        "peak_bytes": status_bytes("VmHWM") - interpreter,
        "prefill_tokens_per_s": prefill["tokens_per_s"],
        "decode_tokens_per_s": decode["tokens_per_s"],
    }


def measure(options: argparse.Namespace, name: str, model: Path) -> dict[str, Any]:
    """Let a process of its own measure a checkpoint."""
    environment = dict(os.environ)
    if name == "memory":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, __file__, "--worker", name, "--model", str(model)]
    for key in ("length", "new_tokens", "repeats"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return the geometric mean of the rounds' ratios with its 95 % t-interval.

    Of a single round the interval is NaN.
    """
    found = estimate([math.log(own / other) for own, other in zip(ours, theirs, strict=True)])
    low, high = (math.nan if limit is None else limit for limit in (found.low, found.high))
    return math.exp(found.mean), math.exp(low), math.exp(high)


def report(options: argparse.Namespace) -> None:
    """Measure all checkpoints and print the table."""
    with tempfile.TemporaryDirectory() as place:
        made = prune(options.model, options.text, options.share, options.rank, Path(place))
        memory = {name: measure(options, "memory", path) for name, path in made.items()}
        speed: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(options.rounds):
            for name, path in made.items():
                speed[name].append(measure(options, "speed", path)["decode_tokens_per_s"])
    print("\n| checkpoint | disk, MB | weights, MB | peak, MB | tokens/s | ratio, 95 % |")
    print("|---" * 6 + "|")
    for name, figures in memory.items():
        sizes = (figures[f"{key}_bytes"] / 1e6 for key in ("disk", "weights", "peak"))
        mean, low, high = ratio(speed[name], speed["unpruned"])
        print(
            f"| {name} | {' | '.join(f'{size:.1f}' for size in sizes)} | "
            f"{statistics.median(speed[name]):.2f} | {mean:.3f} ({low:.3f} to {high:.3f}) |"
        )
    print(
        f"fp32, batch 1, {options.length} tokens of prompt, {options.new_tokens} decoded, "
        f"{options.repeats} repeats in each of {options.rounds} processes, "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"
    )
    if options.json:
        options.json.write_text(
            json.dumps({"memory": memory, "decode_tokens_per_s": speed}, indent=1) + "\n",
            encoding="utf-8",
        )


@reporting_errors("checkpoint_speed")
def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint directory")
    parser.add_argument("--text", type=Path, help="directory with articles.jsonl")
    parser.add_argument("--share", type=float, default=0.213, help="of parameters that go")
    parser.add_argument("--rank", type=int, default=32, help="of FlexiGPT's adapters")
    parser.add_argument("--length", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="in every process")
    parser.add_argument("--rounds", type=int, default=5, help="processes for each checkpoint")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(worker(options)))
        return 0
    options.model = options.model or newest_artefact("fetch_model")
    options.text = options.text or newest_artefact("fetch_text")
    report(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
