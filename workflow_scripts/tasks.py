"""Evaluate a checkpoint on multiple-choice tasks through lm-eval.

Parameters: ``tasks`` (names), ``definitions`` (the local ones among them: name -> lm-eval task
definition), ``limit`` (documents per task; null for all), ``batch_size``, ``seed``, ``device``,
``dtype``, ``threads`` (null for torch's default). Inputs: ``checkpoint``, ``tasks_data`` for local
tasks, and ``adapter`` where there is one.
"""

import json
from importlib.metadata import version
from pathlib import Path

from prunelib.data.parameters import required
from prunelib.errors import InputError
from prunelib.evaluation.tasks import TaskSpec
from prunelib.provenance.step import StepRequest, run_step


def task_specs(request: StepRequest) -> list[TaskSpec]:
    """Return the tasks of a request; the documents of ``local_x`` are ``x.jsonl``."""
    names = request.params.get("tasks")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{request.step}: tasks is {names!r}; it must be a list of names")
    definitions = request.params.get("definitions", {})
    if definitions and "tasks_data" not in request.inputs:
        raise InputError(f"{request.step}: local tasks need the input tasks_data")
    return [
        TaskSpec(
            name,
            definitions[name],
            request.inputs["tasks_data"] / f"{name.removeprefix('local_')}.jsonl",
        )
        if name in definitions
        else TaskSpec(name)
        for name in names
    ]


def main(request: StepRequest, out: Path) -> None:
    """Write ``metrics.json``."""
    specs = task_specs(request)
    import torch

    from prunelib.data.tokenizer import load_tokenizer
    from prunelib.device import hardware
    from prunelib.evaluation.harness import evaluate_tasks
    from prunelib.recovery.adapters import load_recovered

    params, inputs = request.params, request.inputs
    batch_size, seed = (required(params, key, int, request.step) for key in ("batch_size", "seed"))
    device, dtype = (required(params, key, str, request.step) for key in ("device", "dtype"))
    if params.get("threads") is not None:
        torch.set_num_threads(required(params, "threads", int, request.step))
    model = load_recovered(inputs["checkpoint"], inputs.get("adapter"), device=device, dtype=dtype)
    tasks = evaluate_tasks(
        model,
        load_tokenizer(inputs["checkpoint"]),
        specs,
        batch_size=batch_size,
        limit=params.get("limit"),
        seed=seed,
    )
    metrics = {
        "tasks": tasks,
        "lm_eval": version("lm-eval"),
        "dtype": dtype,
        "hardware": hardware(model.device),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_step(main)
