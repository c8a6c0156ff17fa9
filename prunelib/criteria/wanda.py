"""Wanda for structures: |W| times the norm of the input feature (arXiv 2306.11695, eq. 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunelib.criteria.fold import Array

if TYPE_CHECKING:
    import torch


def wanda_columns(weight: torch.Tensor, input_norm: torch.Tensor) -> Array:
    """Return the mean over output rows of ``|W_ij| * ||X_j||_2`` per input column j.

    Wanda-sp (the structured baseline of FLAP, arXiv 2312.11983) scores the columns of the output
    and down projections this way.

    Args:
        weight: [rows, columns].
        input_norm: [columns], the L2 norm of every input feature over all calibration tokens.
    """
    scores: Array = (weight.double().abs().mean(0) * input_norm.double()).numpy()
    return scores
