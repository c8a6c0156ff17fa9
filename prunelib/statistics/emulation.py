"""One forward pass: affine maps of the residual stream that do most of what a block does.

With X in front of a block and ``U = Y - X`` its update, over all tokens ("A deeper look at depth
pruning of LLMs", arXiv 2407.16286, removes a block and adds its mean update or a low-rank map):

* ``mean`` [layers, hidden]: the mean of U;
* with a rank also ``a`` [layers, hidden, r], ``b`` [layers, r, hidden] and ``bias`` [layers,
  hidden]: ``X -> bias + A B X`` with the least squared distance to U among maps of that rank (with
  a little ridge: ``RIDGE`` of the median variance of a feature), in closed form: with C_xx and C_xu
  the centred products, ``W = (C_xx + l)^-1 C_xu``, and V the first eigenvectors of ``W^T C_xu``,
  ``A = V`` and ``B = (W V)^T``;
* ``errors`` [layers, 3], fp64: mean squared norm of ``U``, of U less its mean, and of U less the
  low-rank map (that of the mean where there is none), on the tokens of the fit.

Every map is fitted to the unpruned model's hidden states. The products of one layer exist at a
time, fp64 [hidden, hidden].
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prunelib.errors import NonFiniteError
from prunelib.statistics.batches import progress
from prunelib.statistics.layerwise import Layers

if TYPE_CHECKING:
    from prunelib.statistics.inputs import PassInputs

logger = logging.getLogger(__name__)

RIDGE = 0.01


@dataclass
class Products:
    """Sums over tokens of inputs x, updates u and their products, fp64."""

    count: int = 0
    x: torch.Tensor | float = 0.0
    u: torch.Tensor | float = 0.0
    xx: torch.Tensor | float = 0.0
    xu: torch.Tensor | float = 0.0
    uu: float = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor, *, pairs: bool) -> None:
        """Add tokens [..., hidden] in front of and behind a block; ``pairs``: with products."""
        x = before.float().reshape(-1, before.shape[-1])
        u = after.to(before.device).float().reshape(-1, after.shape[-1]) - x
        self.count += len(x)
        self.x = self.x + x.sum(0, dtype=torch.float64)
        self.u = self.u + u.sum(0, dtype=torch.float64)
        self.uu += float(u.square().sum(dtype=torch.float64))
        if pairs:
            self.xx = self.xx + (x.double().T @ x.double())
            self.xu = self.xu + (x.double().T @ u.double())


def low_rank_map(
    sums: Products, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Return A [hidden, r], B [r, hidden], bias [hidden] and the mean squared error, fp64."""
    x, u = (torch.as_tensor(value) / sums.count for value in (sums.x, sums.u))
    xx = torch.as_tensor(sums.xx) / sums.count - torch.outer(x, x)
    xu = torch.as_tensor(sums.xu) / sums.count - torch.outer(x, u)
    ridge = RIDGE * xx.diagonal().median().clamp(min=torch.finfo(torch.float64).tiny)
    full = torch.linalg.solve(xx + ridge * torch.eye(len(x), dtype=xx.dtype, device=xx.device), xu)
    product = full.T @ xu
    _, vectors = torch.linalg.eigh((product + product.T) / 2)
    a = vectors[:, -rank:]
    b = (full @ a).T
    variance = sums.uu / sums.count - float(u.square().sum())
    error = variance - 2 * float((b * (a.T @ xu.T)).sum()) + float(((b @ xx) * b).sum())
    return a, b, u - a @ (b @ x), error


def collect(
    inputs: PassInputs,
    *,
    rank: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Return the statistics above, fp32 but for the errors, on the CPU.

    Args:
        inputs: model and windows.
        rank: of the maps; 0 for means alone.
        seed: not used; nothing here is random.

    Raises:
        NonFiniteError: a block's map is not finite; names the layer.
    """
    layers = Layers(inputs.model, inputs.family)
    stream = layers.begin(inputs.windows, inputs.batch_windows)
    found: dict[str, list[torch.Tensor]] = {"mean": [], "errors": []}
    found |= {"a": [], "b": [], "bias": []} if rank else {}
    for index, layer in progress(layers.sweep(), len(layers.modules), "layers", logger):
        before, sums = list(stream.states), Products()
        layers.advance(index, layer, stream)
        for x, y in zip(before, stream.states, strict=True):
            sums.add(x, y, pairs=rank > 0)
        mean = torch.as_tensor(sums.u) / sums.count
        plain = sums.uu / sums.count
        errors = [plain, plain - float(mean.square().sum())]
        if rank:
            a, b, bias, error = low_rank_map(sums, rank)
            for name, value in (("a", a), ("b", b), ("bias", bias)):
                found[name].append(value.float().cpu())
            errors.append(error)
        else:
            errors.append(errors[-1])
        found["mean"].append(mean.float().cpu())
        found["errors"].append(torch.tensor(errors, dtype=torch.float64))
        if not all(values[-1].isfinite().all() for values in found.values()):
            raise NonFiniteError(f"emulation: the map of block {index} is not finite")
    return {name: torch.stack(values) for name, values in found.items()}
