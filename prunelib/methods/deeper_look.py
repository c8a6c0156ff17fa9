"""A deeper look at depth pruning: static and adaptive metrics, on blocks or parts (2407.16286)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from prunelib.criteria.depth import absent_minus_present, chain_marginals
from prunelib.criteria.fold import Array
from prunelib.errors import InputError
from prunelib.methods.base import DepthMethod, ScoringInputs
from prunelib.plan import EMULATION
from prunelib.rules import Rule

STATIC = ("cosine", "relative_l1", "relative_l2")
# By metric, the values of coalitions that it looks at.
ADAPTIVE = {"loss_shapley": "losses", "logit_shapley": "distances"}

EMULATIONS = ("none", "mean", "low_rank")


@dataclass(frozen=True, kw_only=True)
class DeeperLook(DepthMethod):
    """Remove the blocks, attentions or MLPs of lowest influence, all at once.

    Attributes:
        metric: ``cosine``, ``relative_l1`` or ``relative_l2`` of the update of the residual
            stream, or what models with and without the unit achieve: ``loss_shapley``, or
            ``logit_shapley``, the distance of the logits to those of the whole model.
        scheme: of the coalitions: ``leave_one_out``, ``subsets`` or ``chains``.
        draws: random sets or orders.
        kept: share of the units in a random set.
        emulate: what takes the place of a removed block: ``none``, its ``mean`` update, or a
            ``low_rank`` affine map of the residual stream.
        rank: of that map.
    """

    metric: str = "cosine"
    scheme: str = "leave_one_out"
    draws: int = 10
    kept: float = 0.5
    emulate: str = "none"
    rank: int = 64

    selection_fields: ClassVar[tuple[str, ...]] = (
        *DepthMethod.selection_fields,
        "keep_first",
        "keep_last",
    )
    title: ClassVar[str] = "A deeper look"
    citation: ClassVar[str] = """@article{siddiqui2024deeper,
  title = {A deeper look at depth pruning of {LLM}s},
  author = {Siddiqui, Shoaib Ahmed and Dong, Xin and Heinrich, Greg and Breuel, Thomas and
            Kautz, Jan and Krueger, David and Molchanov, Pavlo},
  journal = {arXiv preprint arXiv:2407.16286},
  year = {2024}
}"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in (*STATIC, *ADAPTIVE):
            allowed = ", ".join((*STATIC, *ADAPTIVE))
            raise InputError(f"metric {self.metric!r} is unknown; allowed: {allowed}")
        if self.emulate not in EMULATIONS:
            raise InputError(
                f"emulate {self.emulate!r} is unknown; allowed: {', '.join(EMULATIONS)}"
            )
        if self.emulate != "none" and self.remove != "block":
            raise InputError(f"emulate {self.emulate}, remove {self.remove}: only blocks allowed")
        if self.rank < 1:
            raise InputError(f"rank {self.rank} given; a whole number from 1 allowed")

    @property
    def emulated_rank(self) -> int | None:
        """Rank of what takes a block's place: 0 for a bias, None for nothing."""
        return {"none": None, "mean": 0, "low_rank": self.rank}[self.emulate]

    def rule(self) -> Rule:
        """Return what stays, and what takes the place of what goes."""
        return replace(super().rule(), emulate=self.emulated_rank)

    @property
    def statistics(self) -> tuple[str, ...]:
        """The pass that the metric reads, and that of the maps."""
        metric = "coalitions" if self.metric in ADAPTIVE else "updates"
        return (metric, "emulation") if self.emulate != "none" else (metric,)

    @property
    def statistic_options(self) -> Mapping[str, Mapping[str, Any]]:
        """What is removed, which coalitions are tried, and the rank of the maps."""
        options = {"part": self.remove, "scheme": self.scheme, "draws": 1, "kept": 0.5}
        if self.scheme != "leave_one_out":
            options["draws"] = self.draws
        if self.scheme == "subsets":
            options["kept"] = self.kept
        return {"coalitions": options, "emulation": {"rank": self.emulated_rank}}

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return the influence of all blocks or parts [layers], and the maps if there are any."""
        if self.metric in ADAPTIVE:
            found = inputs.statistics["coalitions"]
            combine = chain_marginals if self.scheme == "chains" else absent_minus_present
            scores = combine(found["present"].numpy(), found[ADAPTIVE[self.metric]].numpy())
        else:
            scores = inputs.statistics["updates"][f"{self.remove}.{self.metric}"].numpy()
        return {self.remove: [scores]} | self._maps(inputs)

    def _maps(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return every block's map by the names in ``EMULATION``."""
        if not self.emulated_rank:
            names = {"mean": EMULATION[0]} if self.emulate == "mean" else {}
        else:
            names = dict(zip(("bias", "a", "b"), EMULATION, strict=True))
        return {
            name: list(inputs.statistics["emulation"][own].double().numpy())
            for own, name in names.items()
        }


METHOD = DeeperLook
