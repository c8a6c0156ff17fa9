"""Token windows: sampled for calibration, packed for recovery, joined for perplexity.

Articles are tokenised one by one without special tokens, so no window crosses an article.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prunelib.data.text import Article
from prunelib.errors import InputError

Tokens = npt.NDArray[np.int64]
JOIN = "\n\n"


def tokenise(articles: Iterable[Article], tokenizer: Any) -> list[Tokens]:
    """Return each article's tokens, without specials, as int64 arrays."""
    encoded = (
        tokenizer(article.text, add_special_tokens=False, verbose=False) for article in articles
    )
    return [np.asarray(item["input_ids"], dtype=np.int64) for item in encoded]


def sample_windows(
    token_lists: Sequence[Tokens], n: int, length: int, seed: int
) -> tuple[Tokens, list[int], list[int]]:
    """Draw windows as LLM-Pruner's loader does: a random document, then a random offset in it.

    A document shorter than ``length`` is rejected, and so is one that was drawn before, as in the
    reference code. Where the set is larger than the number of documents (the reference code would
    never end), a new round over the documents begins, and only an offset drawn before is rejected.

    Args:
        token_lists: the documents, int64 [tokens] each.
        n: windows to draw.
        length: tokens per window.
        seed: of the numpy generator.

    Returns:
        The windows, int64 [n, length]; for each its document's index, and its offset.

    Raises:
        InputError: the documents hold fewer than ``n`` windows that do not overlap.

    Source:
        LLM-Pruner (arXiv:2305.11627), section 4.1 and its public data loader.
    """
    if n < 1 or length < 1:
        raise InputError(
            f"calibration set: {n} windows of {length} tokens; both must be at least 1"
        )
    places = {
        index: len(tokens) - length + 1
        for index, tokens in enumerate(token_lists)
        if len(tokens) >= length
    }
    room = sum(len(token_lists[index]) // length for index in places)
    if room < n:
        raise InputError(
            f"the text is too short for the calibration set: {n} windows of {length} tokens were"
            f" asked for, but only {len(places)} of its {len(token_lists)} articles have {length}"
            f" tokens, which makes {room} windows"
        )
    generator = np.random.default_rng(seed)
    used: set[tuple[int, int]] = set()
    fresh = sorted(places)
    documents: list[int] = []
    offsets: list[int] = []
    while len(documents) < n:
        if not fresh:
            taken = [document for document, _ in used]
            fresh = [index for index in places if taken.count(index) < places[index]]
        document = fresh.pop(int(generator.integers(len(fresh))))
        offset = int(generator.integers(places[document]))
        while (document, offset) in used:
            offset = int(generator.integers(places[document]))
        used.add((document, offset))
        documents.append(document)
        offsets.append(offset)
    windows = [
        token_lists[document][offset : offset + length]
        for document, offset in zip(documents, offsets, strict=True)
    ]
    return np.stack(windows), documents, offsets


def packed_windows(token_lists: Sequence[Tokens], length: int) -> Tokens:
    """Return all non-overlapping windows, int64 [windows, length]; each document's tail is dropped.

    Raises:
        InputError: no document has ``length`` tokens.
    """
    if length < 1:
        raise InputError(f"window length {length}; it must be at least 1")
    rows = [
        tokens[: len(tokens) // length * length].reshape(-1, length)
        for tokens in token_lists
        if len(tokens) >= length
    ]
    if not rows:
        longest = max((len(tokens) for tokens in token_lists), default=0)
        raise InputError(
            f"the text is too short: windows of {length} tokens were asked for, but the longest of"
            f" its {len(token_lists)} articles has {longest}"
        )
    return np.concatenate(rows)


def evaluation_ids(articles: Iterable[Article], tokenizer: Any) -> Tokens:
    """Return the tokens of the joined evaluation text, int64 [tokens].

    The articles are joined with two newlines and tokenised once, so the tokenizer's special tokens
    (BOS) stand once, at the very beginning: the convention of LLM-Pruner's perplexity.
    """
    text = JOIN.join(article.text for article in articles)
    return np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
