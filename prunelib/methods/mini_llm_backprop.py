"""MINI-LLM's criterion with true gradients: what its estimate is held against."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from prunelib.criteria.fms import fms_scores, gate_scores
from prunelib.criteria.fold import AGGREGATIONS, Array
from prunelib.errors import InputError
from prunelib.methods.base import Method, ScoringInputs

SCORED = ("weights", "gates")


@dataclass(frozen=True, kw_only=True)
class FeatureMapSensitivity(Method):
    """Scores of units from weights, gradients and activations, however the gradients came.

    Attributes:
        aggregation: how a unit's members are combined, of weights: ``sum``, ``mean``,
            ``product``, ``max`` or ``last``. The paper's accessible parts do not say; ``sum`` is
            LLM-Pruner's.
        activation: whether a gate's derivative is multiplied by the norm of its features.
        aggregations: the values of ``aggregation`` that there are statistics for.
        gates: whether units are scored by one derivative each.
    """

    aggregation: str = "sum"
    activation: bool = True

    aggregations: ClassVar[tuple[str, ...]] = tuple(AGGREGATIONS)
    citation: ClassVar[str] = """@misc{cheng2024minillm,
  title = {{MINI-LLM}: Memory-Efficient Structured Pruning for Large Language Models},
  author = {Cheng, Hongrong and Zhang, Miao and Shi, Javen Qinfeng},
  eprint = {2407.11681},
  archivePrefix = {arXiv},
  year = {2024}
}"""

    def __post_init__(self) -> None:
        for name, allowed in (
            # A gate is one number, with nothing to combine.
            ("aggregation", (type(self).aggregation,) if self.gates else self.aggregations),
            ("activation", (False, True) if self.gates else (True,)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                shown = ", ".join(str(one) for one in allowed)
                raise InputError(f"{name} {value!r} is not of these scores; allowed: {shown}")

    @property
    @abstractmethod
    def gates(self) -> bool:
        """Whether units are scored by one derivative each."""

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return the feature-map sensitivity of all units."""
        (statistic,) = self.statistics
        tensors = inputs.statistics[statistic]

        def score(layer: int | None, name: str) -> Array:
            if self.gates:
                norm = tensors[f"{layer}.{name}.norm"] if self.activation else None
                return gate_scores(tensors[f"{layer}.{name}.gate"], norm)
            kind = inputs.family.kind(inputs.config, name)
            return fms_scores(tensors, layer, kind, self.aggregation)

        return {name: [score(layer, name) for layer in inputs.places(name)] for name in self.kinds}


@dataclass(frozen=True, kw_only=True)
class MiniLlmBackprop(FeatureMapSensitivity):
    """Feature-map sensitivity with gradients from a backward pass.

    Attributes:
        scored: ``weights``, by ``|W g| ||X||`` summed over a unit's members, or ``gates``, by the
            derivative of one factor per unit (``prunelib.criteria.fms.gate_scores``).
    """

    scored: str = "weights"

    statistics: ClassVar[tuple[str, ...]] = ("fms_gradients",)
    title: ClassVar[str] = "MINI-LLM (back-propagation)"

    def __post_init__(self) -> None:
        if self.scored not in SCORED:
            raise InputError(f"scored {self.scored!r} is unknown; allowed: {', '.join(SCORED)}")
        super().__post_init__()

    @property
    def gates(self) -> bool:
        """As ``scored`` says."""
        return self.scored == "gates"


METHOD = MiniLlmBackprop
