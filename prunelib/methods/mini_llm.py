"""MINI-LLM: weight x gradient x activation, gradients from forward passes (arXiv 2407.11681)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from prunelib.methods.mini_llm_backprop import FeatureMapSensitivity
from prunelib.statistics.estimator import Estimator


@dataclass(frozen=True, kw_only=True)
class MiniLlm(Estimator, FeatureMapSensitivity):
    """Feature-map sensitivity with zeroth-order gradients.

    With ``perturbations: 1`` and ``scope: model`` the loss is a factor common to all scores of a
    model: the ranking is that of ``|W| ||X||`` times half-normal noise.

    Attributes:
        streamed: whether layers are read from disk when their turn comes, so that a model larger
            than the device can be scored; changes nothing else.
    """

    streamed: bool = False

    statistics: ClassVar[tuple[str, ...]] = ("zeroth_order",)
    title: ClassVar[str] = "MINI-LLM"

    def __post_init__(self) -> None:
        Estimator.__post_init__(self)
        FeatureMapSensitivity.__post_init__(self)

    @property
    def gates(self) -> bool:
        """As ``perturbation`` says."""
        return self.perturbation == "gates"

    @property
    def statistic_options(self) -> dict[str, dict[str, Any]]:
        """The estimator, and the kinds of units whose gates it moves."""
        options = {field.name: getattr(self, field.name) for field in fields(Estimator)}
        options["streamed"] = self.streamed
        if self.gates:
            options["kinds"] = list(self.kinds)
        return {"zeroth_order": options}


METHOD = MiniLlm
