"""Fetch a text, strip its markup and split its articles into disjoint parts.

Parameters: a text's catalogue entry with its ``name``.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunelib.data.parameters import required
from prunelib.data.sources import fetch, parse_source, require_pinned
from prunelib.data.text import (
    FORMATS,
    Article,
    assign_splits,
    check_fractions,
    collect,
    read_dataset,
    read_jsonl,
    read_plain,
    read_wikipedia,
    write_articles,
)
from prunelib.errors import InputError
from prunelib.provenance.step import StepRequest, run_step


def read_source(params: dict[str, Any], step: str) -> Iterator[Article]:
    """Fetch the source and return the reader of its format."""
    source = parse_source(required(params, "source", str, step))
    form = required(params, "format", str, step)
    if form not in FORMATS:
        raise InputError(f"{step}: format {form!r} is unknown; allowed: {', '.join(FORMATS)}")
    field = params.get("text_field", "text")
    if source.kind == "hf":
        if form != "dataset":
            raise InputError(f"{source}: a hub text has the format 'dataset', not {form!r}")
        require_pinned(source)
        name, revision = source.name, source.revision
    else:
        path = fetch(source, params.get("sha256"))
        if not path.exists():
            raise InputError(f"text source {path} does not exist")
        if form == "wikipedia":
            return read_wikipedia(path)
        if form == "jsonl":
            return read_jsonl(path, field)
        if form == "plain":
            return read_plain(path)
        name, revision = str(path), None
    return read_dataset(
        name,
        revision=revision,
        config=params.get("config"),
        split=params.get("subset", "train"),
        text_field=field,
    )


def main(request: StepRequest, out: Path) -> None:
    """Read, clean, split; write ``articles.jsonl`` and ``meta.json``."""
    params = request.params
    name = required(params, "name", str, request.step)
    fractions = required(params, "split", dict, request.step)
    seed = required(params, "seed", int, request.step)
    check_fractions(fractions, f"text {name}: split")
    articles = collect(
        read_source(params, request.step), int(params.get("min_characters", 0)), name
    )
    counts = write_articles(out, assign_splits(articles, fractions, seed, f"text {name}: split"))
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
