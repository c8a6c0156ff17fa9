"""Tables of a benchmark: one row per cell, averages over seeds, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from prunelib.evaluation.tasks import TASK_METRICS
from prunelib.reporting.artefacts import CONTENT, STEPS, Cell, Report, hardware_label
from prunelib.reporting.stats import bootstrap_limits, estimate, student_t_quantile

if TYPE_CHECKING:
    import pandas as pd

# Two budgets are the same when their targets are, or when the realised ratios are this close: a
# block of a small model is 2 to 3 % of its parameters, so the nearest count is within half of that.
BUDGET_TOLERANCE = 0.02

SCORING_STEPS = ("statistics", "scores")

# LLM-Pruner's average: acc for some tasks, acc_norm for others.
LLM_PRUNER_TASKS = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
AVERAGE = "average_7_tasks"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Metric:
    """How one figure is called, scaled and read: ``better`` is lower or higher."""

    label: str
    unit: str
    better: str
    step: str


METRICS = {
    "realised_ratio": Metric("parameters removed", "share", "higher", "prune"),
    "gross_ratio": Metric("parameters removed, adapters not counted", "share", "higher", "prune"),
    "parameters": Metric("parameters", "", "lower", "prune"),
    "trained_parameters": Metric("parameters trained by recovery", "", "lower", "recovery"),
    "perplexity": Metric("perplexity", "", "lower", "perplexity"),
    "nll_mean": Metric("mean negative log-likelihood", "nat/token", "lower", "perplexity"),
    "non_embedding_parameters": Metric("non-embedding parameters", "", "lower", "efficiency"),
    "bytes": Metric("weights", "bytes", "lower", "efficiency"),
    "macs": Metric("MACs", "", "lower", "efficiency"),
    "prefill_latency_s": Metric("prefill latency", "s", "lower", "efficiency"),
    "prefill_tokens_per_s": Metric("prefill speed", "tokens/s", "higher", "efficiency"),
    "decode_latency_s": Metric("decode latency", "s", "lower", "efficiency"),
    "decode_tokens_per_s": Metric("decode speed", "tokens/s", "higher", "efficiency"),
    "peak_memory_bytes": Metric("peak memory", "bytes", "lower", "efficiency"),
}
# Measured on a machine, so only comparable on one.
TIMED = (
    "prefill_latency_s",
    "prefill_tokens_per_s",
    "decode_latency_s",
    "decode_tokens_per_s",
    "peak_memory_bytes",
)


def metric_of(name: str) -> Metric:
    """Description of a metric by its column name; those of tasks included."""
    if name in METRICS:
        return METRICS[name]
    for kind in TASK_METRICS:
        if name.endswith(f"_{kind}"):
            return Metric(f"{name.removesuffix(f'_{kind}')} ({kind})", "share", "higher", "tasks")
    return Metric(name.replace("_", " "), "share", "higher", "tasks")


def convention_label(metrics: Mapping[str, Any]) -> str:
    """One line for the convention that a perplexity was measured in."""
    convention = dict(metrics.get("convention") or {})
    parts = [str(convention.pop(key)) for key in ("dataset", "split") if key in convention]
    parts += [
        f"{key} {value!r}" if key == "join" else f"{key} {value}"
        for key, value in sorted(convention.items())
    ]
    return "; ".join(parts)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _perplexity_columns(metrics: Mapping[str, Any]) -> dict[str, Any]:
    names = ("perplexity", "nll_mean", "targets", "windows")
    row: dict[str, Any] = {name: metrics[name] for name in names if name in metrics}
    return row | {
        "perplexity_convention": convention_label(metrics),
        "perplexity_dtype": metrics.get("dtype"),
        "perplexity_hardware": hardware_label(metrics.get("hardware")),
        "perplexity_seconds": metrics.get("seconds"),
    }


def _task_columns(metrics: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    tasks = metrics.get("tasks") or {}
    for task, result in sorted(tasks.items()):
        measured = [f"{kind}{end}" for kind in TASK_METRICS for end in ("", "_stderr")]
        for name in (*measured, "n", "version"):
            if result.get(name) is not None:
                row[f"{task}_{name}"] = result[name]
    recipe = [_number(tasks.get(task, {}).get(kind)) for task, kind in LLM_PRUNER_TASKS.items()]
    if all(math.isfinite(value) for value in recipe):
        row[AVERAGE] = float(np.mean(recipe))
    return row | {
        "tasks_dtype": metrics.get("dtype"),
        "tasks_hardware": hardware_label(metrics.get("hardware")),
        "lm_eval": metrics.get("lm_eval"),
    }


def _efficiency_columns(metrics: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        name: metrics[name] for name in ("non_embedding_parameters", "bytes") if name in metrics
    }
    parts = {
        "macs": ("macs", "batch", "length"),
        "prefill": ("batch", "length", "latency_s", "tokens_per_s", "repeats"),
        "decode": ("batch", "prompt", "new_tokens", "latency_s", "tokens_per_s", "repeats"),
    }
    for part, names in parts.items():
        values = metrics.get(part) or {}
        row |= {
            "macs" if name == part else f"{part}_{name}": values[name]
            for name in names
            if name in values
        }
    memory = metrics.get("memory") or {}
    return row | {
        "peak_memory_bytes": memory.get("peak_bytes"),
        "memory_kind": memory.get("kind"),
        "hardware": hardware_label(metrics.get("hardware")),
        "hardware_class": metrics.get("hardware_class"),
        "undisturbed": metrics.get("comparable"),
        "dtype": metrics.get("dtype"),
        "place": measured_on(metrics),
    }


def measured_on(metrics: Mapping[str, Any]) -> str:
    """Where timings come from: hardware class, hardware and dtype; only one shares a column."""
    place = f"{hardware_label(metrics.get('hardware'))}, {metrics.get('dtype')}"
    name = metrics.get("hardware_class")
    return f"{name}: {place}" if name else place


def main_place(frame: pd.DataFrame, model: str) -> str | None:
    """The place where most timings of a model were measured; the first one at a tie."""
    if "place" not in frame.columns:
        return None
    counts = frame.loc[frame["model"] == model, "place"].value_counts(sort=False)
    return None if counts.empty else str(counts.idxmax())


def _size_columns(report: Report, cell: Cell) -> dict[str, Any]:
    plan = cell.content("prune")
    if plan:
        counts = plan.get("parameters") or {}
        return {
            "realised_ratio": counts.get("removed_ratio"),
            # Where what was removed is replaced by something smaller.
            **({"gross_ratio": counts["gross_ratio"]} if "gross_ratio" in counts else {}),
            "parameters": counts.get("remaining"),
            "removed_blocks": len(plan.get("removed_blocks") or ()),
        }
    if "prune" in cell.missing:
        return {}
    known = report.models.get(cell.model, {}).get("parameters")
    return {
        "realised_ratio": 0.0,
        "parameters": cell.content("efficiency").get("parameters", known),
        "removed_blocks": 0,
    }


def sharing_bytes(cell: Cell) -> dict[str, int]:
    """Bytes of a cell's checkpoint in full and as its plan alone, and of its adapter.

    From the records, so that they are known where the files are not. An adapter is stored in both
    forms; see docs/sharing.md.
    """
    sizes = {}
    if checkpoint := cell.artefacts.get("prune"):
        files = checkpoint.provenance["files"]
        sizes["checkpoint_bytes"] = sum(facts["size"] for facts in files.values())
        sizes["plan_bytes"] = files[CONTENT["prune"]]["size"]
    if adapter := cell.artefacts.get("recovery"):
        files = adapter.provenance["files"]
        sizes["adapter_bytes"] = sum(facts["size"] for facts in files.values())
    return sizes


def scoring_costs(cell: Cell) -> dict[str, Any]:
    """Seconds and peak memory (bytes) of the passes and scores that a cell was pruned by.

    Seconds are summed over steps; a pass that serves several methods counts for each. Peaks are
    the largest of any step's process, on the host and, where GPUs were used, on these. Empty where
    the record of the pruned model does not have them.
    """
    prune = cell.artefacts.get("prune")
    known = prune.provenance.get("upstream_costs") if prune else None
    steps = [cost for cost in (known or {}).values() if cost.get("step") in SCORING_STEPS]
    found: dict[str, Any] = {}
    for name, combine in (
        ("seconds", sum),
        ("peak_memory_bytes", max),
        ("peak_gpu_memory_bytes", max),
    ):
        values = [cost[name] for cost in steps if cost.get(name) is not None]
        if values:
            found[f"scoring_{name}"] = combine(values)
    return found


def _status(cell: Cell) -> str:
    if not cell.missing:
        return "complete"
    return "partial" if cell.artefacts else "missing"


def _row(report: Report, cell: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {
        "cell": cell.id,
        "model": cell.model,
        "method": cell.method,
        "control": cell.control,
        "target": cell.target_label,
        "target_kind": cell.target.kind if cell.target else None,
        "target_value": cell.target.value if cell.target else math.nan,
        "seed": cell.seed,
        "recovery": cell.recovery,
        "status": _status(cell),
        "missing": "; ".join(f"{step}: {why}" for step, why in sorted(cell.missing.items())),
    }
    row |= _size_columns(report, cell) | sharing_bytes(cell) | scoring_costs(cell)
    if trained := cell.content("recovery").get("trainable_parameters"):
        row["trained_parameters"] = trained
    if cell.content("perplexity"):
        row |= _perplexity_columns(cell.content("perplexity"))
    if cell.content("tasks"):
        row |= _task_columns(cell.content("tasks"))
    if cell.content("efficiency"):
        row |= _efficiency_columns(cell.content("efficiency"))
    row["non_finite"] = "; ".join(
        sorted(
            name
            for name, value in row.items()
            if isinstance(value, float) and not math.isfinite(value) and name != "target_value"
        )
        + (["window_nll"] if not np.isfinite(window_nll(cell)).all() else [])
    )
    for step in STEPS:
        artefact = cell.artefacts.get(step)
        row[f"{step}_key"] = artefact.key if artefact else None
    return row


def load_cells(report: Report) -> pd.DataFrame:
    """One tidy row per cell: what it is, every figure, its conventions and the keys behind it.

    Missing figures are NaN or None; ``non_finite`` names those that were measured as NaN or
    infinite, ``missing`` the steps without a valid artefact.
    """
    import pandas as pd

    rows = [_row(report, cell) for cell in report.cells]
    # Columns of one step stay together, in the order in which the fullest row has them.
    columns: list[str] = []
    for row in sorted(rows, key=len, reverse=True):
        columns += [name for name in row if name not in columns]
    columns.sort(key=lambda name: name.endswith("_key"))
    frame = pd.DataFrame(rows, columns=columns)
    frame["seed"] = frame["seed"].astype("Int64")
    return frame


def window_nll(cell: Cell) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean NLL of each perplexity window of a cell; empty where it was not measured."""
    return np.asarray(cell.content("perplexity").get("window_nll") or [], dtype=np.float64)


