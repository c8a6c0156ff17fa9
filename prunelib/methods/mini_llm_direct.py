"""MINI-LLM's criterion with gradients along the residual stream, from two forward passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from prunelib.methods.mini_llm_backprop import MiniLlmBackprop


@dataclass(frozen=True, kw_only=True)
class MiniLlmDirect(MiniLlmBackprop):
    """Feature-map sensitivity of output and down projections (``statistics.fms_direct``).

    Not of the paper. Its gradients leave out what passes through later layers, and only the last
    members of a unit have one, so that ``aggregation`` is ``last``.

    Attributes:
        streamed: whether layers are read from disk when their turn comes, so that a model larger
            than the device can be scored; changes nothing else.
    """

    aggregation: str = "last"
    streamed: bool = False

    aggregations: ClassVar[tuple[str, ...]] = ("last",)
    statistics: ClassVar[tuple[str, ...]] = ("fms_direct",)
    title: ClassVar[str] = "MINI-LLM (residual gradients)"

    @property
    def statistic_options(self) -> dict[str, dict[str, Any]]:
        """Whether layers are streamed, if they are."""
        return {"fms_direct": {"streamed": True}} if self.streamed else {}


METHOD = MiniLlmDirect
