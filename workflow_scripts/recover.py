"""Recover a pruned checkpoint by LoRA on the recovery part of a text: articles or instructions.

Parameters: ``recipe``, ``seed``, ``device``, ``dtype``, ``threads``. Inputs: ``checkpoint`` and
``text``. The output is an adapter; a killed run is continued from ``<output>.state``. A recipe with
several processes starts this script once more for each of the others.
"""

import logging
import os
import sys
from pathlib import Path

from prunelib.data.parameters import required
from prunelib.provenance.step import StepRequest, run_step, state_directory
from prunelib.recovery.lora import recover
from prunelib.recovery.parallel import is_helper, run_helper, started
from prunelib.recovery.recipe import parse_recipe

logger = logging.getLogger(__name__)


def main(request: StepRequest, out: Path) -> None:
    """Write the adapter, ``loss.jsonl`` and ``meta.json``."""
    import torch

    from prunelib.checkpoint import load_model
    from prunelib.data.tokenizer import load_tokenizer
    from prunelib.recovery.data import load_data

    params, checkpoint = request.params, request.inputs["checkpoint"]
    recipe = parse_recipe(required(params, "recipe", dict, request.step))
    device, dtype = (required(params, key, str, request.step) for key in ("device", "dtype"))
    # The number of threads decides the order of sums, and with it the last bits of the result.
    torch.set_num_threads(required(params, "threads", int, request.step))
    data, validation = load_data(
        request.inputs["text"],
        load_tokenizer(checkpoint),
        recipe.length,
        validate=recipe.eval_every is not None,
    )
    command = [sys.executable, "-P", __file__, "--request", request.to_json()]
    with started(recipe.processes, device, command) as processes:
        device = processes.device(device)
        result = recover(
            load_model(checkpoint, device=device, dtype=dtype),
            data,
            recipe,
            seed=required(params, "seed", int, request.step),
            state=state_directory(request),
            out=out,
            device=device,
            dtype=dtype,
            base=os.path.relpath(checkpoint, request.out),
            validation=validation,
            processes=processes,
        )
    logger.info(
        "recovery: %d steps, loss %.4f to %.4f", result.steps, result.first_loss, result.last_loss
    )


if __name__ == "__main__":
    if is_helper():
        run_helper(main)
    else:
        run_step(main)
