"""Decoding with drafts from the model itself; the text is that of the model alone.

Greedily, each token is the model's own choice; with a temperature, each is distributed as the
model's own would be (Leviathan et al., arXiv 2211.17192; Chen et al., 2302.01318).

A round begins with one token that is not in the cache yet. The draft reads it and goes on by
itself; its entries are taken out of the cache again; the model reads that token and all draft
tokens in one pass, accepts the first few of them, and adds one token of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prunelib.checkpoint import family_of_config
from prunelib.errors import InputError
from prunelib.speculation.arithmetic import verification
from prunelib.speculation.draft import Draft, DraftCache
from prunelib.speculation.swift import Search

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DecodingSettings:
    """How tokens are drafted and chosen.

    Attributes:
        new_tokens: how many tokens at most.
        draft_length: draft tokens per round at most; fewer where fewer are wanted.
        threshold: the draft ends behind a token to which it gives less probability than this
            (SWIFT, arXiv 2410.06916: 0.8 with up to 25 tokens); with 0 it never does. The token
            itself is still verified, so that no choice among drawn tokens is made.
        temperature: of the sampling; 0 decodes greedily.
    """

    new_tokens: int
    draft_length: int = 4
    threshold: float = 0.0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        for name in ("new_tokens", "draft_length"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"decoding: {name} is {value!r}; allowed: at least 1")
        if not 0 <= self.threshold <= 1:
            raise InputError(f"decoding: threshold is {self.threshold!r}; allowed: 0 to 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"decoding: temperature is {self.temperature!r}; allowed: from 0")


@dataclass(frozen=True)
class Decoded:
    """What was decoded, and at what expense.

    Attributes:
        tokens: the new token ids, an end-of-text token included.
        drafted: draft tokens, each the work of one draft pass.
        accepted: draft tokens that are part of the text.
        judged: draft tokens accepted, or rejected themselves and not for what is in front of them.
        passes: passes of the model, without the one over the prompt.
        searches: draft passes of a search (``swift``).
        draft_work: of the draft tokens' passes, in passes of the model: the sum of ``Draft.cost``.
        search_work: the same of a search's passes; each is over many tokens, which costs one pass
            where reading weights is all that takes time.
    """

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    judged: int
    passes: int
    searches: int
    draft_work: float = 0.0
    search_work: float = 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted of judged tokens: an estimate of 2211.17192's alpha; NaN without drafts."""
        return self.accepted / self.judged if self.judged else float("nan")

    @property
    def accepted_share(self) -> float:
        """Accepted of drafted tokens; NaN without drafts."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def tokens_per_pass(self) -> float:
        """New tokens, but for the one that the prompt's pass gives, per pass; NaN without any."""
        return (len(self.tokens) - 1) / self.passes if self.passes else float("nan")


