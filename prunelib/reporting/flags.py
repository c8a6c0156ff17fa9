"""What a reader must know before trusting a row: every rule is a pure function of the report.

A flag never removes a row. Severities: ``error`` (the figure must not be used), ``warning`` (read
with care), ``note`` (by design, but worth knowing).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import numpy as np

from prunelib.evaluation.tasks import TASK_METRICS
from prunelib.reporting.artefacts import Cell, Report, find_value, hardware_label
from prunelib.reporting.stats import estimate
from prunelib.reporting.table import (
    convention_label,
    realised_ratio,
    same_budget,
    window_nll,
)

SEVERITIES = ("error", "warning", "note")
# A parameter target is met when the realised ratio is within half a percentage point.
RATIO_TOLERANCE = 0.005
# Accuracies differ when they are further apart than this many standard errors of the difference.
Z = 1.96


@dataclass(frozen=True)
class Flag:
    """One finding: which rule, how severe, which cells, and what it says."""

    rule: str
    severity: str
    cells: tuple[str, ...]
    message: str


def _perplexity(cell: Cell) -> float | None:
    value = cell.content("perplexity").get("perplexity")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _accuracies(cell: Cell) -> dict[str, tuple[float, float]]:
    """Task metric -> (value, standard error)."""
    found: dict[str, tuple[float, float]] = {}
    for task, result in (cell.content("tasks").get("tasks") or {}).items():
        for kind in TASK_METRICS:
            value, error = result.get(kind), result.get(f"{kind}_stderr")
            if isinstance(value, int | float) and isinstance(error, int | float):
                found[f"{task} {kind}"] = (float(value), float(error))
    return found


def _is_pruned(cell: Cell) -> bool:
    return cell.target is not None and cell.control != "prune_zero"


def _find(report: Report, model: str, control: str, recovery: str | None = None) -> list[Cell]:
    return [
        cell
        for cell in report.controls
        if (cell.model, cell.control) == (model, control) and recovery in (None, cell.recovery)
    ]


def missing(report: Report, cell: Cell) -> list[Flag]:
    """A step of the cell failed or has not run."""
    if not cell.missing:
        return []
    steps = "; ".join(f"{step}: {why}" for step, why in sorted(cell.missing.items()))
    return [Flag("missing", "error", (cell.id,), f"no figures ({steps})")]


def non_finite(report: Report, cell: Cell) -> list[Flag]:
    """A measured figure is NaN or infinite."""
    names = [
        name
        for name in ("perplexity", "nll_mean", "nll_sum")
        if isinstance(value := cell.content("perplexity").get(name), float)
        and not math.isfinite(value)
    ]
    if not np.isfinite(window_nll(cell)).all():
        names.append("window_nll")
    names += [name for name, pair in _accuracies(cell).items() if not all(map(math.isfinite, pair))]
    ratio = (cell.content("prune").get("parameters") or {}).get("removed_ratio")
    if isinstance(ratio, float) and not math.isfinite(ratio):
        names.append("removed_ratio")
    if not names:
        return []
    return [Flag("non-finite", "error", (cell.id,), f"NaN or infinite: {', '.join(names)}")]


def worse_than_random(report: Report, cell: Cell) -> list[Flag]:
    """Perplexity above, or accuracy clearly below, random pruning at the same budget.

    The reference is the median over the random seeds: one unlucky channel can multiply a mean.
    """
    if not _is_pruned(cell) or cell.control == "random":
        return []
    candidates = [
        members
        for members in report.groups.values()
        if members[0].control == "random"
        and (members[0].model, members[0].recovery) == (cell.model, cell.recovery)
    ]
    random = same_budget(report, cell, candidates)
    findings: list[str] = []
    own = _perplexity(cell)
    values = [value for other in random if (value := _perplexity(other)) is not None]
    if own is not None and values and own > median(values):
        findings.append(f"perplexity {own:.4g} against {median(values):.4g}")
    for name, (value, error) in _accuracies(cell).items():
        pairs = [_accuracies(other)[name] for other in random if name in _accuracies(other)]
        if pairs and median(p[0] for p in pairs) - value > Z * math.hypot(
            error, median(p[1] for p in pairs)
        ):
            findings.append(f"{name} {value:.3f} against {median(p[0] for p in pairs):.3f}")
    if not findings:
        return []
    message = f"worse than random pruning at the same budget: {'; '.join(findings)}"
    return [Flag("worse than random", "warning", (cell.id,), message)]


def better_than_dense(report: Report, cell: Cell) -> list[Flag]:
    """A pruned row that beats the unpruned model.

    A recovered row has trained on text like the evaluation's, so it is held against the dense
    model that has had the same training, where the experiment has that control.
    """
    if not _is_pruned(cell) or not realised_ratio([cell]):
        return []
    references = _find(report, cell.model, "dense")
    if cell.recovery != "none":
        references = _find(report, cell.model, "recovery_only", cell.recovery) or references
    if not references:
        return []
    reference = references[0]
    findings: list[str] = []
    own, dense = _perplexity(cell), _perplexity(reference)
    if own is not None and dense is not None and own < dense:
        findings.append(f"perplexity {own:.4g} against {dense:.4g}")
    others = _accuracies(reference)
    for name, (value, error) in _accuracies(cell).items():
        if name in others and value - others[name][0] > Z * math.hypot(error, others[name][1]):
            findings.append(f"{name} {value:.3f} against {others[name][0]:.3f}")
    if not findings:
        return []
    message = f"better than {reference.method}: {'; '.join(findings)}"
    return [Flag("better than dense", "warning", (cell.id,), message)]


def off_budget(report: Report, cell: Cell) -> list[Flag]:
    """The realised ratio is not the target's.

    Parameter targets may be off by 0.5 percentage points. Removing whole blocks can only meet the
    nearest count, which is noted, not warned about. A group ratio promises no parameter ratio.
    """
    plan = cell.content("prune")
    if cell.target is None or not plan:
        return []
    parts = sum(map(len, (plan.get("skipped") or {}).values()))
    blocks = len(plan.get("removed_blocks") or ()) or parts
    counts = plan.get("parameters") or {}
    if cell.target.kind == "blocks":
        wanted = cell.target.value
        if wanted < 1:
            wanted = round(wanted * (plan.get("original") or {}).get("num_hidden_layers", 0))
        if blocks == wanted:
            return []
        message = f"{blocks} blocks removed, {wanted:g} asked for"
        return [Flag("off budget", "warning", (cell.id,), message)]
    realised = counts.get("removed_ratio")
    if cell.target.kind != "parameters" or realised is None:
        return []
    gap = abs(realised - cell.target.value)
    if gap <= RATIO_TOLERANCE:
        return []
    message = (
        f"{100 * realised:.2f} % of the parameters removed, {100 * cell.target.value:g} % asked for"
    )
    if blocks and gap <= realised / blocks / 2 + RATIO_TOLERANCE:
        message += f": {blocks} is the nearest block count"
        return [Flag("nearest block", "note", (cell.id,), message)]
    return [Flag("off budget", "warning", (cell.id,), message)]


def recovery_rise(report: Report, cell: Cell) -> list[Flag]:
    """Recovery made the perplexity worse; says what the recovery was."""
    if cell.recovery == "none":
        return []
    if cell.control == "recovery_only":
        before = _find(report, cell.model, "dense")
    else:
        before = [
            other
            for other in report.groups.get((*cell.group[:3], "none"), ())
            if other.seed == cell.seed
        ]
    after = _perplexity(cell)
    start = _perplexity(before[0]) if before else None
    if after is None or start is None or after <= start:
        return []
    message = (
        f"perplexity rises from {start:.4g} to {after:.4g} by recovery"
        f" ({describe_recovery(report, cell)}); the adapter fits the recovery text, and a short or"
        " hot schedule can move a good model away from the evaluation text"
    )
    return [Flag("rise after recovery", "warning", (cell.id,), message)]


def describe_recovery(report: Report, cell: Cell) -> str:
    """Text, tokens seen and learning rate of a recovery, as far as its artefact tells."""
    artefact = cell.artefacts.get("recovery")
    if artefact is None:
        return "details missing"
    sources = {"meta": artefact.content, "params": artefact.provenance.get("params")}
    facts = {
        "text": find_value(sources, "text", "dataset", "texts"),
        "tokens seen": find_value(sources, "tokens_seen", "tokens", "total_tokens"),
        "steps": find_value(sources, "steps", "optimiser_steps", "max_steps"),
        "learning rate": find_value(sources, "learning_rate", "lr"),
    }
    facts["text"] = facts["text"] or (report.experiment.get("text") if report.experiment else None)
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)


def prune_zero(report: Report, cell: Cell) -> list[Flag]:
    """Pruning to 0 % must give the dense model's figures bit for bit."""
    dense = _find(report, cell.model, "dense", cell.recovery)
    if cell.control != "prune_zero" or not dense:
        return []
    ours, theirs = cell.content("perplexity"), dense[0].content("perplexity")
    if not ours or not theirs:
        return []
    same = ours.get("perplexity") == theirs.get("perplexity") and np.array_equal(
        window_nll(cell), window_nll(dense[0])
    )
    if same:
        return []
    message = (
        f"pruning to 0 % is not bit-equal to dense: perplexity {ours.get('perplexity')!r}"
        f" against {theirs.get('perplexity')!r}"
    )
    return [Flag("prune to zero differs", "error", (cell.id,), message)]


