"""Published figures beside ours: never in one column, and with a verdict.

``config/published/*.csv`` holds one published figure per line:

=============  ====================================================================================
column         meaning
=============  ====================================================================================
paper          who published it
table          which table; ratios to dense are only taken within one table and convention
model          the paper's model, for instance ``LLaMA-7B``
method         ``dense``; ``recovery_only``, the unpruned model after recovery, in tables without a
               dense figure; a registered method, or one with its variant, as ``magnitude_l2``;
               behind it, where the paper has several, the recovery as in ``lora_<recovery>``
target_kind    ``none`` for dense and unstated ratios, ``parameters``, ``groups``, ``blocks`` or
               ``layers``
target_value   share (0.2) or number of blocks or layers; 0 for dense and unstated ratios
recovered      ``true`` when the figure is from after recovery
metric         ``perplexity``, ``<task>_acc`` (or another of a task), ``average_5_tasks`` (of the
               five in the same line of the table, or of LLM-Pruner's 6 or 7 where it gives none),
               ``parameters``, ``macs``, ``memory_mib``, ``latency_s``; others are kept, and not
               compared
value          the figure as printed; accuracies in percent
convention     ``key=value`` pairs or words, separated by semicolons: data set, split, window
               length, harness, batch, length, hardware
source         where to find it
=============  ====================================================================================

Absolute figures depend on the harness and the text, so what is compared is the ratio to the dense
model measured in the same place, or to the recovered one where a paper's table has that instead.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prunelib.errors import InputError
from prunelib.evaluation.tasks import TASK_METRICS
from prunelib.reporting.artefacts import Cell, Report
from prunelib.reporting.stats import estimate
from prunelib.reporting.table import AVERAGE, LLM_PRUNER_TASKS

# Our ratio to dense may differ by this share from the published one and count as reproduced.
TOLERANCE = 0.10
# What a table's ratios are taken to, the first that it has.
REFERENCES = ("dense", "recovery_only")
TARGET_KINDS = ("none", "parameters", "groups", "blocks", "layers")


@dataclass(frozen=True)
class Published:
    """One published figure."""

    paper: str
    table: str
    model: str
    method: str
    target_kind: str
    target_value: float
    recovered: bool
    metric: str
    value: float
    convention: str
    source: str


@dataclass(frozen=True)
class Comparison:
    """A published figure, ours of the same kind, both ratios to dense, and the verdict."""

    published: Published
    model: str
    method: str
    target: str
    recovery: str
    published_ratio: float | None
    value: float | None
    ratio: float | None
    verdict: str
    reason: str


COLUMNS = tuple(field.name for field in fields(Published))


def load_published(directory: Path) -> list[Published]:
    """Read every CSV file of published figures in ``directory``.

    Raises:
        InputError: a file's columns or one of its values is not as described above.
    """
    return [row for path in sorted(directory.glob("*.csv")) for row in read_published(path)]


def read_published(path: Path) -> list[Published]:
    """Read one CSV file of published figures.

    Raises:
        InputError: the columns or a value is not as the module describes; names file and line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise InputError(
                f"{path}: columns are {reader.fieldnames}; allowed: {', '.join(COLUMNS)}"
            )
        return [_parse(row, f"{path}, line {reader.line_num}") for row in reader]


def _parse(row: Mapping[str, str], where: str) -> Published:
    if None in row or any(value is None for value in row.values()):
        raise InputError(f"{where}: {len(COLUMNS)} values expected")
    for name in ("paper", "table", "model", "method", "metric", "convention", "source"):
        if not row[name].strip():
            raise InputError(f"{where}: {name} is empty")
    if row["recovered"] not in ("true", "false"):
        raise InputError(f"{where}: recovered is {row['recovered']!r}; allowed: true, false")
    if row["target_kind"] not in TARGET_KINDS:
        raise InputError(
            f"{where}: target_kind is {row['target_kind']!r}; allowed: {', '.join(TARGET_KINDS)}"
        )
    numbers = {}
    for name in ("target_value", "value"):
        try:
            numbers[name] = float(row[name])
        except ValueError:
            numbers[name] = math.nan
        if not math.isfinite(numbers[name]) or numbers[name] < 0:
            raise InputError(f"{where}: {name} is {row[name]!r}; allowed: a number of at least 0")
    texts: dict[str, Any] = {name: row[name].strip() for name in COLUMNS}
    return Published(**(texts | numbers | {"recovered": row["recovered"] == "true"}))


