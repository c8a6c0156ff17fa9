"""Word analogies in the format of word2vec's ``questions-words.txt``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from prunelib.errors import InputError, IntegrityError

KEYS = ("category", "a", "b", "c", "d")
Analogy = dict[str, str]


def parse_analogies(lines: Iterable[str], where: str) -> list[Analogy]:
    """Return the analogies of a file: ``: category`` lines, then lines ``a b c d``.

    Raises:
        InputError: a line is neither, or comes before the first category.
    """
    category = ""
    rows: list[Analogy] = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        if words[0] == ":" and len(words) == 2:
            category = words[1]
        elif category and len(words) == 4:
            rows.append(dict(zip(KEYS, (category, *words), strict=True)))
        else:
            raise InputError(
                f"{where} line {number}: expected ': category' or four words: {line!r}"
            )
    if not rows:
        raise InputError(f"{where} holds no analogy")
    return rows


def write_analogies(directory: Path, rows: Iterable[Analogy]) -> None:
    """Write ``analogies.jsonl``."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (directory / "analogies.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_analogies(directory: Path) -> list[Analogy]:
    """Read an analogies artefact.

    Raises:
        IntegrityError: the file is missing or not what ``write_analogies`` writes.
    """
    path = directory / "analogies.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [{key: str(row[key]) for key in KEYS} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} cannot be read: {error!r}") from error
