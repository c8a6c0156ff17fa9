"""Instruction data in Alpaca's format: records, their split, and prompts as tokens.

A record is an instruction, an input (often empty) and an output. The recovery and validation parts
share none. The prompt's wording is Stanford Alpaca's (Taori et al. 2023), which LLM-Pruner's
recovery uses; what its public script does to a record is done here: the whole text is tokenised at
once with the tokenizer's own special tokens, cut at the window length, closed with EOS where it was
not cut, and as many of its tokens as the prompt alone has are no targets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prunelib.errors import InputError, IntegrityError

FILE = "instructions.jsonl"
PARTS = ("recovery", "validation")
# Records that the tokenizer gets at once: enough to keep its threads busy.
_CHUNK = 1024

_PREAMBLE = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."


@dataclass(frozen=True)
class Instruction:
    """One record: what is asked, what it is asked about (may be empty), and the answer."""

    id: int
    instruction: str
    input: str
    output: str


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenised records, one behind the other.

    Attributes:
        tokens: token ids of all records, int64 [tokens].
        starts: record ``i`` is ``tokens[starts[i]:starts[i + 1]]``, int64 [records + 1].
        prompts: leading tokens of each record that are no targets, int64 [records].
        dropped: records left out because their prompt alone fills the window.
    """

    tokens: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    prompts: npt.NDArray[np.int64]
    dropped: int


def prompt(instruction: str, given: str = "") -> str:
    """Return Alpaca's prompt, in one of two wordings: with an input, or without."""
    if given:
        return (
            f"{_PREAMBLE}, paired with an input that provides further context. {_REQUEST}\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
        )
    return f"{_PREAMBLE}. {_REQUEST}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def parse_records(
    rows: Iterable[Any], where: str, output_field: str = "output"
) -> Iterator[Instruction]:
    """Return the records of ``rows``: objects with instruction, output and perhaps input.

    Args:
        rows: the objects.
        where: names the source in an error.
        output_field: key of the answer (``response`` in LaMini-instruction).

    Raises:
        InputError: a row is not such an object; names its number, from 1.
    """
    for number, row in enumerate(rows):
        found = row if isinstance(row, Mapping) else {}
        values: list[str] = []
        for key in ("instruction", output_field):
            if not isinstance(value := found.get(key), str):
                raise InputError(f"{where}, record {number + 1}: {key!r} is missing or no string")
            values.append(value)
        # Absent or null where there is nothing to ask about.
        given = found.get("input") or ""
        if not isinstance(given, str):
            raise InputError(f"{where}, record {number + 1}: 'input' is no string")
        yield Instruction(number, values[0], given, values[1])


def read_records(path: Path, output_field: str = "output") -> Iterator[Instruction]:
    """Read a file with one record per line.

    Raises:
        InputError: a line is not JSON, or not a record.
    """

    def rows() -> Iterator[Any]:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                if not line.strip():
                    continue
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path} line {number + 1}: not a JSON object") from error

    return parse_records(rows(), str(path), output_field)


def split_records(
    records: Iterable[Instruction], validation: float, seed: int, where: str
) -> list[tuple[Instruction, str]]:
    """Set records aside for validation; a record that is there several times is kept once.

    Records are ranked by a hash of the seed and their content, so the result does not depend on the
    order they come in.

    Args:
        records: the records.
        validation: how many to set aside (a whole number from 1), or which share (below 1).
        seed: changes the ranking.
        where: names the setting in an error.

    Returns:
        The kept records in the order given, each with its part.

    Raises:
        InputError: nothing would be left for one of the parts.
    """
    first: dict[str, Instruction] = {}
    for record in records:
        content = json.dumps([seed, record.instruction, record.input, record.output])
        first.setdefault(hashlib.sha256(content.encode()).hexdigest(), record)
    count = int(validation) if validation >= 1 else int(len(first) * Fraction(str(validation)))
    if not 0 < count < len(first) or (validation >= 1 and count != validation):
        raise InputError(
            f"{where}: {validation} of {len(first)} different records; both parts need at least one"
        )
    chosen = set(sorted(first)[:count])
    return [(record, PARTS[digest in chosen]) for digest, record in first.items()]


def write_records(
    directory: Path, records: Sequence[tuple[Instruction, str]]
) -> dict[str, dict[str, int]]:
    """Write ``instructions.jsonl``; return the number of records by part."""
    with (directory / FILE).open("w", encoding="utf-8") as file:
        for record, part in records:
            file.write(json.dumps({**asdict(record), "split": part}, ensure_ascii=False) + "\n")
    return {"records": {part: sum(p == part for _, p in records) for part in PARTS}}


def load_records(directory: Path, part: str) -> list[Instruction]:
    """Return one part of an instruction text's artefact, in file order.

    Raises:
        InputError: the part is unknown or empty.
        IntegrityError: the file is missing or not JSON lines.
    """
    if part not in PARTS:
        raise InputError(f"unknown part {part!r}; allowed: {', '.join(PARTS)}")
    path = directory / FILE
    chosen = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if row.pop("split") == part:
                    chosen.append(Instruction(**row))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} cannot be read: {error!r}") from error
    if not chosen:
        raise InputError(f"{path} has no record in the part {part!r}")
    return chosen


def encode(records: Sequence[Instruction], tokenizer: Any, length: int) -> Encoded:
    """Tokenise records for training on their outputs.

    Args:
        records: the records.
        tokenizer: of the model that is trained; must have an EOS token.
        length: longer texts are cut off after so many tokens, specials included.

    Raises:
        InputError: the tokenizer has no EOS token, or no record has an output within ``length``.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("instruction data: the tokenizer has no EOS token to end an answer with")
    kept: list[npt.NDArray[np.int64]] = []
    prompts: list[int] = []
    for start in range(0, len(records), _CHUNK):
        part = records[start : start + _CHUNK]
        heads = [prompt(record.instruction, record.input) for record in part]
        texts = [head + record.output for head, record in zip(heads, part, strict=True)]
        asked, whole = (tokenizer(x, verbose=False)["input_ids"] for x in (heads, texts))
        for head, full in zip(asked, whole, strict=True):
            # Some tokenizers close every text by themselves.
            masked = len(head) - (head[-1] == eos)
            ids = full[:length]
            if ids[-1] != eos and len(ids) < length:
                ids = [*ids, eos]
            if masked < len(ids):
                kept.append(np.asarray(ids, dtype=np.int64))
                prompts.append(masked)
    if not kept:
        raise InputError(
            f"instruction data: none of {len(records)} prompts is shorter than {length} tokens"
        )
    return Encoded(
        tokens=np.concatenate(kept),
        starts=np.cumsum([0, *map(len, kept)], dtype=np.int64),
        prompts=np.asarray(prompts, dtype=np.int64),
        dropped=len(records) - len(kept),
    )
