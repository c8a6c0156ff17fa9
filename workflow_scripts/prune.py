"""Turn scores and a target into a plan, and the plan into a smaller checkpoint.

Parameters: ``method``, ``variant`` (its catalogue name), ``parameters``, ``target``, ``seed``.
Inputs: ``model`` and ``scores``; in iterative pruning also ``previous``, the checkpoint of the step
before. The plan is one of the unpruned model in every step.
"""

from pathlib import Path

from prunelib.data.parameters import required
from prunelib.provenance.step import StepRequest, run_step


def main(request: StepRequest, out: Path) -> None:
    """Write the pruned checkpoint with ``plan.json``."""
    from safetensors.numpy import load_file

    from prunelib.checkpoint import prune_checkpoint, read_config, read_plan
    from prunelib.families import family_of
    from prunelib.methods import create
    from prunelib.provenance import artefact
    from prunelib.rules import Target
    from prunelib.selection import select

    params = request.params
    produced_by = {key: params[key] for key in ("method", "variant", "parameters", "seed")}
    method = create(produced_by["method"], produced_by["parameters"])
    source = request.inputs["model"]
    artefact.verify(source)
    config = read_config(source)
    arrays = load_file(request.inputs["scores"] / "scores.safetensors")
    scores: dict[str, list[object]] = {}
    for name in sorted(arrays, key=lambda name: int(name.rpartition(".")[2])):
        scores.setdefault(name.rpartition(".")[0], []).append(arrays[name])
    plan = select(
        scores,  # type: ignore[arg-type]
        family_of(config),
        config,
        Target(**required(params, "target", dict, request.step)),
        method.rule(),
        produced_by,
        read_plan(request.inputs["previous"]) if "previous" in request.inputs else None,
    )
    prune_checkpoint(source, plan, out, scores)


if __name__ == "__main__":
    run_step(main)
