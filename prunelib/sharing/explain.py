"""Why a step would run: which part of its key differs from the nearest artefact that is there.

A key is made of parameters, code, package versions and upstream keys. Where an upstream key
differs, the search goes on with the upstream step, so that forty steps that follow from one edit
have one cause.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any

from prunelib.errors import InputError, IntegrityError
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import RESULTS, SCRIPTS, Node, closure, needed
from prunelib.provenance import artefact
from prunelib.provenance.fingerprint import Snapshot, fingerprint
from prunelib.provenance.keys import package_versions

CODE, PARAMETER, PACKAGE, INPUT, ABSENT, DAMAGED, KEYS = (
    "code",
    "parameter",
    "package",
    "input",
    "absent",
    "damaged",
    "keys",
)
_NAMES = {CODE: "changed code: ", PARAMETER: "parameter ", PACKAGE: "package ", INPUT: "input "}
_SHOWN = 6
_MISSING = object()


@dataclass(frozen=True, order=True)
class Cause:
    """One reason at the root: ``kind`` is one of this module's constants."""

    kind: str
    text: str


@dataclass(frozen=True)
class Record:
    """An artefact that is there: where, and its provenance."""

    directory: Path
    content: Mapping[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """The readable path parts between step and key."""
        return self.directory.relative_to(RESULTS).parts[1:-1]


@dataclass(frozen=True)
class Difference:
    """What differs between the key of a step and that of a record.

    Attributes:
        own: parameters, code and packages of the step itself.
        inputs: name to the upstream key of the record, for upstream keys that differ.
    """

    own: tuple[Cause, ...]
    inputs: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Reason:
    """Why one step would run.

    Attributes:
        node: the step.
        causes: the roots, sorted.
        direct: whether a cause lies in this step, not only upstream of it.
        note: what it was compared with, for people.
    """

    node: Node
    causes: tuple[Cause, ...]
    direct: bool
    note: str


# ------------------------------------------------------------------------------ parts of the key


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _as_json(value: Any) -> str:
    # By text, since 1, 1.0 and true are equal but give different keys.
    return "none" if value is _MISSING else json.dumps(value, sort_keys=True)


def _shown(value: Any) -> str:
    text = _as_json(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def changed_parameters(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Cause, ...]:
    """Return a cause for every parameter, by dotted name, that differs."""
    before, after = dict(_flat(old, "")), dict(_flat(new, ""))
    names = sorted(name for name in {**before, **after} if name)
    pairs = [(name, before.get(name, _MISSING), after.get(name, _MISSING)) for name in names]
    return tuple(
        Cause(PARAMETER, f"{name}: {_shown(was)} -> {_shown(now)}")
        for name, was, now in pairs
        if _as_json(was) != _as_json(now)
    )


def changed_definitions(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[Cause, ...]:
    """Return a cause for every ``module:definition`` that differs; whole modules as one."""
    found = []
    modules_old = {name.partition(":")[0] for name in old}
    modules_new = {name.partition(":")[0] for name in new}
    found += [Cause(CODE, f"{name} (added)") for name in modules_new - modules_old]
    found += [Cause(CODE, f"{name} (removed)") for name in modules_old - modules_new]
    both = modules_old & modules_new
    for name in {**old, **new}:
        if name.partition(":")[0] in both and old.get(name) != new.get(name):
            word = " (added)" if name not in old else " (removed)" if name not in new else ""
            found.append(Cause(CODE, f"{name}{word}"))
    return tuple(sorted(found))


def changed_packages(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[Cause, ...]:
    """Return a cause for every distribution whose version differs."""
    return tuple(
        Cause(PACKAGE, f"{name}: {old.get(name, 'none')} -> {new.get(name, 'none')}")
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )


_SEEN = Snapshot()


@cache
def _code(entry: tuple[str, ...]) -> tuple[str, Mapping[str, str]]:
    code = fingerprint(entry, seen=_SEEN)
    return code.digest, code.definitions


def difference(node: Node, record: Record) -> Difference:
    """Return which parts of a step's key differ from those of a record."""
    content = record.content
    digest, definitions = _code(node.entry)
    code: tuple[Cause, ...] = ()
    if digest != content.get("fingerprint"):
        code = changed_definitions(content.get("definitions", {}), definitions)
        # Definitions are named once, however often and in whatever order they stand in a file.
        code = code or (Cause(CODE, "the order of definitions"),)
    own = (
        *changed_parameters(content.get("params", {}), node.params),
        *code,
        *changed_packages(content.get("packages", {}), package_versions(node.packages)),
    )
    old = content.get("upstream", {})
    added = [Cause(INPUT, f"{name} (added)") for name in sorted(node.inputs.keys() - old.keys())]
    gone = [Cause(INPUT, f"{name} (removed)") for name in sorted(old.keys() - node.inputs.keys())]
    moved = {
        name: old[name]
        for name, upstream in node.inputs.items()
        if name in old and old[name] != upstream.key
    }
    return Difference((*own, *added, *gone), moved)


# ------------------------------------------------------------------------------- what is there


class Archive:
    """The records under ``results/``, read when a step is first asked for."""

    def __init__(self) -> None:
        self._read: dict[str, list[Record]] = {}
        self.unreadable: dict[tuple[str, tuple[str, ...]], str] = {}
        """What is wrong with a record that cannot be read, by step and labels."""

    def of(self, step: str) -> list[Record]:
        """Return the records of a step."""
        if step not in self._read:
            found = []
            for path in sorted((RESULTS / step).glob(f"**/{artefact.RECORD}")):
                try:
                    found.append(Record(path.parent, artefact.read(path.parent)))
                except IntegrityError as error:
                    labels = path.parent.relative_to(RESULTS).parts[1:-1]
                    self.unreadable[step, labels] = str(error)
            self._read[step] = found
        return self._read[step]


def _nearest(node: Node, records: Iterable[Record]) -> Record | None:
    """The record with the most similar labels, then the fewest differences, then the newest."""

    def rank(record: Record) -> tuple[float, int, str]:
        alike = SequenceMatcher(None, node.labels, record.labels, autojunk=False).ratio()
        found = difference(node, record)
        return alike, -len(found.own) - len(found.inputs), str(record.content.get("finished"))

    return max(records, key=rank, default=None)


def damage(node: Node) -> str | None:
    """Say what is wrong with what lies where the artefact should be; None if nothing is there."""
    if not (node.directory / artefact.RECORD).exists():
        return None
    try:
        record = artefact.read(node.directory)
    except IntegrityError as error:
        return str(error)
    if record["key"] != node.key:
        return f"{node.directory} holds the record of {record['key']}"
    for name, facts in record["files"].items():
        path = node.directory / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != facts["size"]:
            return f"{path} has {path.stat().st_size} bytes, its record says {facts['size']}"
    return f"{node.directory} is no whole artefact"


class _Search:
    """Causes of steps, with those of upstream steps found once."""

    def __init__(self) -> None:
        self.archive = Archive()
        self._found: dict[tuple[str, str], tuple[Cause, ...]] = {}

    def reason(self, node: Node) -> Reason:
        fault = damage(node)
        if fault:
            return Reason(node, (Cause(DAMAGED, fault),), True, "")
        records = self.archive.of(node.step)
        same = [record for record in records if record.labels == node.labels]
        nearest = _nearest(node, same or records)
        if nearest is None:
            unreadable = self.archive.unreadable.get((node.step, node.labels))
            text = unreadable or "no artefact of this step is there yet"
            return Reason(node, (Cause(ABSENT, text),), True, "")
        found = difference(node, nearest)
        note = f"compared with {nearest.directory}"
        if same:
            own = found.own or not found.inputs
            return Reason(node, self._roots(node, nearest, found), bool(own), note)
        # Nothing of this name is there: that is the cause, however its key differs from others'.
        differing = [*found.own, *(Cause(INPUT, name) for name in sorted(found.inputs))]
        note = f"the nearest is {nearest.directory}: {_in_words(differing) or 'equal'}"
        text = "no artefact is there under these names"
        return Reason(node, (Cause(ABSENT, text),), True, note)

    def _roots(self, node: Node, record: Record, found: Difference) -> tuple[Cause, ...]:
        place = (node.key, str(record.content["key"]))
        if place not in self._found:
            roots = set(found.own)
            for name, old in found.inputs.items():
                roots.update(self._of_input(node.inputs[name], name, old))
            if not roots:
                roots.add(Cause(KEYS, "all parts are equal: keys are made in another way now"))
            self._found[place] = tuple(sorted(roots))
        return self._found[place]

    def _of_input(self, upstream: Node, name: str, old: str) -> tuple[Cause, ...]:
        """Why an upstream key is not the one that the record names."""
        records = self.archive.of(upstream.step)
        before = next((record for record in records if record.content["key"] == old), None)
        if before is None:
            same = [record for record in records if record.labels == upstream.labels]
            # The new upstream artefact itself tells nothing about the old one.
            before = _nearest(
                upstream, (record for record in same if record.content["key"] != upstream.key)
            )
        if before is None:
            return (Cause(INPUT, f"{name}: was {old}, which is not here to compare with"),)
        return self._roots(upstream, before, difference(upstream, before))


# ----------------------------------------------------------------------------------- the answer


def _depths(nodes: Mapping[str, Node]) -> Callable[[Node], int]:
    @cache
    def depth(key: str) -> int:
        inputs = nodes[key].inputs.values()
        return 1 + max((depth(upstream.key) for upstream in inputs), default=0)

    return lambda node: depth(node.key)


def explain(nodes: Iterable[Node]) -> list[Reason]:
    """Return why each of ``nodes``, none of which has a valid artefact, would run.

    Upstream steps come first.

    Raises:
        InputError: code or a package that a step depends on is not there.
    """
    wanted = list(nodes)
    depth = _depths(closure(wanted))
    search = _Search()
    return [search.reason(node) for node in sorted(wanted, key=lambda n: (depth(n), n.name))]


def select(experiment: Experiment, names: Iterable[str]) -> tuple[list[Node], list[str]]:
    """Return the steps that names stand for and that would run, and a line for each that would not.

    Args:
        experiment: whose steps are asked about.
        names: steps, keys, or ids of cells; none means all.

    Raises:
        InputError: a name is none of these.
    """
    terminal = [node for cell in experiment.cells for node in cell.steps.values()]
    would_run = needed(terminal)
    everything = closure(terminal)
    names = list(names)
    if not names:
        return list(would_run.values()), []
    chosen: dict[str, Node] = {}
    told = []
    for name in names:
        cells = [cell for cell in experiment.cells if cell.id == name]
        if cells:
            candidates = closure(cells[0].steps.values())
            # Its own share of what would run.
            running = {key: node for key, node in candidates.items() if key in would_run}
        elif name in SCRIPTS:
            running = {key: node for key, node in would_run.items() if node.step == name}
        elif name in everything:
            running = {name: would_run[name]} if name in would_run else {}
        else:
            raise InputError(
                f"{name!r} is neither a step ({', '.join(SCRIPTS)}) nor a key or a cell of "
                f"{experiment.path}; its cells begin with {experiment.cells[0].id}"
            )
        if not running:
            told.append(f"{name}: nothing would run{_why_not(everything.get(name))}")
        chosen |= running
    return list(chosen.values()), told


def _why_not(node: Node | None) -> str:
    if node is None:
        return ""
    if artefact.is_valid(node.directory, node.key):
        return f", {node.directory} is there"
    return f", {node.directory} is not there, but nothing that is missing needs it"


def _in_words(causes: Iterable[Cause]) -> str:
    by_kind: dict[str, list[str]] = {}
    for cause in causes:
        by_kind.setdefault(cause.kind, []).append(cause.text)
    parts = []
    for kind, texts in by_kind.items():
        more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
        parts.append(f"{_NAMES.get(kind, '')}{', '.join(texts[:_SHOWN])}{more}")
    return "; ".join(parts)


def render(reasons: Iterable[Reason]) -> str:
    """Return the reasons as text: steps of the same causes together, the largest group first."""
    groups: dict[tuple[Cause, ...], list[Reason]] = {}
    for reason in reasons:
        groups.setdefault(reason.causes, []).append(reason)
    lines = []
    for causes, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        count = "1 step" if len(members) == 1 else f"{len(members)} steps"
        lines.append(f"{count} because: {_in_words(causes)}")
        # Where the causes are met first; what only follows from them is counted.
        first = [reason for reason in members if reason.direct] or members[:1]
        for reason in first[:3]:
            note = f" ({reason.note})" if reason.note and reason is first[0] else ""
            lines.append(f"  {reason.node.name}{note}")
        rest = [reason for reason in members if reason not in first[:3]]
        if rest:
            steps = Counter(reason.node.step for reason in rest)
            lines.append(
                "  also " + ", ".join(f"{number} {step}" for step, number in steps.items())
            )
    return "\n".join(lines)
