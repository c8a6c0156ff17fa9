"""Forward pass: input norms of every linear map and block influence.

One pass over the calibration windows serves every activation criterion.

* ``<layer>.<module>.sum_squares`` [in_features]: sum over tokens of the squared input feature, so
  that its square root is Wanda's ``||X_j||_2`` (arXiv 2306.11695, eq. 1).
* ``block_influence`` [layers]: ``1 - E cos(X_i, X_{i+1})`` over all tokens, X_i being the input of
  block i and X_{i+1} its output before any final norm (ShortGPT, arXiv 2403.03853, eq. 1).
* ``tokens`` []: number of tokens seen.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from prunelib.errors import NonFiniteError
from prunelib.statistics.batches import batches, progress

if TYPE_CHECKING:
    from torch import nn

    from prunelib.statistics.inputs import PassInputs

logger = logging.getLogger(__name__)


def block_cosines(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens of cos(before, after), in fp64.

    The vectors are normalised first: their raw dot product overflows in half precision.

    Args:
        before: block input [..., hidden].
        after: block output [..., hidden].
    """
    return torch.nn.functional.cosine_similarity(
        torch.nn.functional.normalize(before.float(), dim=-1),
        torch.nn.functional.normalize(after.float(), dim=-1),
        dim=-1,
    ).sum(dtype=torch.float64)


def collect(inputs: PassInputs) -> dict[str, torch.Tensor]:
    """Run the model's body over ``windows`` and return the statistics above, on the CPU.

    Args:
        inputs: model and windows.

    Raises:
        NonFiniteError: an activation is NaN or infinite; names the layer.
    """
    layers = inputs.family.layers(inputs.model)
    sums: dict[str, torch.Tensor] = {}
    cosines = torch.zeros(len(layers), dtype=torch.float64)
    hooks = []

    def watch_input(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            squares = args[0].detach().float().flatten(0, -2).square().sum(0, dtype=torch.float64)
            sums[name] = sums[name] + squares.cpu() if name in sums else squares.cpu()

        return hook

    def watch_block(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines[index] += block_cosines(before, after.to(before.device)).cpu()

        return hook

    for index, layer in enumerate(layers):
        hooks.append(layer.register_forward_hook(watch_block(index), with_kwargs=True))
        for name in inputs.family.activation_inputs():
            module = layer.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(watch_input(f"{index}.{name}")))
    try:
        parts = list(batches(inputs.windows, inputs.batch_windows))
        with torch.inference_mode():
            for part in progress(parts, len(parts), "batches", logger):
                inputs.model.base_model(input_ids=part.to(inputs.model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for name, value in sums.items():
        if not value.isfinite().all():
            raise NonFiniteError(f"activations: input of layer {name} is not finite")
    statistics = {f"{name}.sum_squares": value for name, value in sums.items()}
    statistics["block_influence"] = 1 - cosines / inputs.windows.numel()
    statistics["tokens"] = torch.tensor(inputs.windows.numel())
    return statistics
