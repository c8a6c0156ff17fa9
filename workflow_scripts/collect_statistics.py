"""Run one statistic pass of a model over a calibration set.

Parameters: ``name`` (a module of prunelib.statistics), ``batch_windows``, ``device``, ``dtype``,
``threads``; of a pass that is told more, ``options`` and ``seed``. Inputs: ``model`` and
``calibration``; in iterative pruning also ``previous``, the checkpoint of the step before, whose
removed units count as zero.
"""

import importlib
import json
import logging
from pathlib import Path

from prunelib.data.parameters import required
from prunelib.provenance.step import StepRequest, run_step
from prunelib.statistics.inputs import PassInputs

logger = logging.getLogger(__name__)


def main(request: StepRequest, out: Path) -> None:
    """Write ``statistics.safetensors`` and ``meta.json``."""
    import torch
    from safetensors.torch import load_file, save_file

    from prunelib.checkpoint import load_model, mask_model, read_config, read_plan
    from prunelib.families import family_of

    params = request.params
    name, device, dtype = (
        required(params, key, str, request.step) for key in ("name", "device", "dtype")
    )
    torch.set_num_threads(required(params, "threads", int, request.step))
    windows = load_file(request.inputs["calibration"] / "windows.safetensors")["input_ids"]
    config = read_config(request.inputs["model"])
    plan = read_plan(request.inputs["previous"]) if "previous" in request.inputs else None
    collector = importlib.import_module(f"prunelib.statistics.{name}")
    options = dict(params.get("options", {}))
    if options.pop("streamed", False):
        # Through the pass: the others do not depend on that code.
        model = collector.StreamedLayers(
            request.inputs["model"], device=device, dtype=dtype, plan=plan
        )
    else:
        model = load_model(request.inputs["model"], device=device, dtype=dtype)
        if plan is not None:
            mask_model(model, config, plan)
    if "seed" in params:
        options["seed"] = params["seed"]
    statistics = collector.collect(
        PassInputs(
            model,
            family_of(config),
            config,
            windows,
            required(params, "batch_windows", int, request.step),
        ),
        **options,
    )
    save_file(
        {key: value.contiguous() for key, value in statistics.items()},
        out / "statistics.safetensors",
    )
    meta = {"name": name, "windows": windows.shape[0], "length": windows.shape[1]}
    if "loss" in statistics:
        meta["loss"] = statistics["loss"].item()
        logger.info("calibration loss %.4f", meta["loss"])
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_step(main)
