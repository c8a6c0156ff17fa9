"""A linear layer with a LoRA adapter in four products forward and back, and nothing besides.

peft adds the adapter's output to the layer's with passes over it for scaling and sum, forward and
back; on a CPU these cost a fifth of what the products cost. Here the products accumulate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


class _LoraLinear(torch.autograd.Function):
    """``x W' + b + s (x A') B'`` with gradients for x, A and B; W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = inputs.flatten(0, -2)
        low = rows @ down.T
        outputs = F.linear(rows, weight, bias).addmm_(low, up.T, alpha=scaling)
        ctx.save_for_backward(rows, weight, down, up, low)
        ctx.scaling = scaling
        return outputs.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, down, up, low = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        lowered = (gradient @ up).mul_(ctx.scaling)
        inputs = None
        if ctx.needs_input_grad[0]:
            inputs = (gradient @ weight).addmm_(lowered, down)
            inputs = inputs.view(*gradients[0].shape[:-1], -1)
        return (
            inputs,
            None,
            None,
            lowered.T @ rows,
            (gradient.T @ low).mul_(ctx.scaling),
            None,
        )


def fuse(adapted: Any) -> None:
    """Let the adapted layers of a peft model train by fused products where that is the same thing.

    It is for plain LoRA without dropout, where everything has one precision; all else, and every
    model in eval mode, stays with peft.
    """
    from peft.tuners.lora.layer import Linear

    for module in adapted.modules():
        if isinstance(module, Linear) and _is_plain(module):
            module.forward = _forward(module)  # type: ignore[method-assign]


def _is_plain(layer: Any) -> bool:
    base, name = layer.get_base_layer(), "default"
    return (
        type(base) is torch.nn.Linear
        and not any(p.requires_grad for p in base.parameters())
        and layer.active_adapters == [name]
        and isinstance(layer.lora_dropout[name], torch.nn.Identity)
        and not layer.use_dora[name]
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
    )


def _forward(layer: Any) -> Any:
    plain = layer.forward
    base, scaling = layer.get_base_layer(), layer.scaling["default"]
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def forward(inputs: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        one_type = inputs.dtype == base.weight.dtype == down.dtype
        autocast = torch.is_autocast_enabled(inputs.device.type)
        if arguments or named or autocast or not (layer.training and one_type):
            found: torch.Tensor = plain(inputs, *arguments, **named)
            return found
        fused: torch.Tensor = _LoraLinear.apply(inputs, base.weight, base.bias, down, up, scaling)
        return fused

    return forward