def metric_columns(frame: pd.DataFrame) -> list[str]:
    """Columns of the frame that are figures to be averaged over seeds."""
    endings = tuple(f"_{kind}" for kind in TASK_METRICS)
    tasks = [
        name
        for name in frame.columns
        if name == AVERAGE or (name.endswith(endings) and name not in METRICS)
    ]
    return [name for name in METRICS if name in frame.columns] + tasks


GROUP = ["model", "method", "target", "recovery"]


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation and 95 % t interval over seeds.

    Seeds that share an artefact (a method that draws no random numbers) are one observation, so
    they do not feign certainty. Timings are those of the hardware that most of the model's rows
    were measured on; those of other hardware, and non-finite figures, are left out.

    Returns:
        Long format: model, method, target, recovery, metric, mean, sd, low, high, n. Rows keep
        the order of the cells.
    """
    import pandas as pd

    records: list[dict[str, Any]] = []
    for group, members in frame.groupby(GROUP, sort=False, dropna=False):
        for name in metric_columns(frame):
            rows = members
            if name in TIMED:
                rows = rows[rows["place"] == main_place(frame, str(rows["model"].iloc[0]))]
            key = f"{metric_of(name).step}_key"
            values = pd.to_numeric(rows[name], errors="coerce")
            rows = rows[np.isfinite(values.to_numpy(dtype=float))]
            distinct = rows[~(rows[key].notna() & rows[key].duplicated())]
            if distinct.empty:
                continue
            result = estimate(distinct[name].astype(float).to_numpy())
            names = cast("tuple[str, ...]", group)
            records.append(dict(zip(GROUP, names, strict=True)) | {"metric": name} | vars(result))
    return pd.DataFrame(records, columns=[*GROUP, "metric", "mean", "sd", "low", "high", "n"])


def summary_tree(summary: pd.DataFrame) -> dict[str, Any]:
    """Nested numbers: model -> method -> target -> recovery -> metric -> statistic.

    Rounded to ten significant digits, so that the bytes do not depend on the last bit; what
    cannot be computed (the spread of one seed) is left out.
    """
    tree: dict[str, Any] = {}
    for record in summary.to_dict("records"):
        node = tree
        for level in (*GROUP, "metric"):
            node = node.setdefault(str(record[level]), {})
        for name in ("mean", "sd", "low", "high"):
            value = record[name]
            if value is not None and math.isfinite(value):
                node[name] = float(f"{value:.10g}")
        node["n"] = int(record["n"])
    return tree


def number(value: Any, digits: int = 4) -> str:
    """A figure for people: four significant digits, thousands grouped, true minus signs."""
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        return ""
    if math.isinf(value):
        return f"{MINUS if value < 0 else ''}∞"
    if value and (abs(value) >= 10**7 or abs(value) < 10**-4):
        text = f"{value:.{digits - 1}e}"
    elif abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.{0 if abs(value) >= 10**digits else 1}f}"
    else:
        text = f"{value:#.{digits}g}".rstrip(".")
    return text.replace("-", MINUS)


def neutralise(text: str) -> str:
    """Disarm text that a spreadsheet would run as a formula, by a leading apostrophe."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def to_csv(frame: pd.DataFrame) -> str:
    """CSV text of a frame; text cells and headings that look like formulas are disarmed."""
    safe = frame.rename(columns=neutralise).astype(object)
    safe = safe.map(lambda value: neutralise(value) if isinstance(value, str) else value)
    return str(safe.to_csv(index=False, lineterminator="\n"))


