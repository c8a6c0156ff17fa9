"""The draft: a model that leaves out some of its own blocks, attentions or MLPs for a while.

Nothing is copied. Draft and model share weights and one key-value cache: the draft reads what the
model has stored of the text, as in SWIFT's code (arXiv 2410.06916; it works on a copy), so that it
needs neither a pass over the prompt nor a cache of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import DynamicCache

from prunelib.checkpoint import family_of_config
from prunelib.errors import InputError
from prunelib.families import modeling_shared
from prunelib.families.base import VIRTUAL, Config, class_title
from prunelib.plan import PARTS
from prunelib.statistics.without import check_unit, without_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunelib.plan import Plan


@dataclass(frozen=True)
class Skipped:
    """The layers that a draft leaves out, as a whole or in part.

    Attributes:
        block: layers left out as a whole.
        attention: layers left out but for their MLP.
        mlp: layers left out but for their attention.
    """

    block: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    def check(self, layers: int) -> None:
        """Refuse what does not fit a model of so many layers.

        Raises:
            InputError: a layer does not exist or is named twice.
        """
        for unit, named in (("block", self.block), *((p, getattr(self, p)) for p in PARTS)):
            wrong = [i for i in named if type(i) is not int or not 0 <= i < layers]
            if wrong or len(set(named)) != len(named):
                raise InputError(
                    f"draft without {unit} of layers {list(named)}; allowed: different ones of "
                    f"0..{layers - 1}"
                )
        twice = set(self.block) & {*self.attention, *self.mlp}
        if twice:
            raise InputError(f"draft: layers {sorted(twice)} are named as blocks and by part")

    @classmethod
    def of_plan(cls, plan: Plan) -> Skipped:
        """Return what a plan of depth pruning removes, as what a draft of the whole model skips.

        Raises:
            InputError: the plan removes or changes something else.
        """
        if plan.units or plan.whole or plan.sharing or plan.merged or plan.emulation:
            raise InputError(
                "draft: the plan does more than remove blocks, attentions or MLPs; allowed: plans "
                "of these alone"
            )
        return cls(plan.removed_blocks, *(tuple(plan.skipped.get(part, ())) for part in PARTS))


def shared_blocks(config: Config) -> Skipped:
    """Return the blocks of a model that share another one's weights, as what a draft skips.

    FlexiGPT's own draft (arXiv 2501.14713): what is left are the blocks that were not pruned.

    Raises:
        InputError: the model has no such blocks.
    """
    entries = config.get(VIRTUAL) or ()
    found = tuple(place for place, entry in enumerate(entries) if "base" in entry)
    if not found:
        raise InputError("draft: no block of this model shares another one's weights")
    return Skipped(found)


class DraftCache(DynamicCache):
    """A cache that draft and model write to, and whose slots may be of different lengths meanwhile.

    Every slot keeps all positions. Sliding windows are in the attention masks as well, and a window
    that has slid could not be taken back.
    """

    def __init__(self) -> None:
        super().__init__()
        # The slot that is asked for the number of positions: one that whoever is running fills.
        self.asked = 0

    @property
    def length(self) -> int:
        """Number of positions in the slot that is asked."""
        return int(super().get_seq_length(self.asked))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys that queries see, and the position of the first."""
        keys, first = super().get_mask_sizes(query_length, self.asked)
        return int(keys), int(first)

    def shorten(self, length: int) -> None:
        """Take back all positions from ``length`` on, in every slot that has them."""
        slots: list[Any] = self.layers
        for slot in slots:
            more = slot.get_seq_length() - length
            if more > 0:
                slot.crop(-more)

    def prefix(self, length: int) -> DraftCache:
        """Return a cache of the first positions; nothing is copied."""
        first = DraftCache()
        slots: list[Any] = self.layers
        for slot in slots:
            part = copy(slot)
            # Slots grow by concatenation, which leaves the tensors that these are views of alone.
            part.keys, part.values = slot.keys[..., :length, :], slot.values[..., :length, :]
            first.layers.append(part)
        return first


class _Skip(nn.Module):
    """Stands in the place of a block that is skipped."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self._pair = pair

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the residual stream as it came."""
        return (hidden_states, None) if self._pair else hidden_states


class Draft:
    """A model and what it leaves out while it drafts.

    Attributes:
        model: in eval mode; outside of ``drafting`` it is what it always was.
        skipped: what is left out.
        cost: weights of layers and head that a draft pass reads over those that a pass of the model
            reads: the ratio of times where reading weights is all that takes time. Weights that
            several layers share are read by each of them.
    """

    def __init__(self, model: PreTrainedModel, skipped: Skipped) -> None:
        """Prepare the draft; nothing is changed yet.

        Args:
            model: of a family of this library.
            skipped: what the draft leaves out.

        Raises:
            InputError: the family is not supported, layers do not exist, a part cannot be left out
                in this architecture, or no attention is left.
        """
        config = model.config.to_dict()
        family = family_of_config(config)
        layers = family.layers(model)
        skipped.check(len(layers))
        self.model, self.skipped = model, skipped
        # Per place: the modules it is one of, its name there, what is there, and what a draft has.
        self._places: list[tuple[Any, str, Any, Any]] = []
        title = class_title(config)
        pair = getattr(modeling_shared, f"Shared{title}ForCausalLM").layers_return_pairs
        for index in skipped.block:
            own = layers._modules
            self._places.append((own, str(index), own[str(index)], _Skip(pair)))
        for part in PARTS:
            named = getattr(skipped, part)
            if named:
                check_unit(family, config, part)
            for index in named:
                self._take_out(layers[index], part, f"layer {index}", family.parts[part][0])
        attention = family.parts["attention"][0]
        whole = _weights_read(model, layers)
        with self._in_place():
            found = (getattr(layer._modules.get(attention), "layer_idx", None) for layer in layers)
            slots = [slot for slot in found if slot is not None]
            if not slots:
                raise InputError("draft: no attention is left; at least one must stay")
            # Of the slots that the draft fills: the cache is asked there for its length.
            self._slot = slots[0]
            self.cost = _weights_read(model, layers) / whole

    def _take_out(self, layer: nn.Module, part: str, where: str, module: str) -> None:
        if module not in layer._modules:
            raise InputError(f"draft: {where} has no {part} to leave out")
        own = dict(layer._modules)
        with without_part(layer, part):
            self._places += [
                (layer._modules, name, own[name], now)
                for name, now in layer._modules.items()
                if now is not own[name]
            ]

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        for modules, name, _, draft in self._places:
            modules[name] = draft
        try:
            yield
        finally:
            for modules, name, own, _ in self._places:
                modules[name] = own

    @contextmanager
    def drafting(self, cache: DraftCache) -> Iterator[None]:
        """Let the model be the draft meanwhile.

        Args:
            cache: that the draft's passes use.
        """
        cache.asked = self._slot
        try:
            with self._in_place():
                yield
        finally:
            cache.asked = 0


def _weights_read(model: PreTrainedModel, layers: nn.ModuleList) -> int:
    """Return the number of weights that one pass reads in layers and head."""
    shared = (m for m in layers.modules() if isinstance(m, modeling_shared.SharedLinear))
    head: Any = model.get_output_embeddings()
    return (
        sum(parameter.numel() for parameter in layers.parameters())
        + sum(int(module.base.weight.numel()) for module in shared)
        + int(head.weight.numel())
    )
