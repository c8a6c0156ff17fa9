"""Fetch word analogies.

Parameters: the catalogue entry of a text with the format ``analogies``, and its ``name``.
"""

import json
from pathlib import Path

from prunelib.data.analogies import parse_analogies, write_analogies
from prunelib.data.parameters import required
from prunelib.data.sources import fetch, parse_source
from prunelib.errors import InputError
from prunelib.provenance.step import StepRequest, run_step


def main(request: StepRequest, out: Path) -> None:
    """Fetch, parse; write ``analogies.jsonl`` and ``meta.json``."""
    params = request.params
    name = required(params, "name", str, request.step)
    source = parse_source(required(params, "source", str, request.step))
    path = fetch(source, params.get("sha256"))
    if not path.is_file():
        raise InputError(f"analogies source {path} is not a file")
    with path.open(encoding="utf-8") as file:
        rows = parse_analogies(file, f"{name} ({path.name})")
    write_analogies(out, rows)
    meta = {
        "name": name,
        "source": str(source),
        "sha256": params.get("sha256"),
        "licence": params.get("licence"),
        "analogies": len(rows),
        "categories": len({row["category"] for row in rows}),
    }
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_step(main)
