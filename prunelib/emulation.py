"""What stands in the place of a removed block: an affine map of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunelib.errors import InputError
from prunelib.plan import EMULATION

if TYPE_CHECKING:
    import torch

    from prunelib.families.base import Family
    from prunelib.plan import Plan


def emulated_tensors(
    family: Family, plan: Plan, scores: Mapping[str, Sequence[Any]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what the plan's emulated blocks hold, by full name in the new model.

    Args:
        family: the model's family.
        plan: the decision.
        scores: per layer of the unpruned model the maps, by the names in ``EMULATION``.
        dtype: of the checkpoint.

    Raises:
        InputError: the scores lack the maps, or have them of another rank.
    """
    import torch

    assert plan.emulation is not None
    rank = plan.emulation.rank
    names = dict(zip(("bias", "A", "B"), EMULATION, strict=True))
    if not rank:
        del names["A"], names["B"]
    for block in plan.emulation.blocks:
        for own, name in names.items():
            if name not in scores:
                raise InputError(f"scores: {name} is missing, the map that emulates a block")
            tensor = torch.as_tensor(scores[name][block.like])
            if own != "bias" and rank not in tensor.shape:
                raise InputError(f"scores: {name} has the shape {tuple(tensor.shape)}, not {rank}")
            yield f"{family.layer_prefix}.{block.place}.{own}", tensor.to(dtype)
