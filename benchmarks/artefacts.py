"""What the benchmark scripts take from earlier runs of the workflow."""

from __future__ import annotations

from pathlib import Path

from prunelib.errors import InputError


def newest_artefact(step: str) -> Path:
    """Return the artefact of a step under results/ that was written last."""
    found = list(Path("results", step).glob("**/provenance.json"))
    if not found:
        raise InputError(f"no artefact under results/{step}; name a directory instead")
    return max(found, key=lambda path: path.stat().st_mtime).parent