def parse_convention(text: str) -> dict[str, str]:
    """``key=value`` pairs of a convention; words without a value are left out."""
    pairs = (part.split("=", 1) for part in text.split(";") if "=" in part)
    return {key.strip(): value.strip() for key, value in pairs}


def _plain(text: object) -> str:
    return "".join(char for char in str(text).casefold() if char.isalnum())


# Parameters that tell a paper's rows of one method apart, and values that their names leave out.
_NAMING = (
    *("strategy", "criterion", "aggregation", "heads", "attribution", "ranking"),
    *("remove", "recompute", "rank", "distance", "combination", "normalise", "gain", "svd_init"),
    *("start", "end"),
)
_TASK_ENDINGS = tuple(f"_{name}" for name in TASK_METRICS)
_USUAL = {"block", "sum", "kv_group", "owner", "local", "truncated"}


def published_names(name: str, method: Mapping[str, Any]) -> set[str]:
    """Names under which papers' rows of a method variant may be filed.

    The variant's own name, and the registered method with its norm (``magnitude`` with 2) and what
    else tells it from others (``llm_pruner`` with ``element1``, ``global``). The registered method
    alone is the name of a variant of which nothing is to be told.
    """
    registered = str(method.get("method") or name)
    parameters = method.get("parameters") or {}
    parts = [f"l{parameters['order']}"] if "order" in parameters else []
    parts += [str(parameters[key]) for key in _NAMING if key in parameters]
    if parameters.get("iterative_steps", 1) != 1:
        parts.append(f"{parameters['iterative_steps']}_steps")
    parts = [part for part in parts if part not in _USUAL]
    names = [name, "_".join([registered, *parts])]
    if parts == ["channel", "element1"]:
        # LLM-Pruner's tables name no criterion for channels; its commands run first order.
        names.append(f"{registered}_channel")
    return {_plain(text) for text in names}


def _model_names(name: str, model: Mapping[str, Any]) -> set[str]:
    source = str(model.get("source") or "").split("@")[0].rsplit("/", 1)[-1]
    # Hubs write the same model as llama-7b, llama-7b-hf or Meta-Llama-3-8B.
    return {_plain(text).removeprefix("meta").removesuffix("hf") for text in (name, source) if text}


