"""Second-order products of the whole model: ``fisher`` and what is outside the layers.

Channels of the residual stream own columns of the embedding and the head and elements of the final
norm. For each of these parameters the statistics are called ``<full name>.<reduction>.rows`` and
``.columns``, with the reductions of ``prunelib.statistics.fisher`` (``abs``, ``sum``, ``fisher``
and ``mixed``). Those of an embedding's columns sum over the vocabulary, as the public LLM-Pruner
code does. A tied head and its embedding are one parameter, whose gradient both uses add to.

Beside what ``fisher`` holds, the gradients of all these parameters and their sums exist at once,
in fp32, and the head is applied once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunelib.statistics.fisher import second_order

if TYPE_CHECKING:
    import torch

    from prunelib.statistics.inputs import PassInputs


def collect(inputs: PassInputs) -> dict[str, torch.Tensor]:
    """Return the statistics above and the mean ``loss`` [], on the CPU.

    Args:
        inputs: model and windows.

    Raises:
        NonFiniteError: the loss or a gradient is NaN or infinite; names the layer or parameter.
    """
    return second_order(inputs, "fisher_whole", outer=True)
