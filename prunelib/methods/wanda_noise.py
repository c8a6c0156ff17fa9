"""Wanda-sp times noise: what is left of a gradient estimate that knows nothing of the loss."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from prunelib.criteria.fold import Array
from prunelib.methods.base import ScoringInputs
from prunelib.methods.wanda_sp import WandaSp

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class WandaNoise(WandaSp):
    """Mean over output rows of |W| ||X|| |z| with z standard normal: a control.

    On the groups of Wanda-sp, the inputs of the output and down projections. MINI-LLM
    (arXiv 2407.11681) with one perturbation of all weights ranks by such noise, whatever the loss.
    """

    seeded: ClassVar[bool] = True
    title: ClassVar[str] = "Wanda-sp times noise"

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return Wanda-sp scores of weights times noise that depends on seed and name only."""

        def noisy(name: str) -> torch.Tensor:
            import torch

            digest = hashlib.sha256(f"{inputs.seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
            weight = inputs.weight(name).double()
            return weight * torch.randn(weight.shape, generator=generator).double()

        return super().scores(replace(inputs, weight=noisy))


METHOD = WandaNoise