# ---------------------------------------------------------------------------- paired differences


@dataclass(frozen=True)
class Documents:
    """Scores per document of one group, averaged over its distinct seeds."""

    scores: np.ndarray[Any, np.dtype[np.float64]]
    convention: str
    seeds: int


def realised_ratio(cells: Iterable[Cell]) -> float | None:
    """Mean share of parameters removed by the cells of a group; None while unknown."""
    ratios = []
    for cell in cells:
        if cell.target is None:
            ratios.append(0.0)
        else:
            ratio = _number((cell.content("prune").get("parameters") or {}).get("removed_ratio"))
            ratios += [ratio] if math.isfinite(ratio) else []
    return float(np.mean(ratios)) if ratios else None


def same_budget(report: Report, cell: Cell, candidates: list[list[Cell]]) -> list[Cell]:
    """The candidate group with the same target as ``cell``, or the nearest realised ratio.

    Candidates are groups of the same model and recovery. Empty where none is within
    ``BUDGET_TOLERANCE`` of the cell's own realised ratio.
    """
    for group in candidates:
        if group[0].target == cell.target:
            return group
    own = realised_ratio(report.groups[cell.group])
    ratios = [(realised_ratio(group), group) for group in candidates]
    if own is None:
        return []
    near = [(abs(own - ratio), group) for ratio, group in ratios if ratio is not None]
    gap, best = min(near, key=lambda pair: pair[0], default=(math.inf, []))
    return best if gap <= BUDGET_TOLERANCE else []


