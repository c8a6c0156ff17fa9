"""Statistic passes over calibration windows, each shared by every criterion that reads it.

A pass is one module of this package with a function ``collect(inputs: PassInputs, ...) -> dict[str,
Tensor]`` whose tensors are already reduced: per input feature or per row and column, never per
weight.
"""

# Passes whose tensors are among those of other passes, from the least of these to the most.
WITHIN: dict[str, tuple[str, ...]] = {
    "gradients": ("gradients_whole", "fisher", "fisher_whole"),
    "gradients_whole": ("fisher_whole",),
    "fisher": ("fisher_whole",),
}
