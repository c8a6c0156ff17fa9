"""What a report is made of: the cells of an experiment and the artefacts they point at.

Only small text files are read (metrics, plans, loss logs and provenance). Each is held against
the size and sha256 of its provenance first, so a damaged file gives a missing figure, never a
wrong one. Checkpoints need not be present.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prunelib.errors import InputError, IntegrityError
from prunelib.provenance import artefact

# Step of an artefact -> the file that the report reads from it.
CONTENT = {
    "prune": "plan.json",
    "recovery": "meta.json",
    "perplexity": "metrics.json",
    "tasks": "metrics.json",
    "efficiency": "metrics.json",
}
STEPS = tuple(CONTENT)
TARGET_KINDS = ("parameters", "groups", "blocks", "layers")
CONTROLS = ("dense", "random", "prune_zero", "recovery_only")


@dataclass(frozen=True)
class Target:
    """What was asked for: a share of parameters or groups, or a number of blocks or layers.

    ``only`` names the one unit kind that was reached, if not all were.
    """

    kind: str
    value: float
    only: str | None = None

    @property
    def label(self) -> str:
        """Readable name, for instance ``parameters 20%``, ``blocks 6`` or ``layers 40``."""
        counted = self.kind in ("blocks", "layers")
        if counted and (self.value >= 1 or self.value == 0):
            return f"{self.kind} {self.value:g}"
        label = f"{self.kind} {100 * self.value:g}%"
        return f"{label} of {self.only}" if self.only else label


@dataclass(frozen=True)
class Artefact:
    """One finished artefact: where it is, what it says, and where that comes from."""

    directory: Path
    content: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Content key."""
        return str(self.provenance["key"])


@dataclass(frozen=True)
class Cell:
    """One cell of the experiment with the artefacts that are finished."""

    id: str
    model: str
    method: str
    control: str | None
    target: Target | None
    seed: int | None
    recovery: str
    artefacts: Mapping[str, Artefact] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def target_label(self) -> str:
        """Label of the target; ``none`` for rows that are not pruned."""
        return self.target.label if self.target else "none"

    @property
    def group(self) -> tuple[str, str, str, str]:
        """What is averaged over seeds: (model, method, target, recovery)."""
        return (self.model, self.method, self.target_label, self.recovery)

    @property
    def display(self) -> str:
        """Name of the row for people; controls that borrow a method say so."""
        return f"{self.method} (pruned to 0 %)" if self.control == "prune_zero" else self.method

    def content(self, step: str) -> Mapping[str, Any]:
        """Content of the artefact of ``step``; empty where it is missing."""
        found = self.artefacts.get(step)
        return found.content if found else {}


@dataclass(frozen=True)
class Report:
    """Everything that one report is made from."""

    experiment: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    texts: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    cells: tuple[Cell, ...]

    @property
    def baseline(self) -> str | None:
        """Method that the paired differences are taken against."""
        name = self.experiment.get("baseline")
        return str(name) if name is not None else None

    @cached_property
    def groups(self) -> dict[tuple[str, str, str, str], list[Cell]]:
        """Cells by (model, method, target, recovery), in the order of the experiment."""
        found: dict[tuple[str, str, str, str], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.group, []).append(cell)
        return found

    @cached_property
    def controls(self) -> tuple[Cell, ...]:
        """The cells that are controls."""
        return tuple(cell for cell in self.cells if cell.control)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise IntegrityError(f"{path}: is not a JSON object")
    return data


def read_artefact(directory: Path, step: str) -> Artefact:
    """Read the artefact of ``step`` from its directory.

    Raises:
        IntegrityError: provenance.json or the file read is missing, is not JSON, or does not have
            the size or sha256 that provenance lists.
    """
    provenance = artefact.read(directory)
    name = CONTENT[step]
    artefact.verify(directory, [name])
    return Artefact(directory, _read_json(directory / name), provenance)