def disturbed(report: Report, cell: Cell) -> list[Flag]:
    """Other processes kept the machine busy, or could have, while latency was measured."""
    metrics = cell.content("efficiency")
    if metrics.get("comparable", True):
        return []
    conditions = metrics.get("conditions") or {}
    if conditions.get("node_alone") is False:
        message = "latency was measured on a node shared with other jobs: not comparable"
        return [Flag("shared node", "warning", (cell.id,), message)]
    busy = conditions.get("foreign_cpus")
    load = f" ({busy:.2f} CPUs)" if isinstance(busy, int | float) else ""
    message = f"other processes were busy{load} while latency was measured: not comparable"
    return [Flag("disturbed timing", "warning", (cell.id,), message)]


def seed_spread(report: Report) -> list[Flag]:
    """The standard deviation over seeds exceeds the gap to the baseline."""
    flags: list[Flag] = []
    by_group = report.groups
    for (model, method, target, recovery), cells in by_group.items():
        if report.baseline in (None, method) or not _is_pruned(cells[0]):
            continue
        others = same_budget(
            report,
            cells[0],
            [
                members
                for (m, name, _, r), members in by_group.items()
                if (m, name, r) == (model, report.baseline, recovery)
                and members[0].control != "prune_zero"
            ],
        )
        ours, theirs = _distinct_perplexities(cells), _distinct_perplexities(others)
        if len(ours) < 2 or not theirs:
            continue
        own = estimate(ours)
        gap = abs(own.mean - estimate(theirs).mean)
        if own.sd is not None and own.sd > gap:
            message = (
                f"{method}, {target}, recovery {recovery}: the spread over seeds (standard"
                f" deviation {own.sd:.3g}) is larger than the gap to {report.baseline} ({gap:.3g})"
            )
            ids = tuple(cell.id for cell in cells)
            flags.append(Flag("seed spread", "warning", ids, message))
    return flags