def _documents(cells: list[Cell], metric: str) -> Documents | str:
    """Per-document scores of a group, or why there are none."""
    seen: dict[str, tuple[np.ndarray[Any, np.dtype[np.float64]], str]] = {}
    for cell in cells:
        if metric == "nll":
            scores, convention = window_nll(cell), convention_label(cell.content("perplexity"))
            artefact = cell.artefacts.get("perplexity")
        else:
            task, _, kind = metric.rpartition("/")
            result = (cell.content("tasks").get("tasks") or {}).get(task) or {}
            items = (result.get("items") or {}).get(kind) or []
            scores = np.asarray(items, dtype=np.float64)
            convention = f"{task} version {result.get('version')}"
            artefact = cell.artefacts.get("tasks")
        if artefact is not None and len(scores):
            seen[artefact.key] = (scores, convention)
    if not seen:
        return "not measured"
    arrays, conventions = zip(*seen.values(), strict=True)
    if len(set(conventions)) > 1 or len({len(array) for array in arrays}) > 1:
        return "its seeds were measured in different conventions"
    mean = np.mean(arrays, axis=0)
    if not np.isfinite(mean).all():
        return "non-finite scores"
    return Documents(mean, conventions[0], len(arrays))


def _paired_metrics(report: Report) -> list[str]:
    tasks: set[str] = set()
    for cell in report.cells:
        for task, result in (cell.content("tasks").get("tasks") or {}).items():
            items = result.get("items") or {}
            tasks |= {f"{task}/{kind}" for kind in TASK_METRICS if items.get(kind)}
    return ["nll", *sorted(tasks)]