def read_losses(cell: Cell) -> list[dict[str, Any]]:
    """Lines of the recovery's loss log; empty where there is none."""
    found = cell.artefacts.get("recovery")
    if found is None:
        return []
    try:
        artefact.verify(found.directory, ["loss.jsonl"])
        text = (found.directory / "loss.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (IntegrityError, ValueError):
        return []


def find_value(data: Any, *names: str) -> Any:
    """First value found under one of ``names``, at any depth of nested mappings."""
    for mapping in _mappings(data):
        for name in names:
            if mapping.get(name) is not None:
                return mapping[name]
    return None


def _mappings(data: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(data, Mapping):
        yield data
        for value in data.values():
            yield from _mappings(value)


def _parse_target(raw: Any, where: str) -> Target | None:
    if raw is None:
        return None
    if not isinstance(raw, Mapping) or raw.get("kind") not in TARGET_KINDS:
        raise InputError(
            f"{where}.target is {raw!r}; allowed: null, or kind one of {', '.join(TARGET_KINDS)}"
        )
    value = raw.get("value")
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise InputError(f"{where}.target.value is {value!r}; allowed: a number of at least 0")
    only = raw.get("only")
    if only is not None and not isinstance(only, str):
        raise InputError(f"{where}.target.only is {only!r}; allowed: null or a unit kind")
    return Target(str(raw["kind"]), float(value), only)


def _parse_cell(raw: Any, index: int) -> Cell:
    where = f"cells[{index}]"
    if not isinstance(raw, Mapping):
        raise InputError(f"{where} is {type(raw).__name__}; allowed: an object")
    for name in ("id", "model", "method", "recovery"):
        if not isinstance(raw.get(name), str) or not raw[name]:
            raise InputError(f"{where}.{name} is {raw.get(name)!r}; allowed: a non-empty string")
    control = raw.get("control")
    if control is not None and control not in CONTROLS:
        raise InputError(f"{where}.control is {control!r}; allowed: null, {', '.join(CONTROLS)}")
    artefacts: dict[str, Artefact] = {}
    missing: dict[str, str] = {}
    failures = raw.get("failures") or {}
    for step, directory in (raw.get("artefacts") or {}).items():
        if step not in CONTENT:
            raise InputError(f"{where}.artefacts has {step!r}; allowed: {', '.join(STEPS)}")
        if directory is None:
            continue
        try:
            artefacts[step] = read_artefact(Path(directory), step)
        except IntegrityError as error:
            missing[step] = str(failures.get(step) or error)
    return Cell(
        id=raw["id"],
        model=raw["model"],
        method=raw["method"],
        control=control,
        target=_parse_target(raw.get("target"), where),
        seed=raw.get("seed"),
        recovery=raw["recovery"],
        artefacts=artefacts,
        missing=missing,
    )


def load_report(params: Mapping[str, Any]) -> Report:
    """Read the description of a report and every artefact that it points at.

    Args:
        params: ``experiment``, ``models``, ``texts``, ``methods`` and ``cells``. A cell names its
            artefact directories; null means that the step is not part of the cell. An optional
            ``failures`` of a cell (step -> one line) says why a step has no artefact.

    Raises:
        InputError: the description is not of that form, or two cells have the same id.
    """
    for name, kind in (
        ("experiment", Mapping),
        ("models", Mapping),
        ("texts", Mapping),
        ("methods", Mapping),
        ("cells", list),
    ):
        if not isinstance(params.get(name), kind):
            raise InputError(f"report request: {name} is missing or not of the right type")
    cells = tuple(_parse_cell(raw, index) for index, raw in enumerate(params["cells"]))
    seen: set[str] = set()
    for cell in cells:
        if cell.id in seen:
            raise InputError(f"report request: two cells have the id {cell.id!r}")
        seen.add(cell.id)
    return Report(
        experiment=params["experiment"],
        models=params["models"],
        texts=params["texts"],
        methods=params["methods"],
        cells=cells,
    )


def hardware_label(hardware: Any) -> str:
    """One line for a description of hardware: device name, count and threads."""
    if not isinstance(hardware, Mapping):
        return str(hardware) if hardware else "unknown"
    name = str(hardware.get("name") or hardware.get("device") or "unknown")
    count = hardware.get("count")
    if hardware.get("device") == "cpu":
        threads = hardware.get("threads")
        return f"{name}, {threads} threads" if threads else name
    return f"{count} x {name}" if count and count != 1 else name
