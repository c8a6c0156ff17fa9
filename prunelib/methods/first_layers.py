"""First layers: remove the last blocks, whatever they do.

The public LLM-Pruner code has it as the pruner type ``layer``, which cuts the list of layers after
the first N and computes no importance; the paper (arXiv 2305.11627) does not report it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from prunelib.criteria.fold import Array
from prunelib.methods.base import Method, ScoringInputs


@dataclass(frozen=True, kw_only=True)
class FirstLayers(Method):
    """Keeps the first layers: a depth baseline without data; protected layers do not apply to it.

    A target of ``k`` blocks keeps the first ``layers - k``; shares are of the blocks or parameters.
    """

    kinds: ClassVar[tuple[str, ...]] = ("block",)
    title: ClassVar[str] = "First layers"
    citation: ClassVar[str] = """@inproceedings{ma2023llmpruner,
  title = {{LLM-Pruner}: On the Structural Pruning of Large Language Models},
  author = {Ma, Xinyin and Fang, Gongfan and Wang, Xinchao},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023}
}"""

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return the number of layers from each one to the end, one array [layers]."""
        return {"block": [np.arange(inputs.layer_count, 0, -1, dtype=np.float64)]}


METHOD = FirstLayers
