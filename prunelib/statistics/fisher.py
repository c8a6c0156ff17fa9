"""One backward pass per calibration window: second-order products and, with them, all others.

The gradient ``g(x_j)`` of window ``j`` is that of the window's own mean next-token loss, so over
``N`` windows of equal length the gradient of the mean loss is ``g = 1/N sum_j g(x_j)`` and the
diagonal Fisher information is ``F_kk = 1/N sum_j g_k(x_j)^2`` (LLM-Pruner, arXiv 2305.11627,
section 3.2; its equation 5 leaves the ``1/N`` of F out, its code, which sends every sample through
the model by itself and divides the squares by ``N``, does not). For every parameter of every
decoder layer, each as ``.rows`` [rows] and ``.columns`` [columns], sums over the other axis:

* ``<layer>.<parameter>.abs`` and ``.sum``: as in ``prunelib.statistics.gradients``;
* ``<layer>.<parameter>.fisher``: ``sum_k w_k^2 F_kk`` (element-wise second order);
* ``<layer>.<parameter>.mixed``: ``sum_k |g_k w_k - 1/2 w_k^2 F_kk|``.

So this pass serves every gradient criterion; the first-order ones cost it four sums per parameter.
Of one layer at a time it holds the sum of gradients, the sum of their squares and one window's
gradients, all fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prunelib.statistics.batches import batches
from prunelib.statistics.gradients import Sums, rows_and_columns, sweep

if TYPE_CHECKING:
    from prunelib.statistics.inputs import PassInputs


class SquaredSums(Sums):
    """Sums over windows of one parameter's gradient and of its square, in fp32.

    Attributes:
        squares: the summed squared gradient, shaped as the parameter.
    """

    squares: torch.Tensor

    def add(self, gradient: torch.Tensor) -> None:
        """Add one window's gradient."""
        gradient = gradient.float()
        if self.batches:
            self.squares.addcmul_(gradient, gradient)
        else:
            self.squares = gradient.square()
        super().add(gradient)

    def reduce(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the first-order, second-order and mixed statistics of the parameter."""
        weight = weight.detach()
        square = self.squares.mul_(weight).mul_(weight).div_(self.batches)
        reduced = rows_and_columns(f"{name}.fisher", square)
        mixed = square.mul_(-0.5).add_(self.first.div_(self.batches) * weight).abs_()
        reduced |= rows_and_columns(f"{name}.mixed", mixed)
        return reduced | super().reduce(name, weight)


def collect(inputs: PassInputs) -> dict[str, torch.Tensor]:
    """Return the statistics above and the mean ``loss`` [], on the CPU.

    Args:
        inputs: model and windows.

    Raises:
        NonFiniteError: the loss or a layer's gradients are NaN or infinite; names the layer.
    """
    return second_order(inputs, "fisher")


def second_order(inputs: PassInputs, what: str, *, outer: bool = False) -> dict[str, torch.Tensor]:
    """Return all gradient statistics with the mean ``loss``.

    Squares of single windows need every window by itself, whatever ``batch_windows`` is.

    Args:
        inputs: model and windows.
        what: name of the pass, for messages.
        outer: whether what is outside the layers has statistics, too.
    """
    parts = list(batches(inputs.windows, 1))
    targets = inputs.windows.shape[1] - 1
    statistics, loss = sweep(
        inputs.model, inputs.family, parts, targets, SquaredSums, what, outer=outer
    )
    return statistics | {"loss": torch.tensor(loss / len(parts), dtype=torch.float64)}