def same_model_and_method(
    row: Published, model: tuple[str, Mapping[str, Any]], method: tuple[str, Mapping[str, Any]]
) -> bool:
    """Whether a published figure is of this model and method.

    Args:
        row: the figure.
        model: catalogue name and entry.
        method: the same, of the method.
    """
    return _plain(row.model) in _model_names(*model) and _plain(row.method) in published_names(
        *method
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def our_value(cell: Cell, figure: Published, tasks: Sequence[str] = ()) -> tuple[float | None, str]:
    """Our figure for the published one's metric, in its unit.

    Args:
        cell: ours.
        figure: the published one.
        tasks: metrics of the tasks that stand beside a published average.

    Returns:
        The figure, None where there is none, and why it cannot be compared (empty if it can).
    """
    convention = parse_convention(figure.convention)
    if figure.metric == "perplexity":
        return _our_perplexity(cell, convention)
    if figure.metric == "parameters":
        counts = cell.content("prune").get("parameters") or cell.content("efficiency")
        value = _number(counts.get("remaining", counts.get("parameters")))
        return value, "" if value else "not measured"
    if figure.metric == "macs":
        macs = cell.content("efficiency").get("macs") or {}
        if not macs:
            return None, "not measured"
        same = str(macs.get("length")) == convention.get("length")
        return _number(
            macs.get("macs")
        ), "" if same else f"other input: {macs.get('length')} tokens"
    if figure.metric in ("memory_mib", "latency_s"):
        return None, "other workload and hardware"
    return _our_accuracy(cell, figure.metric, tasks)


def _our_perplexity(cell: Cell, convention: Mapping[str, str]) -> tuple[float | None, str]:
    metrics = cell.content("perplexity")
    value = _number(metrics.get("perplexity"))
    if value is None:
        return None, "non-finite" if metrics else "not measured"
    ours = metrics.get("convention") or {}
    others = [
        f"{key} {ours.get(key)}, not {wanted}"
        for key, wanted in convention.items()
        if not _same_condition(key, str(ours.get(key, "")), wanted)
    ]
    return value, f"other convention: {'; '.join(others)}" if others else ""


def _same_condition(key: str, ours: str, wanted: str) -> bool:
    if key == "dataset":
        # Ours is a source, which has the data set's name and configuration within it.
        return _plain(wanted) in _plain(ours)
    # "evaluation" is what we call whichever split of a source the catalogue sets aside for it.
    return _plain(ours) == _plain(wanted) or (key, ours) == ("split", "evaluation")


def _our_accuracy(cell: Cell, metric: str, beside: Sequence[str]) -> tuple[float | None, str]:
    tasks = cell.content("tasks").get("tasks") or {}
    wanted = [metric]
    if metric == f"average_{len(beside)}_tasks":
        wanted = list(beside)
    elif metric in (AVERAGE, "average_6_tasks"):
        wanted = [f"{task}_{kind}" for task, kind in LLM_PRUNER_TASKS.items()]
        wanted = [name for name in wanted if metric == AVERAGE or not name.startswith("boolq")]
    values = []
    for name in wanted:
        kind = next((kind for kind in TASK_METRICS if name.endswith(f"_{kind}")), "acc")
        value = _number((tasks.get(name.removesuffix(f"_{kind}")) or {}).get(kind))
        if value is None:
            return None, f"task not measured: {name}"
        values.append(100 * value)
    return sum(values) / len(values), ""


def compare(report: Report, figures: Iterable[Published]) -> list[Comparison]:
    """Set every published figure of our methods beside ours.

    A figure is taken up when a group of cells has its method, its recovered state, and its target
    (parameter and group shares within one percentage point, block counts exactly). Papers also
    name parameter shares that they reached by a share of groups; ours counts as what it really
    removed. Figures of our recovery by name go before those that name none. Where our model
    is among the papers', other models are left out; where it is not, their perplexities are shown
    for orientation. The verdict is ``reproduced`` when our ratio to
    dense is within ``TOLERANCE`` of the published one, ``not reproduced`` otherwise, and ``not
    comparable`` for another model or convention, or without a dense figure. Where a table has a
    recovered unpruned model in the place of the dense one, so has the comparison: ours of the same
    recovery.
    """
    published = list(figures)
    unpruned = {
        (row.paper, row.table, row.model, row.metric, row.convention): row
        for control in reversed(REFERENCES)
        for row in published
        if row.method == control
    }
    beside: dict[tuple[object, ...], list[str]] = {}
    for row in published:
        tasks = beside.setdefault(_state(row), [])
        if row.metric.endswith(_TASK_ENDINGS):
            tasks.append(row.metric)
    known = {_plain(row.model) for row in published}
    methods = {_plain(row.method) for row in published}
    found: list[Comparison] = []
    for cells in report.groups.values():
        own_models = _model_names(cells[0].model, report.models.get(cells[0].model, {})) & known
        names = _row_names(report, cells[0], methods)
        for row in published:
            if row.method in REFERENCES or not _matches(cells[0], row, names):
                continue
            if own_models and _plain(row.model) not in own_models:
                continue
            if not own_models and row.metric != "perplexity":
                continue
            reference = unpruned.get((row.paper, row.table, row.model, row.metric, row.convention))
            tasks = beside[_state(row)]
            found.append(
                _verdict(report, cells, row, reference, tasks, same_model=bool(own_models))
            )
    return found


def _state(row: Published) -> tuple[object, ...]:
    """Return what the figures of one line of a paper's table have in common."""
    where = (row.paper, row.table, row.model, row.method, row.convention)
    return (*where, row.target_kind, row.target_value, row.recovered)


def _row_names(report: Report, cell: Cell, known: set[str]) -> set[str]:
    """Return the names of a cell's method, with its recovery where a figure has that name."""
    names = published_names(cell.method, report.methods.get(cell.method, {}))
    recovery = _plain(cell.recovery.removeprefix("lora_"))
    return {name + recovery for name in names} & known or names


def _matches(cell: Cell, row: Published, names: set[str]) -> bool:
    if cell.target is None or cell.control in ("dense", "recovery_only", "prune_zero"):
        return False
    recovered = cell.recovery != "none"
    return _plain(row.method) in names and row.recovered == recovered and _same_target(cell, row)


def _same_target(cell: Cell, row: Published) -> bool:
    assert cell.target is not None
    if cell.target.only:
        return False
    kind, value = cell.target.kind, cell.target.value
    if (kind, row.target_kind) == ("groups", "parameters"):
        counts = cell.content("prune").get("parameters") or {}
        if not counts.get("original"):
            return False
        kind, value = "parameters", 1 - counts["remaining"] / counts["original"]
    tolerance = 0.01 + 1e-9 if kind not in ("blocks", "layers") else 0
    return row.target_kind == kind and abs(row.target_value - value) <= tolerance


def _verdict(
    report: Report,
    cells: list[Cell],
    row: Published,
    unpruned: Published | None,
    tasks: Sequence[str],
    *,
    same_model: bool,
) -> Comparison:
    values, reason = _group_values(cells, row, tasks)
    published = row.value / unpruned.value if unpruned and unpruned.value else None
    control = unpruned.method if unpruned else "dense"
    wanted = (cells[0].model, control, "none" if control == "dense" else cells[0].recovery)
    own = [c for c in report.controls if (c.model, c.control, c.recovery) == wanted]
    references, _ = _group_values(own, row, tasks)
    reference = estimate(references).mean if references else None
    value = estimate(values).mean if values else None
    ratio = value / reference if value is not None and reference else None
    verdict = "not comparable"
    if not same_model:
        reason = f"other model: {row.model}" + (f"; {reason}" if reason else "")
    elif reason or value is None:
        reason = reason or "not measured"
    elif ratio is None:
        reason = f"no {control} figure of ours"
    elif published is None:
        reason = "no published dense figure in the same table and convention"
    else:
        gap = ratio / published - 1
        verdict = "reproduced" if abs(gap) <= TOLERANCE else "not reproduced"
        reason = f"our ratio to {control} is {100 * gap:+.1f} % off the published one"
    return Comparison(
        published=row,
        model=cells[0].model,
        method=cells[0].method,
        target=cells[0].target_label,
        recovery=cells[0].recovery,
        published_ratio=published,
        value=value,
        ratio=ratio,
        verdict=verdict,
        reason=reason,
    )


def _group_values(
    cells: list[Cell], row: Published, tasks: Sequence[str]
) -> tuple[list[float], str]:
    found = [our_value(cell, row, tasks) for cell in cells]
    values = [value for value, _ in found if value is not None]
    reasons = [reason for value, reason in found if value is not None or not values]
    return values, next((reason for reason in reasons if reason), "")
