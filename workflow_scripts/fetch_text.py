"""Fetch a text, strip its markup and split it into disjoint parts: articles, or instructions.

A text that is streamed is not fetched: its artefact says where it is and what its files hold.

Parameters: a text's catalogue entry with its ``name``.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prunelib.data import stream
from prunelib.data.instructions import (
    Instruction,
    parse_records,
    read_records,
    split_records,
    write_records,
)
from prunelib.data.parameters import required
from prunelib.data.sources import Source, fetch, parse_source, require_pinned
from prunelib.data.text import (
    FORMATS,
    Article,
    assign_splits,
    check_fractions,
    collect,
    load_rows,
    read_dataset,
    read_jsonl,
    read_plain,
    read_wikipedia,
    write_articles,
)
from prunelib.errors import InputError
from prunelib.provenance.step import StepRequest, run_step


def _source(params: dict[str, Any], step: str, hub_format: str) -> tuple[Source, Path | None]:
    """Return the source, and the local path of one that is not on the hub."""
    source = parse_source(required(params, "source", str, step))
    form = required(params, "format", str, step)
    if form not in FORMATS:
        raise InputError(f"{step}: format {form!r} is unknown; allowed: {', '.join(FORMATS)}")
    if source.kind == "hf":
        if form != hub_format:
            raise InputError(f"{source}: a hub text has the format {hub_format!r}, not {form!r}")
        require_pinned(source)
        return source, None
    path = fetch(source, params.get("sha256"))
    if not path.exists():
        raise InputError(f"text source {path} does not exist")
    return source, path


def read_source(params: dict[str, Any], step: str) -> Iterator[Article]:
    """Fetch the source and return the reader of its format."""
    source, path = _source(params, step, "dataset")
    form, field = params["format"], params.get("text_field", "text")
    if path is not None:
        if form == "wikipedia":
            return read_wikipedia(path)
        if form == "jsonl":
            return read_jsonl(path, field)
        if form == "plain":
            return read_plain(path)
    return read_dataset(
        source.name if path is None else str(path),
        revision=source.revision if path is None else None,
        config=params.get("config"),
        split=params.get("subset", "train"),
        text_field=field,
    )


def read_instructions(params: dict[str, Any], step: str) -> Iterable[Instruction]:
    """Fetch the source and return its records: of a JSONL file, or of a hub dataset."""
    source, path = _source(params, step, "alpaca")
    field = params.get("output_field", "output")
    if path is not None:
        return read_records(path, field)
    rows = load_rows(
        source.name,
        revision=source.revision,
        config=params.get("config"),
        split=params.get("subset", "train"),
    )
    return parse_records(rows, str(source), field)


def describe_stream(params: dict[str, Any], step: str) -> dict[str, Any]:
    """Return the description of a streamed text, which has been read once at its beginning."""
    source, path = _source(params, step, "dataset")
    description = stream.describe(source, path, params)
    if stream.open_documents(description).read() is None:
        raise InputError(f"{source}: the stream holds no document")
    return description


def main(request: StepRequest, out: Path) -> None:
    """Read, clean, split; write articles, instructions or a stream's place, and ``meta.json``."""
    params = request.params
    name = required(params, "name", str, request.step)
    counts: dict[str, Any]
    if params.get("stream"):
        counts = {"stream": True}
        description = describe_stream(params, request.step)
        text = json.dumps(description, indent=2) + "\n"
        (out / stream.FILE).write_text(text, encoding="utf-8")
    elif params.get("format") == "alpaca":
        seed = required(params, "seed", int, request.step)
        where = f"text {name}: validation"
        validation = params.get("validation")
        if isinstance(validation, bool) or not isinstance(validation, int | float):
            raise InputError(f"{where} is {validation!r}; allowed: a number of records, or a share")
        records = read_instructions(params, request.step)
        counts = write_records(out, split_records(records, validation, seed, where))
    else:
        seed = required(params, "seed", int, request.step)
        fractions = required(params, "split", dict, request.step)
        check_fractions(fractions, f"text {name}: split")
        articles = collect(
            read_source(params, request.step), int(params.get("min_characters", 0)), name
        )
        pairs = assign_splits(articles, fractions, seed, f"text {name}: split")
        counts = write_articles(out, pairs)
    meta = {
        "name": name,
        "source": params["source"],
        "sha256": params.get("sha256"),
        "licence": params.get("licence"),
        **counts,
    }
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_step(main)
