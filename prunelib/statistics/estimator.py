"""What a gradient estimate from forward passes is told; no torch, so that plans can check it.

MINI-LLM (arXiv 2407.11681, equation 7) estimates gradients by simultaneous perturbation: along a
random direction ``z`` the loss difference ``c = (L(W + eps z) - L(W - eps z)) / (2 eps)`` is the
derivative, and the mean of ``c z`` over directions estimates the gradient. How many directions,
how long, and how they are drawn, the paper's accessible parts do not say: all are named here.
"""

from __future__ import annotations

from dataclasses import dataclass

from prunelib.errors import InputError

PERTURBATIONS = ("weights", "low_rank", "gates")
DISTRIBUTIONS = ("gaussian", "rademacher")
SCOPES = ("model", "layer")


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """How gradients are estimated from losses.

    Attributes:
        perturbation: what a direction moves: ``weights`` (every weight of every unit by its own
            number), ``low_rank`` (the same, but a matrix [m, n] along ``U z V^T sqrt(mn) / rank``
            with orthonormal U and V: SubZero, arXiv 2410.08989), or ``gates`` (one factor
            ``1 + eps z`` per unit, on its input columns of the output or down projection).
        perturbations: number of directions.
        epsilon: length of a step along a direction; of gates, relative to their value of 1.
        distribution: of the numbers of a direction: ``gaussian`` or ``rademacher`` (plus or minus
            one); of ``low_rank``, those of ``z``.
        scope: ``model`` moves all layers at once, so that one loss difference serves all;
            ``layer`` one layer after the other, each with loss differences of its own, which takes
            ``(layers + 1) / 2`` times the forward passes.
        sides: 2 for the difference between both ends, 1 for that to the unperturbed loss, the
            baseline, which costs half and is biased by the curvature along ``z``.
        minibatch: calibration windows of a direction's losses; 0 for all.
        fresh: whether every direction draws its own minibatch.
        rank: of ``low_rank`` directions.
    """

    perturbation: str = "weights"
    perturbations: int = 32
    epsilon: float = 1e-3
    distribution: str = "gaussian"
    scope: str = "model"
    sides: int = 2
    minibatch: int = 0
    fresh: bool = False
    rank: int = 8

    def __post_init__(self) -> None:
        for name, allowed in (
            ("perturbation", PERTURBATIONS),
            ("distribution", DISTRIBUTIONS),
            ("scope", SCOPES),
            ("sides", (1, 2)),
            ("fresh", (False, True)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                shown = ", ".join(str(one) for one in allowed)
                raise InputError(f"{name} {value!r} is unknown; allowed: {shown}")
        for name, least in (("perturbations", 1), ("minibatch", 0), ("rank", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} {value!r} given; a whole number from {least} allowed")
        if not 0 < self.epsilon < 1:
            raise InputError(f"epsilon {self.epsilon!r} given; between 0 and 1 allowed")
        if self.rank != Estimator.rank and self.perturbation != "low_rank":
            raise InputError(f"rank {self.rank!r} given; it is of perturbation low_rank alone")
        if self.fresh and not self.minibatch:
            raise InputError("fresh needs a minibatch; minibatch 0 given, from 1 allowed")
