"""LLM-Pruner: gradient importance of dependency groups (arXiv 2305.11627)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prunelib.criteria.fold import AGGREGATIONS, Array, aggregate, library_attribution
from prunelib.errors import InputError
from prunelib.methods.base import Method, ScoringInputs, score_members

if TYPE_CHECKING:
    from collections.abc import Callable

    from prunelib.families.base import UnitKind, UnitSlice

# Per criterion the pass, and the reduction of a row or column in it.
CRITERIA = {
    "vector": ("gradients", "sum"),
    "element1": ("gradients", "abs"),
    "element2": ("fisher", "fisher"),
    "mixed": ("fisher", "mixed"),
}
ATTRIBUTIONS = ("owner", "library")


@dataclass(frozen=True, kw_only=True)
class LlmPruner(Method):
    """LLM-Pruner, block-wise or channel-wise.

    Block-wise prunes heads and MLP channels layer by layer; channel-wise (``strategy: channel``)
    the residual stream, whose channel ``j`` has members in every layer, the embedding and the
    head. The pass over the calibration data then covers all of these.

    Attributes:
        criterion: importance of one row or column with weights ``w``, gradients ``g`` of the mean
            loss and diagonal Fisher information ``F`` (section 3.2): ``vector`` is
            ``|sum_k g_k w_k|``, ``element1`` ``sum_k |g_k w_k|``, ``element2``
            ``sum_k w_k^2 F_kk``, ``mixed`` ``sum_k |g_k w_k - 1/2 w_k^2 F_kk|``. A head sums its
            rows or columns; a bias belongs to its row. Norms and embeddings, which are no
            linear maps, are taken element by element by ``vector``, too.
        aggregation: how a unit's members (of a kv group: query, key and value rows, output
            columns) are combined: ``sum``, ``mean``, ``product``, ``max``, or ``last``, the
            importance of the last one executed (output and down projection). A channel of the
            residual stream has too many members for their product to be a number.
        attribution: ``owner`` credits query heads to the kv head that they attend to; ``library``
            to head ``h mod kv heads`` as the public code does, for comparison with it.
    """

    criterion: str = "element1"
    aggregation: str = "sum"
    attribution: str = "owner"

    strategies: ClassVar[tuple[str, ...]] = ("block", "channel")
    title: ClassVar[str] = "LLM-Pruner"
    citation: ClassVar[str] = """@inproceedings{ma2023llmpruner,
  title = {{LLM-Pruner}: On the Structural Pruning of Large Language Models},
  author = {Ma, Xinyin and Fang, Gongfan and Wang, Xinchao},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023}
}"""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("criterion", CRITERIA),
            ("aggregation", AGGREGATIONS),
            ("attribution", ATTRIBUTIONS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(
                    f"method llm_pruner: {name} {value!r} is unknown; allowed: {', '.join(allowed)}"
                )

        if self.strategy == "channel" and self.aggregation == "product":
            raise InputError(
                "method llm_pruner: aggregation 'product' is not of strategy channel; "
                "allowed: sum, mean, max, last"
            )

    @property
    def statistics(self) -> tuple[str, ...]:
        """The one pass that the criterion reads."""
        statistic, _ = CRITERIA[self.criterion]
        return (f"{statistic}_whole" if self.strategy == "channel" else statistic,)

    def scores(self, inputs: ScoringInputs) -> dict[str, list[Array]]:
        """Return the gradient importance of all units."""
        reduction = CRITERIA[self.criterion][1]
        (statistic,) = self.statistics
        tensors = inputs.statistics[statistic]
        # Units of the whole model have members that are no linear maps.
        shapes = inputs.family.shapes(inputs.config) if self.strategy == "channel" else {}

        def is_linear(name: str) -> bool:
            """Whether a parameter, by its full name, is of a linear map."""
            family, weight = inputs.family, f"{name.rpartition('.')[0]}.weight"
            embeddings = (family.embedding, *family.other_embeddings)
            return len(shapes[weight]) > 1 and name not in embeddings

        def member(layer: int | None, part: UnitSlice) -> Array:
            name, how = part.parameter, reduction
            if layer is not None:
                name = f"{layer}.{name}"
            else:
                if reduction == "sum" and not is_linear(name):
                    how = "abs"
                name = name.removeprefix(f"{inputs.family.layer_prefix}.")
            axis = "columns" if part.axis == 1 else "rows"
            scores: Array = tensors[f"{name}.{how}.{axis}"].double().numpy()
            return scores

        def combine(kind: UnitKind, member: Callable[[UnitSlice], Array]) -> Array:
            if self.attribution == "library":
                kind = library_attribution(kind)
            return aggregate(kind, member, self.aggregation)

        return score_members(inputs, self.kinds, member, combine)


METHOD = LlmPruner
