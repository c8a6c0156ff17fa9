"""What a pass over calibration windows is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from prunelib.families.base import Config, Family


@dataclass(frozen=True, eq=False)
class PassInputs:
    """A model, and the windows that a pass looks at.

    Attributes:
        model: in eval mode; when a pass returns, its weights, gradients and modules are what they
            were. Passes that go layer by layer and say so also take its ``Layers``, which may be
            streamed.
        family: the model's family.
        config: config.json of the model.
        windows: int64 [n, length] token ids.
        batch_windows: windows at a time; the result does not depend on it beyond rounding.
    """

    model: Any
    family: Family
    config: Config
    windows: torch.Tensor
    batch_windows: int
