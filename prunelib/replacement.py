"""Blocks that use another block's matrices: which ones, and what their adapters begin with.

The matrices of a virtual layer are ``W_j + A B`` with the base's ``W_j`` (FlexiGPT, arXiv
2501.14713, section 3.2). Nothing of the size of a model is held: two matrices at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from prunelib.low_rank import seed_of, truncated_svd

if TYPE_CHECKING:
    from prunelib.families.base import Config, Family
    from prunelib.plan import Plan, SharedBlock, Sharing

Read = Callable[[str], torch.Tensor]


def shared_tensors(
    family: Family, config: Config, plan: Plan, read: Read
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what the plan's virtual layers hold themselves, by full name in the new model.

    Args:
        family: the model's family.
        config: config.json of the unpruned model.
        plan: the decision.
        read: returns a tensor of the unpruned model by its full name.
    """
    if plan.sharing is None:
        return
    for block in plan.sharing.blocks:
        prefix = f"{family.layer_prefix}.{block.place}."
        for name, tensor in _layer_tensors(family, config, plan.sharing, block, read):
            yield prefix + name, tensor


def _layer_tensors(
    family: Family, config: Config, sharing: Sharing, block: SharedBlock, read: Read
) -> Iterator[tuple[str, torch.Tensor]]:
    shapes = family.layer_shapes(config)
    for name, shape in shapes.items():
        wanted = read(f"{family.layer_prefix}.{block.like}.{name}")
        module = name.rpartition(".")[0]
        if len(shape) == 1 and f"{module}.weight" in shapes and len(shapes[f"{module}.weight"]) > 1:
            # A bias of a linear map: what it adds to the base's.
            base = read(f"{family.layer_prefix}.{block.base}.{name}")
            yield name, (wanted.float() - base.float()).to(wanted.dtype)
            continue
        if len(shape) == 1:
            yield name, wanted
            continue
        seed = seed_of(sharing.seed, block.place, name)
        if sharing.svd and block.like != block.base:
            base = read(f"{family.layer_prefix}.{block.base}.{name}")
            a, b = difference_factors(wanted, base, sharing.rank, seed)
        else:
            a, b = zero_factors(shape, sharing.rank, seed)
        yield f"{module}.A", a.to(wanted.dtype)
        yield f"{module}.B", b.to(wanted.dtype)
        if sharing.gain is not None and module in family.output_maps(config):
            yield f"{module}.gain", torch.full((shape[0],), sharing.gain, dtype=wanted.dtype)


def difference_factors(
    wanted: torch.Tensor, base: torch.Tensor, rank: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``A = U S`` [out, r] and ``B = V^T`` [r, in] of ``wanted - base`` cut to ``rank``.

    Args:
        wanted: the matrix of the block that is stood for [out, in].
        base: that of the block whose weights are used [out, in].
        rank: r, at most the matrices' own.
        seed: of the randomised decomposition.
    """
    factors = truncated_svd(wanted.float() - base.float(), rank, seed)
    return factors.u * factors.s, factors.v.T


def zero_factors(shape: tuple[int, ...], rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors whose product is zero, as LoRA begins: A zero, B uniform as peft has it.

    Args:
        shape: of the matrix, (out, in).
        rank: r, at most the matrix's own.
        seed: of B, uniform in +-1 / sqrt(in).
    """
    rank = min(rank, *shape)
    generator = torch.Generator().manual_seed(seed)
    b = (2 * torch.rand(rank, shape[1], generator=generator) - 1) / math.sqrt(shape[1])
    return torch.zeros(shape[0], rank), b
