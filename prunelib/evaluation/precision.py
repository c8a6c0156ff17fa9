"""Half-precision weights on a CPU stay as they are in memory; the computation runs in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HALF = (torch.bfloat16, torch.float16)


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALF else value


def _half_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dtype in HALF and parameter.device.type == "cpu"
    }


@contextmanager
def fp32_compute(model: PreTrainedModel | nn.Module) -> Iterator[None]:
    """Run ``model`` in fp32 inside the block, whatever half precision its CPU weights have.

    CPUs without bf16 instructions multiply in bf16 5 to 160 times slower than in fp32. Each module
    sees fp32 copies of its own parameters while it runs and gets the very same parameter objects
    back, so the weights are bit-identical afterwards and at most one module's copy exists at a
    time. Embeddings look up first and widen the few rows that were read. Models in fp32 and
    parameters on other devices are left alone.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        for name, parameter in _half_parameters(module).items():
            replaced.append((module, name, parameter))
            module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)
        return tuple(_widen(argument) for argument in args)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while replaced and replaced[-1][0] is module:
            _, name, parameter = replaced.pop()
            module._parameters[name] = parameter

    def widen_rows(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _widen(output)

    handles = []
    for module in model.modules():
        if not _half_parameters(module):
            continue
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(widen_rows))
        else:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        # A forward that raised did not come past its `leave`.
        for module, name, parameter in reversed(replaced):
            module._parameters[name] = parameter