class _Chooser:
    """Draws draft tokens and verifies them, greedily or at a temperature."""

    def __init__(self, settings: DecodingSettings, generator: torch.Generator | None) -> None:
        self.greedy = settings.temperature == 0
        self.temperature = settings.temperature
        self.generator = generator

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return fp64 probabilities of logits [..., vocabulary]."""
        return torch.softmax(logits.double() / (1 if self.greedy else self.temperature), -1)

    def draw(self, probabilities: Tensor) -> int:
        """Return an index of [choices]."""
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def first(self, logits: Tensor) -> int:
        """Return the token behind logits [vocabulary]."""
        return int(logits.argmax()) if self.greedy else self.draw(self.probabilities(logits))

    def verify(self, logits: Tensor, drafted: list[int], q: list[Tensor]) -> tuple[int, int]:
        """Return how many draft tokens are accepted, and the model's own token behind them.

        Args:
            logits: [drafted + 1, vocabulary], the model's.
            drafted: draft tokens.
            q: per draft token, the probabilities that it was drawn from; not used greedily.
        """
        if self.greedy:
            own = logits.argmax(-1).tolist()
            wrong = (i for i, token in enumerate(drafted) if token != own[i])
            accepted = next(wrong, len(drafted))
            return accepted, own[accepted]
        p = self.probabilities(logits)
        behind = torch.tensor(drafted, dtype=torch.int64, device=p.device)
        many, following = verification(p, torch.stack(q) if q else p[:0], behind)
        accepted = self.draw(many)
        return accepted, self.draw(following[accepted])


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    ids: Tensor,
    draft: Draft | Search | None,
    settings: DecodingSettings,
    *,
    eos: Collection[int] | None = None,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Continue a text with drafts from the model itself.

    Args:
        model: in eval mode; it is what it was when this returns.
        ids: int64 [1, length], the prompt; at least one token.
        draft: of this model; a search for one, which goes on with every text that it is given; or
            None for plain decoding, one pass per token.
        settings: how many tokens, and how they are drafted and chosen.
        eos: token ids that end the text; by default those of the model's ``generation_config``.
        generator: of random numbers, on the model's device; not used greedily.

    Raises:
        InputError: not one prompt, too long a text for the model's positions, a model in training
            mode, or a draft of another model.
    """
    _check(model, ids, draft, settings)
    ends = _ends(model) if eos is None else frozenset(eos)
    choose, cache = _Chooser(settings, generator), DraftCache()
    prompt = ids.shape[1]
    tokens = [choose.first(_prompt_logits(model, ids, cache))]
    drafted = accepted = judged = passes = searches = 0
    draft_work = search_work = 0.0
    while tokens[-1] not in ends and len(tokens) < settings.new_tokens:
        if isinstance(draft, Search) and draft.wants(len(tokens)):
            search_work += draft.step(ids.new_tensor([tokens]), cache.prefix(prompt))
            searches += 1
        used = draft.draft if isinstance(draft, Search) else draft
        many = min(settings.draft_length, settings.new_tokens - len(tokens) - 1)
        guesses: list[int] = []
        q: list[Tensor] = []
        if used is not None:
            with used.drafting(cache):
                while len(guesses) < many and not ends & {*guesses[-1:]}:
                    last = ids.new_tensor([(tokens + guesses)[-1:]])
                    logits = model(input_ids=last, past_key_values=cache, use_cache=True).logits[
                        0, -1
                    ]
                    guess, probabilities, sure = _guess(choose, logits, settings.threshold)
                    guesses.append(guess)
                    draft_work += used.cost
                    q.append(probabilities)
                    if not sure:
                        break
        length = prompt + len(tokens) - 1
        cache.shorten(length)
        read = ids.new_tensor([[tokens[-1], *guesses]])
        logits = model(input_ids=read, past_key_values=cache, use_cache=True).logits[0]
        right, own = choose.verify(logits, guesses, q)
        cache.shorten(length + 1 + right)
        passes, drafted, accepted = passes + 1, drafted + len(guesses), accepted + right
        judged += min(right + 1, len(guesses))
        tokens += guesses[:right]
        # Behind an end-of-text token there is nothing to add.
        if tokens[-1] not in ends:
            tokens.append(own)
    return Decoded(
        tuple(tokens), drafted, accepted, judged, passes, searches, draft_work, search_work
    )


def _guess(choose: _Chooser, logits: Tensor, threshold: float) -> tuple[int, Tensor, bool]:
    """Return a draft token, what it was drawn from, and whether the draft may go on behind it."""
    if choose.greedy and not threshold:
        return int(logits.argmax()), logits, True
    probabilities = choose.probabilities(logits)
    token = int(logits.argmax()) if choose.greedy else choose.draw(probabilities)
    return token, probabilities, bool(probabilities[token] >= threshold)


def _prompt_logits(model: PreTrainedModel, ids: Tensor, cache: DraftCache) -> Tensor:
    """Fill the cache with the prompt; return the logits [vocabulary] behind it."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if known else {}
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, **last).logits[
        0, -1
    ]
    return logits


def _ends(model: PreTrainedModel) -> frozenset[int]:
    """Return the end-of-text tokens that ``generate`` would stop at."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset(own if isinstance(own, list) else [] if own is None else [own])


def _check(
    model: PreTrainedModel, ids: Tensor, draft: Draft | Search | None, settings: DecodingSettings
) -> None:
    if ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1] or ids.dtype != torch.int64:
        raise InputError(
            f"decoding: a prompt {list(ids.shape)} of {ids.dtype} given; allowed: int64 [1, length]"
        )
    if model.training:
        raise InputError("decoding: the model is in training mode; allowed: eval mode")
    config = model.config.to_dict()
    positions = family_of_config(config).dimensions(config).positions
    length = ids.shape[1] + settings.new_tokens
    if positions is not None and length > positions:
        raise InputError(
            f"decoding: {length} tokens asked for; the model has {positions} positions"
        )
    if draft is not None and draft.model is not model:
        raise InputError("decoding: the draft is of another model")
