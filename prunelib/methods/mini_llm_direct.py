"""MINI-LLM's criterion with gradients along the residual stream, from two forward passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunelib.methods.mini_llm_backprop import MiniLlmBackprop


@dataclass(frozen=True, kw_only=True)
class MiniLlmDirect(MiniLlmBackprop):
    """Feature-map sensitivity of output and down projections (``statistics.fms_direct``).

    Not of the paper. Its gradients leave out what passes through later layers, and only the last
    members of a unit have one, so that ``aggregation`` is ``last``.
    """

    aggregation: str = "last"

    aggregations: ClassVar[tuple[str, ...]] = ("last",)
    statistics: ClassVar[tuple[str, ...]] = ("fms_direct",)
    title: ClassVar[str] = "MINI-LLM (residual gradients)"


METHOD = MiniLlmDirect
