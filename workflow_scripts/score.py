"""Score all units of a model with one method.

Parameters: ``method``, ``parameters`` (its hyper-parameters but for selection), ``seed``. Inputs:
``model`` and one statistic pass per name that the method asks for; in iterative pruning also
``previous``, the checkpoint of the step before, whose removed units count as zero.
"""

import json
from pathlib import Path

from prunelib.data.parameters import required
from prunelib.provenance.step import StepRequest, run_step


def main(request: StepRequest, out: Path) -> None:
    """Write ``scores.safetensors`` (``<kind>.<layer>``, float64 [units]) and ``summary.json``."""
    from safetensors.numpy import save_file
    from safetensors.torch import load_file

    from prunelib.checkpoint import MaskedReader, WeightReader, read_config, read_plan
    from prunelib.families import family_of
    from prunelib.methods import create
    from prunelib.methods.base import ScoringInputs

    params = request.params
    method = create(
        required(params, "method", str, request.step),
        required(params, "parameters", dict, request.step),
    )
    source = request.inputs["model"]
    config = read_config(source)
    weight: WeightReader | MaskedReader = WeightReader(source)
    if "previous" in request.inputs:
        weight = MaskedReader(source, read_plan(request.inputs["previous"]))
    scores = method.scores(
        ScoringInputs(
            family=family_of(config),
            config=config,
            weight=weight,
            statistics={
                name: load_file(request.inputs[name] / "statistics.safetensors")
                for name in method.statistics
            },
            seed=params.get("seed") or 0,
        )
    )
    arrays = {
        f"{kind}.{i}": array for kind, layers in scores.items() for i, array in enumerate(layers)
    }
    save_file(arrays, out / "scores.safetensors")
    summary = {
        name: {"units": len(array), "min": array.min(), "mean": array.mean(), "max": array.max()}
        for name, array in arrays.items()
    }
    (out / "summary.json").write_text(
        json.dumps(summary, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    run_step(main)