def _distinct_perplexities(cells: Iterable[Cell]) -> list[float]:
    found = {
        cell.artefacts["perplexity"].key: value
        for cell in cells
        if (value := _perplexity(cell)) is not None
    }
    return list(found.values())


def mixed(report: Report) -> list[Flag]:
    """Figures of one column were measured under different conditions.

    Conventions, dtype, hardware and package versions, per model and evaluation step.
    """
    flags: list[Flag] = []
    for model in dict.fromkeys(cell.model for cell in report.cells):
        for step in ("perplexity", "tasks", "efficiency"):
            cells = [c for c in report.cells if c.model == model and step in c.artefacts]
            conditions = [_conditions(cell, step) for cell in cells]
            for name in dict.fromkeys(name for found in conditions for name in found):
                # A package that only some cells use (peft, with an adapter) mixes nothing.
                values = dict.fromkeys(found[name] for found in conditions if name in found)
                if len(values) > 1:
                    message = f"{model}: {step} mixes {name}: {' | '.join(values)}"
                    ids = tuple(cell.id for cell in cells)
                    flags.append(Flag(f"mixed {name}", "warning", ids, message))
    return flags


def _conditions(cell: Cell, step: str) -> dict[str, str]:
    content, packages = cell.content(step), packages_of(cell, step)
    return {
        "dtype": str(content.get("dtype")),
        "hardware": hardware_label(content.get("hardware")),
        "convention": convention_label(content),
        **{f"versions of {name}": version for name, version in sorted(packages.items())},
    }


def packages_of(cell: Cell, step: str) -> dict[str, str]:
    """Package versions that the artefact of ``step`` was made with."""
    artefact = cell.artefacts.get(step)
    found = find_value(artefact.provenance, "packages", "versions") if artefact else None
    return dict(found) if isinstance(found, dict) else {}


CELL_RULES: tuple[Callable[[Report, Cell], list[Flag]], ...] = (
    missing,
    non_finite,
    prune_zero,
    worse_than_random,
    better_than_dense,
    off_budget,
    recovery_rise,
    disturbed,
)
REPORT_RULES: tuple[Callable[[Report], list[Flag]], ...] = (seed_spread, mixed)


def find_flags(report: Report) -> list[Flag]:
    """All flags of a report, errors first, in the order of the cells."""
    flags = [flag for rule in CELL_RULES for cell in report.cells for flag in rule(report, cell)]
    flags += [flag for rule in REPORT_RULES for flag in rule(report)]
    return sorted(flags, key=lambda flag: SEVERITIES.index(flag.severity))


def flags_of(cell_id: str, flags: Iterable[Flag]) -> str:
    """Names of the rules that a cell is flagged by, for one column of a table."""
    return "; ".join(dict.fromkeys(flag.rule for flag in flags if cell_id in flag.cells))
