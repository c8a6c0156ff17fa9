"""The state of an unfinished recovery run: written atomically, verified before it is used.

A state is a directory ``step-00000004`` with ``state.safetensors`` (adapter parameters, Adam's
moments, random generators), ``loss.jsonl``, ``place.json`` where the data is a stream, and
``state.json`` (what run it belongs to, the step, and the sha256 of the others). It appears under
its name by one rename of a complete directory, so a reader finds all of it or nothing. Nothing in
it is executable.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

TENSORS = "state.safetensors"
LOSSES = "loss.jsonl"
PLACE = "place.json"
INDEX = "state.json"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class TrainingState:
    """What a run needs to go on after ``step`` finished optimiser steps.

    ``step`` is also the position of the schedule and of the data order, which are functions of it,
    except in a stream: ``place`` is JSON that says where its next token is read.
    """

    step: int
    tensors: Mapping[str, torch.Tensor]
    losses: Sequence[Mapping[str, Any]]
    place: Mapping[str, Any] | None = None


def jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return ``rows`` as JSON lines; floats keep every bit (shortest form that round-trips)."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or a directory to the disk: a rename may else survive what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_state(directory: Path, state: TrainingState, identity: Mapping[str, Any]) -> Path:
    """Write ``state`` under ``directory`` and remove older ones; return where it is.

    Args:
        directory: holds the states of one run; made if it is missing.
        state: step, tensors, loss log and place.
        identity: what the run is (recipe, seed, data, model); compared on loading.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step-{state.step:08d}"
    temporary = directory / f"{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file({name: t.contiguous() for name, t in state.tensors.items()}, temporary / TENSORS)
    (temporary / LOSSES).write_text(jsonl(state.losses), encoding="utf-8")
    names = [TENSORS, LOSSES]
    if state.place is not None:
        (temporary / PLACE).write_text(json.dumps(state.place) + "\n", encoding="utf-8")
        names.append(PLACE)
    index = {
        "identity": dict(identity),
        "step": state.step,
        "sha256": {name: _sha256(temporary / name) for name in names},
    }
    (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    # A state of the same step is there only if it was refused on loading.
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(directory)
    for path in directory.glob("step-*"):
        if path != final:
            shutil.rmtree(path, ignore_errors=True)
    return final


def load_state(directory: Path, identity: Mapping[str, Any]) -> TrainingState | None:
    """Return the newest trustworthy state under ``directory``, or None to start from step 0.

    A state that is torn, changed or of another run is named in the log and left out.
    """
    if not directory.is_dir():
        return None
    named = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    for path in sorted(named, reverse=True):
        try:
            return _read(path, identity)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("state %s is not used: %s", path, error)
    return None


def _read(path: Path, identity: Mapping[str, Any]) -> TrainingState:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    # Through JSON, as the stored one went: tuples become lists.
    wanted = json.loads(json.dumps(dict(identity)))
    found = index["identity"]
    if found != wanted:
        keys = sorted(key for key in wanted | found if wanted.get(key) != found.get(key))
        raise ValueError(f"it belongs to another run (different: {', '.join(keys)})")
    for name in {TENSORS, LOSSES} | index["sha256"].keys():
        if _sha256(path / name) != index["sha256"][name]:
            raise ValueError(f"{name} does not have the sha256 that {INDEX} states")
    losses = [json.loads(line) for line in (path / LOSSES).read_text("utf-8").splitlines()]
    if not index["step"] == len(losses) == int(path.name.removeprefix("step-")):
        raise ValueError("its step is not the length of its loss log")
    try:
        tensors = load_file(path / TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{TENSORS} cannot be read: {error}") from error
    place = None
    if PLACE in index["sha256"]:
        place = json.loads((path / PLACE).read_text(encoding="utf-8"))
    return TrainingState(step=index["step"], tensors=tensors, losses=losses, place=place)
