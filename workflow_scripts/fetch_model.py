"""Fetch a model and write it as a plain checkpoint.

Parameters: a model's catalogue entry with its ``name``, and its ``geometry`` as a mapping.
"""

import json
from pathlib import Path

from prunelib.data.models import (
    check_geometry,
    count_parameters,
    geometry_of,
    hub_patterns,
    make_checkpoint,
)
from prunelib.data.parameters import required
from prunelib.data.sources import fetch, parse_source
from prunelib.errors import InputError
from prunelib.provenance.step import StepRequest, run_step


def main(request: StepRequest, out: Path) -> None:
    """Fetch, convert, hold it against the catalogue, and write ``meta.json``."""
    params = request.params
    name = required(params, "name", str, request.step)
    source = parse_source(required(params, "source", str, request.step))
    geometry = required(params, "geometry", dict, request.step)
    weights = params.get("weights", "safetensors")
    path = fetch(source, params.get("sha256"), patterns=hub_patterns(weights))
    make_checkpoint(path, out, weights=weights)
    check_geometry(geometry, geometry_of(out), name)
    parameters = count_parameters(out)
    if params.get("parameters", parameters) != parameters:
        raise InputError(
            f"model {name}: it has {parameters:,} parameters, the catalogue says"
            f" {params['parameters']:,}"
        )
    meta = {
        "name": name,
        "source": str(source),
        "sha256": params.get("sha256"),
        "licence": params.get("licence"),
        "parameters": parameters,
    }
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_step(main)
