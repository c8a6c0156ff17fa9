"""ShortGPT: remove the blocks with the least block influence (arXiv 2403.03853)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from prunelib.criteria.fold import Array
from prunelib.errors import InputError
from prunelib.methods.base import Method, ScoringInputs
from prunelib.plan import DEPTH_KINDS


@dataclass(frozen=True, kw_only=True)
class BlockInfluence(Method):
    """Block influence ``1 - E cos(X_i, X_{i+1})``; protected layers do not apply to it.

    Attributes:
        recompute: whether influences are taken anew after every removal, of what is left; the
            paper takes them once.
    """

    recompute: bool = False

    @property
    def removed(self) -> str:
        """What is removed: whole blocks."""
        return "block"

    @property
    def kinds(self) -> tuple[str, ...]:
        """As ``removed`` says."""
        return (self.removed,)

    @property
    def statistics(self) -> tuple[str, ...]:
        """The shared pass has the influence of whole blocks."""
        plain = self.removed == "block" and not self.recompute
        return ("activations",) if plain else ("influence",)

    @property
    def statistic_options(self) -> Mapping[str, Mapping[str, Any]]:
        """What is removed, and how."""
        return {"influence": {"part": self.removed, "recompute": self.recompute}}

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return the influence of all blocks or parts, or their place in the greedy order."""
        if self.statistics == ("activations",):
            found = inputs.statistics["activations"]["block_influence"].double().numpy()
        elif self.recompute:
            # What goes first has the lowest score.
            found = np.argsort(inputs.statistics["influence"]["order"].numpy()).astype(np.float64)
        else:
            found = inputs.statistics["influence"]["influence"].numpy()
        return {self.removed: [found]}


@dataclass(frozen=True, kw_only=True)
class ShortGpt(BlockInfluence):
    """The blocks with the least influence go, at once and without training.

    Attributes:
        remove: ``block``, or ``attention`` or ``mlp`` alone, with the influence of that part.
    """

    remove: str = "block"

    title: ClassVar[str] = "ShortGPT"
    citation: ClassVar[str] = """@article{men2024shortgpt,
  title = {{ShortGPT}: Layers in Large Language Models are More Redundant Than You Expect},
  author = {Men, Xin and Xu, Mingyu and Zhang, Qingyu and Wang, Bingning and Lin, Hongyu and
            Lu, Yaojie and Han, Xianpei and Chen, Weipeng},
  journal = {arXiv preprint arXiv:2403.03853},
  year = {2024}
}"""

    def __post_init__(self) -> None:
        if self.remove not in DEPTH_KINDS:
            raise InputError(
                f"remove {self.remove!r} is unknown; allowed: {', '.join(DEPTH_KINDS)}"
            )

    @property
    def removed(self) -> str:
        """As ``remove`` says."""
        return self.remove


METHOD = ShortGpt