def _references(report: Report, cells: list[Cell]) -> list[tuple[str, list[Cell], str]]:
    """(name, cells, note) of what a group is compared with: the baseline, and dense."""
    first = cells[0]
    found: list[tuple[str, list[Cell], str]] = []
    baseline = report.baseline
    if baseline not in (None, "dense", first.method) and first.control in (None, "random"):
        candidates = [
            members
            for (model, method, _, recovery), members in report.groups.items()
            if (model, method, recovery) == (first.model, baseline, first.recovery)
            and members[0].control != "prune_zero"
        ]
        match = same_budget(report, first, candidates)
        note = "" if match else "the baseline has no row at this budget and recovery"
        if match and match[0].target != first.target:
            note = f"nearest budget: {match[0].target_label}"
        found.append((str(baseline), match, note))
    dense = [
        cell for cell in report.controls if (cell.model, cell.control) == (first.model, "dense")
    ]
    if dense and first.control != "dense":
        found.append(("dense", dense, ""))
    return found


def paired_differences(report: Report) -> pd.DataFrame:
    """Differences to the baseline and to dense on the same documents, with 95 % intervals.

    Scores are averaged over seeds per document first (NLL per perplexity window, 0/1 or chrF per
    task item); the mean difference over documents has a bootstrap interval (10,000 resamples) and a
    t interval. A difference is called only where both exclude 0. Intervals are over documents, with
    the seeds as they are, and are not corrected for the number of comparisons.

    Returns:
        One row per comparison and metric: model, method, target, recovery, reference, metric
        (``nll`` or ``task/acc``), documents, seeds, difference, low, high, t_low, t_high,
        ratio, ratio_low, ratio_high (of perplexities; NaN for tasks), verdict, note.
    """
    import pandas as pd

    records: list[dict[str, Any]] = []
    pending: dict[tuple[str, int], list[tuple[int, np.ndarray[Any, np.dtype[np.float64]]]]] = {}
    for group, cells in report.groups.items():
        for reference, others, note in _references(report, cells):
            for metric in _paired_metrics(report):
                record: dict[str, Any] = dict(zip(GROUP, group, strict=True))
                record |= {"reference": reference, "metric": metric, "note": note}
                difference = _difference(cells, others, metric)
                if difference == "not measured":
                    continue
                if isinstance(difference, str):
                    record |= {"verdict": "not comparable", "note": note or difference}
                else:
                    values, seeds = difference
                    record |= {"seeds": seeds, "documents": len(values)}
                    pending.setdefault((metric, len(values)), []).append((len(records), values))
                records.append(record)
    for (metric, _), entries in pending.items():
        _fill_intervals(records, metric, entries)
    columns = [*GROUP, "reference", "metric", "documents", "seeds", "difference", "low", "high"]
    columns += ["t_low", "t_high", "ratio", "ratio_low", "ratio_high", "verdict", "note"]
    return pd.DataFrame(records, columns=columns)


def _difference(
    cells: list[Cell], others: list[Cell], metric: str
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], str] | str:
    ours, theirs = _documents(cells, metric), _documents(others, metric)
    if isinstance(ours, str):
        return ours
    if isinstance(theirs, str):
        return f"reference: {theirs}"
    if ours.convention != theirs.convention:
        return f"other convention: {ours.convention} against {theirs.convention}"
    if len(ours.scores) != len(theirs.scores):
        return f"other documents: {len(ours.scores)} against {len(theirs.scores)}"
    if len(ours.scores) < 2:
        return "a single document has no interval"
    return ours.scores - theirs.scores, f"{ours.seeds} / {theirs.seeds}"


def _fill_intervals(
    records: list[dict[str, Any]],
    metric: str,
    entries: list[tuple[int, np.ndarray[Any, np.dtype[np.float64]]]],
) -> None:
    limits = bootstrap_limits(np.stack([values for _, values in entries], axis=1))
    for column, (index, values) in enumerate(entries):
        n, mean = len(values), float(values.mean())
        half = student_t_quantile(0.975, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
        low, high = (float(limit) for limit in limits[:, column])
        record = records[index]
        record |= {"difference": mean, "low": low, "high": high}
        record |= {"t_low": mean - half, "t_high": mean + half}
        better = "lower" if metric == "nll" else "higher"
        if min(low, mean - half) > 0:
            record["verdict"] = "worse" if better == "lower" else "better"
        elif max(high, mean + half) < 0:
            record["verdict"] = "better" if better == "lower" else "worse"
        else:
            record["verdict"] = "not distinguishable"
        if metric == "nll":
            record |= {"ratio": _exp(mean), "ratio_low": _exp(low), "ratio_high": _exp(high)}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
