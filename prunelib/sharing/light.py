"""The light form of a checkpoint: its plan, from which the same bytes are made again."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

from prunelib.errors import IntegrityError
from prunelib.experiment.graph import Node
from prunelib.plan import FILE_NAME as PLAN
from prunelib.plan import Plan
from prunelib.provenance import artefact
from prunelib.sharing.repository import record_of


def rebuild(node: Node, out: Path) -> None:
    """Write a pruned checkpoint into ``out`` from its plan and the unpruned model.

    Surgery copies weights and computes none, so the files are those that were published, bit by
    bit; ``provenance.json``, which is copied last, says so or the rebuild is refused. Checkpoints
    whose layers share weights hold computed adapters and are published whole.

    Raises:
        IntegrityError: plan or model are not what their provenance says, or a file differs from
            the published one (other versions of the packages write other bytes).
    """
    from prunelib.checkpoint import prune_checkpoint

    record = record_of(node.directory)
    artefact.verify(record, [PLAN])
    source = node.inputs["model"].directory
    _verify_once(source.resolve())
    prune_checkpoint(source, Plan.load(record), out)
    shutil.copyfile(record / artefact.RECORD, out / artefact.RECORD)
    try:
        artefact.verify(out)
    except IntegrityError as error:
        packages = artefact.read(record).get("packages", {})
        made_with = ", ".join(f"{name} {version}" for name, version in packages.items())
        raise IntegrityError(f"rebuilt from its plan, {error}; made with {made_with}") from error


@cache
def _verify_once(model: Path) -> None:
    # One model serves many checkpoints.
    artefact.verify(model)
