"""Next-token loss through a frozen output layer, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

# 256 positions of a 128k vocabulary are 130 MB of fp32 logits: the largest buffer of the loss.
CHUNK = 256


@torch.no_grad()
def head_loss(
    hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor, chunk: int = CHUNK
) -> float:
    """Return the sum of ``-log p(target)`` in nats; arguments as in `frozen_head_loss`."""
    total = 0.0
    for rows, index in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = head(rows.to(head.weight.device)).float()
        total += float(F.cross_entropy(logits, index.to(logits.device), reduction="sum"))
    return total


class _FrozenHeadLoss(torch.autograd.Function):
    """Sum of negative log-likelihoods, with its input gradient computed in the forward pass.

    The output layer is frozen, so the only gradient is the one for the hidden states:
    ``(softmax(logits) - onehot) @ weight``. Taking it while the chunk's logits are still there
    costs no recomputation and frees them at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        chunk: int,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        # One buffer for all chunks: fresh memory of this size costs more than the arithmetic.
        scratch = torch.empty(
            min(chunk, len(hidden)), len(weight), dtype=torch.float32, device=hidden.device
        )
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            index = targets[part].unsqueeze(1)
            logits = F.linear(hidden[part], weight, bias).float()
            highest = logits.amax(dim=1, keepdim=True)
            powers = torch.sub(logits, highest, out=scratch[: len(logits)]).exp_()
            normaliser = powers.sum(dim=1, keepdim=True).log_().add_(highest)
            total += (normaliser - logits.gather(1, index)).sum()
            probabilities = logits.sub_(normaliser).exp_()
            probabilities.scatter_add_(1, index, -torch.ones_like(normaliser))
            gradient[part] = (probabilities.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None


def frozen_head_loss(
    hidden: torch.Tensor,
    head: torch.nn.Linear,
    targets: torch.Tensor,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Return the sum of ``-log p(target)`` in nats, as a differentiable fp32 scalar.

    Args:
        hidden: last hidden states, ``[positions, hidden_size]``.
        head: the output layer, whose weights get no gradient.
        targets: token ids, int64 ``[positions]``.
        chunk: positions whose logits are held at a time.
    """
    device = head.weight.device
    loss: torch.Tensor = _FrozenHeadLoss.apply(
        hidden.to(device), head.weight, head.bias, targets.to(device), chunk
    )
    return loss
