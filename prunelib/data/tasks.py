"""Tasks built from local text: the true continuation, word analogies, and a sentence's rest."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prunelib.data.analogies import Analogy
from prunelib.data.text import Article
from prunelib.errors import InputError

CHOICES = 4
ENDING_WORDS = (12, 24)
CONTEXT_SENTENCES = 3
MIN_CONTEXT_WORDS = 20

# A full stop, then a space and a capital: but not after an initial or a common abbreviation.
_SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b(?:Mr|Dr|St|vs|ca|cf|Jr|No)\.)(?<!\b(?:Mrs|etc)\.)"
    r" (?=[\"“(]?[A-Z0-9])"
)

Item = dict[str, Any]


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph of prose at the ends of its sentences."""
    return [part for part in _SENTENCE_END.split(paragraph) if part]


def _labels(n: int, generator: np.random.Generator) -> list[int]:
    """Return ``n`` labels in random order, each of the four as often as can be."""
    return [int(label) for label in generator.permutation(np.arange(n) % CHOICES)]


def _choices(answer: str, distractors: Sequence[str], label: int) -> list[str]:
    return [*distractors[:label], answer, *distractors[label:]]


def _continuations(articles: Iterable[Article]) -> list[tuple[int, str, str]]:
    """Return (article index, context, next sentence) wherever prose allows; no ending twice."""
    found: list[tuple[int, str, str]] = []
    endings: set[str] = set()
    contexts: set[str] = set()
    for index, article in enumerate(articles):
        for paragraph in article.text.splitlines():
            parts = sentences(paragraph)
            for place in range(1, len(parts)):
                ending = parts[place]
                context = " ".join(parts[max(0, place - CONTEXT_SENTENCES) : place])
                suitable = (
                    ENDING_WORDS[0] <= len(ending.split()) <= ENDING_WORDS[1]
                    and len(context.split()) >= MIN_CONTEXT_WORDS
                    and ending not in endings
                    and context not in contexts
                )
                if suitable:
                    endings.add(ending)
                    contexts.add(context)
                    found.append((index, context, ending))
    return found


def continuation_items(articles: Sequence[Article], n: int, seed: int) -> list[Item]:
    """Build ``n`` items: up to three sentences, and which of four sentences comes next.

    Distractors are sentences of the same kind (length, place inside a paragraph) from elsewhere in
    the same article, so the topic alone does not give the answer away. Labels are balanced, and no
    context or true ending occurs twice.

    Raises:
        InputError: the articles yield fewer than ``n`` items.
    """
    pool = _continuations(articles)
    by_article: dict[int, list[int]] = defaultdict(list)
    for position, (article, _, _) in enumerate(pool):
        by_article[article].append(position)
    # Distractors must not come from the context itself, which holds up to three sentences.
    usable = [
        position
        for position, (article, _, _) in enumerate(pool)
        if len(by_article[article]) >= CHOICES + CONTEXT_SENTENCES
    ]
    if not 1 <= n <= len(usable):
        raise InputError(
            f"continuation task: {n} items were asked for; the evaluation articles yield"
            f" {len(usable)}"
        )
    generator = np.random.default_rng(seed)
    labels = _labels(n, generator)
    chosen = generator.choice(len(usable), size=n, replace=False)
    items: list[Item] = []
    for label, place in zip(labels, chosen, strict=True):
        article, context, ending = pool[usable[int(place)]]
        others = [
            pool[position][2]
            for position in by_article[article]
            if pool[position][2] != ending and pool[position][2] not in context
        ]
        picked = [others[int(i)] for i in generator.choice(len(others), CHOICES - 1, replace=False)]
        endings = _choices(ending, picked, label)
        items.append({"context": context, "endings": endings, "label": label})
    return items


def completion_items(articles: Sequence[Article], n: int, seed: int) -> list[Item]:
    """Build ``n`` items: up to three sentences and half of the next one, and its other half.

    No context and no sentence occurs twice.

    Raises:
        InputError: the articles yield fewer than ``n`` items.
    """
    pool = _continuations(articles)
    if not 1 <= n <= len(pool):
        raise InputError(
            f"completion task: {n} items were asked for; the evaluation articles yield {len(pool)}"
        )
    items: list[Item] = []
    for place in np.random.default_rng(seed).choice(len(pool), size=n, replace=False):
        _, context, sentence = pool[int(place)]
        words = sentence.split()
        half = len(words) // 2
        prompt = " ".join([context, *words[:half]])
        items.append({"prompt": prompt, "reference": " ".join(words[half:])})
    return items


def analogy_items(rows: Sequence[Analogy], n: int, seed: int) -> list[Item]:
    """Build ``n`` items "a is to b as c is to ?" with four choices.

    The three distractors are answers of the same category other than a, b, c and d; categories and
    labels are balanced, and no question occurs twice.

    Raises:
        InputError: there are fewer than ``n`` analogies, or a category is too small.
    """
    if not 1 <= n <= len(rows):
        raise InputError(f"analogies task: {n} items were asked for; the file holds {len(rows)}")
    generator = np.random.default_rng(seed)
    labels = _labels(n, generator)
    chosen = _balanced(rows, n, generator)
    answers: dict[str, list[str]] = {}
    for row in rows:
        answers.setdefault(row["category"], []).append(row["d"])
    answers = {category: sorted(set(words)) for category, words in answers.items()}
    items: list[Item] = []
    for label, row in zip(labels, chosen, strict=True):
        others = [
            word
            for word in answers[row["category"]]
            if word not in (row["a"], row["b"], row["c"], row["d"])
        ]
        if len(others) < CHOICES - 1:
            raise InputError(f"analogies: category {row['category']!r} has too few other answers")
        picked = [others[int(i)] for i in generator.choice(len(others), CHOICES - 1, replace=False)]
        question = f"{row['a']} is to {row['b']} as {row['c']} is to"
        choices = _choices(row["d"], picked, label)
        items.append({"question": question, "choices": choices, "label": label})
    return items


def _balanced(rows: Sequence[Analogy], n: int, generator: np.random.Generator) -> list[Analogy]:
    """Draw ``n`` different analogies, one category after the other in turn."""
    queues: dict[str, list[Analogy]] = {}
    for row in {tuple(row.values()): row for row in rows}.values():
        queues.setdefault(row["category"], []).append(row)
    shuffled = [
        [queue[int(i)] for i in generator.permutation(len(queue))] for queue in queues.values()
    ]
    order = [shuffled[int(i)] for i in generator.permutation(len(shuffled))]
    rounds = range(max(len(queue) for queue in order))
    drawn = [queue[turn] for turn in rounds for queue in order if turn < len(queue)]
    if len(drawn) < n:
        raise InputError(f"analogies task: {n} items were asked for; there are {len(drawn)}")
    return drawn[:n]


def write_items(path: Path, items: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line."""
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
