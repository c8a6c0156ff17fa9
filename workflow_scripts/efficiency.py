"""Measure size, work, speed and memory of a checkpoint.

Parameters: ``batch``, ``length``, ``new_tokens``, ``warmup``, ``repeats``, ``batches`` (further
batch sizes, if any), ``hardware_class`` (the name under which figures may share a column),
``device``, ``dtype``, ``threads`` (null for torch's default). Inputs: ``checkpoint``, and
``adapter`` where there is one.
"""

import json
import os
from pathlib import Path

from prunelib.data.parameters import required
from prunelib.provenance.step import StepRequest, run_step


def node_alone() -> bool | None:
    """Whether no other SLURM job can share the node; None outside of SLURM, False if unknown."""
    from prunelib.cluster.slurm import has_node_alone
    from prunelib.errors import PrunelibError

    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    try:
        return has_node_alone(job)
    except PrunelibError:
        return False


def main(request: StepRequest, out: Path) -> None:
    """Write ``metrics.json``."""
    import torch

    from prunelib.device import hardware, resolve_dtype
    from prunelib.evaluation.efficiency import EfficiencySettings, measure_efficiency
    from prunelib.recovery.adapters import load_recovered

    params, inputs = request.params, request.inputs
    device, dtype, hardware_class = (
        required(params, key, str, request.step) for key in ("device", "dtype", "hardware_class")
    )
    names = ("batch", "length", "new_tokens", "warmup", "repeats")
    settings = EfficiencySettings(
        **{name: required(params, name, int, request.step) for name in names},
        batches=tuple(params.get("batches", ())),
    )
    if params.get("threads") is not None:
        torch.set_num_threads(required(params, "threads", int, request.step))
    model = load_recovered(inputs["checkpoint"], inputs.get("adapter"), device=device, dtype=dtype)
    metrics = measure_efficiency(model, settings, dtype=resolve_dtype(dtype)) | {
        "hardware": hardware(model.device),
        "hardware_class": hardware_class,
        "dtype": dtype,
    }
    alone = node_alone()
    metrics["conditions"]["node_alone"] = alone
    # A neighbour that happened to be quiet is no promise.
    metrics["comparable"] = metrics["comparable"] and alone is not False
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_step(main)
