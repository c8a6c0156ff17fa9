"""Merge a recovery adapter into its checkpoint.

Parameters: none. Inputs: ``checkpoint`` and ``adapter``. The output is a checkpoint like the first,
with the same config, modelling file, tokenizer and plan, and every weight in its own dtype.
"""

from pathlib import Path

from prunelib.provenance.step import StepRequest, run_step
from prunelib.recovery.adapters import merge


def main(request: StepRequest, out: Path) -> None:
    """Write the merged checkpoint."""
    from prunelib.checkpoint import load_model, read_tensors, save_like

    source = request.inputs["checkpoint"]
    # Added in fp32 and rounded once.
    merged = merge(load_model(source, dtype="float32"), request.inputs["adapter"])
    dtypes = {name: tensor.dtype for name, tensor in read_tensors(source)}
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    save_like(merged, source, out)


if __name__ == "__main__":
    run_step(main)
