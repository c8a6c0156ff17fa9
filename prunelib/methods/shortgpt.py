"""ShortGPT: remove the blocks with the least block influence (arXiv 2403.03853)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunelib.criteria.fold import Array
from prunelib.methods.base import Method, ScoringInputs


@dataclass(frozen=True, kw_only=True)
class ShortGpt(Method):
    """Block influence ``1 - E cos(X_i, X_{i+1})``; protected layers do not apply to it."""

    statistics: ClassVar[tuple[str, ...]] = ("activations",)
    kinds: ClassVar[tuple[str, ...]] = ("block",)
    title: ClassVar[str] = "ShortGPT"
    citation: ClassVar[str] = """@article{men2024shortgpt,
  title = {{ShortGPT}: Layers in Large Language Models are More Redundant Than You Expect},
  author = {Men, Xin and Xu, Mingyu and Zhang, Qingyu and Wang, Bingning and Lin, Hongyu and
            Lu, Yaojie and Han, Xianpei and Chen, Weipeng},
  journal = {arXiv preprint arXiv:2403.03853},
  year = {2024}
}"""

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return the block influence of all blocks, one array [layers]."""
        influence: Array = inputs.statistics["activations"]["block_influence"].double().numpy()
        return {"block": [influence]}


METHOD = ShortGpt
