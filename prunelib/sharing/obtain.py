"""Obtaining: what an experiment needs of what others have published.

Metrics come with git. Checkpoints and adapters are fetched into DVC's cache, or made again from
their plans, beside their final place, and take it by one rename when their sha256 are right.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prunelib.errors import IntegrityError, PrunelibError
from prunelib.experiment.graph import Node
from prunelib.provenance import artefact
from prunelib.sharing.repository import (
    awaited,
    in_words,
    is_shared,
    pointer_of,
    record_of,
    set_merge_driver,
    size_of,
)
from prunelib.sharing.store import Store

Say = Callable[[str], None]
_SPARE_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class Wanted:
    """What stands between this clone and a finished experiment.

    Attributes:
        here: steps whose artefacts are here, or need not be.
        pull: shared by DVC.
        rebuild: shared as plans.
        models: unpruned models that rebuilding needs and that are not here.
        compute: steps that nobody has shared.
    """

    here: tuple[Node, ...]
    pull: tuple[Node, ...]
    rebuild: tuple[Node, ...]
    models: tuple[Node, ...]
    compute: tuple[Node, ...]


def survey(nodes: Iterable[Node], *, everything: bool) -> Wanted:
    """Find what the workflow would miss, and who has it.

    Going up from the rows, what is here or shared ends the search: an intermediate result is
    wanted only if something that has to be computed waits for it.

    Args:
        nodes: the steps of the rows.
        everything: want checkpoints and adapters too that nothing waits for.
    """
    nodes = list(nodes)
    terminal = nodes if everything else awaited(nodes)
    found: dict[str, dict[str, Node]] = {
        name: {} for name in ("here", "pull", "rebuild", "models", "compute")
    }
    found["here"] = {node.key: node for node in nodes}
    waiting = list(terminal)
    seen: set[str] = set()
    while waiting:
        node = waiting.pop()
        if node.key in seen:
            continue
        seen.add(node.key)
        if artefact.is_valid(node.directory, node.key):
            continue
        found["here"].pop(node.key, None)
        if not is_shared(node):
            found["compute"][node.key] = node
            waiting.extend(node.inputs.values())
        elif pointer_of(node.directory).is_file():
            found["pull"][node.key] = node
        else:
            found["rebuild"][node.key] = node
            model = node.inputs["model"]
            if not artefact.is_valid(model.directory, model.key):
                found["models"][model.key] = model
    for key in found["models"]:
        found["compute"].pop(key, None)
    return Wanted(**{name: tuple(those.values()) for name, those in found.items()})


def obtain(wanted: Wanted, *, remote: str | None, make: Callable[[Node], None], say: Say) -> int:
    """Get what is shared; the sharing lock is held by the caller.

    One artefact that cannot be had does not stop the others.

    Args:
        wanted: see ``survey``.
        remote: name of the remote, None for the default one.
        make: makes the artefact of an unpruned model, see ``Wanted.models``.
        say: is told each step.

    Returns:
        How many artefacts could not be obtained.

    Raises:
        InputError: there is no such remote.
        PrunelibError: the disk has too little room.
    """
    set_merge_driver()
    failed = 0
    if wanted.pull:
        failed += _pull(Store(remote), wanted.pull, say)
    if wanted.rebuild:
        check_room({wanted.rebuild[0].directory: sum(map(size_of, wanted.rebuild))})
    for model in wanted.models:
        say(f"fetching  {model.directory}, which checkpoints are made from")
        try:
            make(model)
        except PrunelibError as error:
            say(f"error     {model.directory}: {error}")
    for node in wanted.rebuild:
        failed += _attempt(node, partial(_rebuild, node), "rebuilt", say)
    return failed


def _rebuild(node: Node, out: Path) -> None:
    from prunelib.sharing.light import rebuild

    rebuild(node, out)


def _pull(store: Store, nodes: Iterable[Node], say: Say) -> int:
    nodes = list(nodes)
    pointers = {node.key: pointer_of(node.directory) for node in nodes}
    absent = [node for node in nodes if not store.is_whole(pointers[node.key])]
    check_room(
        {
            nodes[0].directory: sum(map(size_of, nodes)),
            store.cached("00"): sum(map(size_of, absent)),
        }
    )
    complaint = ""
    if absent:
        say(
            f"fetching  {len(absent)} directories from {store.remote}, "
            f"{in_words(sum(map(size_of, absent)))}"
        )
        complaint = store.fetch([pointers[node.key] for node in absent])
    whole = [node for node in nodes if store.is_whole(pointers[node.key])]
    failed = sum(_attempt(node, partial(_export, store, node), "got", say) for node in whole)
    for node in nodes:
        if node not in whole:
            full = " (no space left on device)" if "No space left" in complaint else ""
            say(f"error     {node.directory}: {store.why_absent(pointers[node.key])}{full}")
            failed += 1
    return failed


def _export(store: Store, node: Node, out: Path) -> None:
    """Copy an artefact from the cache and check it; what is damaged leaves the cache."""
    pointer = pointer_of(node.directory)
    store.copy(pointer, out)
    record = record_of(node.directory) / artefact.RECORD
    mine = out / artefact.RECORD
    if not mine.is_file() or mine.read_bytes() != record.read_bytes():
        store.forget(pointer, artefact.RECORD)
        raise IntegrityError(f"{artefact.RECORD} is not the one that git has in {record.parent}")
    for name in artefact.read(out)["files"]:
        try:
            artefact.verify(out, [name])
        except IntegrityError as error:
            store.forget(pointer, name)
            text = str(error).removeprefix(f"{out}/")
            raise IntegrityError(f"{text}; removed from DVC's cache, run again") from error


def _attempt(node: Node, fill: Callable[[Path], None], done: str, say: Say) -> int:
    try:
        artefact.adopt(node.directory, node.key, fill)
    except PrunelibError as error:
        say(f"error     {node.directory}: {error}")
        return 1
    say(f"{done:9} {node.directory}")
    return 0


def check_room(needs: Mapping[Path, int]) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        needs: path, which need not exist yet, to the bytes that will be written there.

    Raises:
        PrunelibError: names place, bytes needed and bytes free.
    """
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for path, size in needs.items():
        place = next(p for p in (path, *path.absolute().parents) if p.is_dir())
        device = place.stat().st_dev
        places[device] = place
        needed[device] = needed.get(device, 0) + size
    for device, place in places.items():
        free = shutil.disk_usage(place).free
        if needed[device] + _SPARE_BYTES > free and needed[device]:
            raise PrunelibError(
                f"no space left on device: {place.resolve()} has {in_words(free)} free, "
                f"{in_words(needed[device] + _SPARE_BYTES)} are needed"
            )
