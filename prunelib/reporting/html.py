"""The report as one HTML file that asks nothing of the network.

Every text goes through the template's escaping, and a content security policy allows only the
report's own script, so a hostile name in an experiment stays a name.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prunelib.reporting.artefacts import STEPS, Cell, Report, hardware_label
from prunelib.reporting.flags import Flag, describe_recovery, flags_of, packages_of
from prunelib.reporting.plots import Plot, styles
from prunelib.reporting.published import Comparison
from prunelib.reporting.table import (
    AVERAGE,
    MINUS,
    convention_label,
    main_place,
    metric_columns,
    metric_of,
    number,
    sharing_bytes,
)

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = "report.html.j2"

# Metrics of the main table; timings have a table per hardware.
_QUALITY = ("perplexity", "realised_ratio", "parameters", "trained_parameters")
_COSTS = (
    "parameters",
    "macs",
    "prefill_latency_s",
    "prefill_tokens_per_s",
    "decode_latency_s",
    "decode_tokens_per_s",
    "peak_memory_bytes",
)


def formatter(metric: str) -> Callable[[float], str]:
    """How figures of a metric are written: percent, millions, milliseconds, MiB or plain."""
    description = metric_of(metric)
    if metric in ("parameters", "non_embedding_parameters", "trained_parameters"):
        return lambda value: f"{value / 1e6:,.2f}"
    if metric == "macs":
        return lambda value: f"{value / 1e9:,.2f}"
    if metric.endswith("_bytes") or metric == "bytes":
        return lambda value: f"{value / 2**20:,.1f}"
    if metric.endswith("_latency_s"):
        return lambda value: f"{value * 1000:,.1f}"
    if description.unit == "share":
        return lambda value: f"{100 * value:.2f}"
    return number


def heading(metric: str) -> str:
    """Column heading of a metric with the unit that ``formatter`` writes."""
    units = {
        "parameters": "parameters, M",
        "non_embedding_parameters": "non-embedding parameters, M",
        "trained_parameters": "trained parameters, M",
        "macs": "MACs, G",
        "prefill_latency_s": "prefill, ms",
        "decode_latency_s": "decode, ms",
        "peak_memory_bytes": "peak memory, MiB",
        AVERAGE: "average of 7 tasks, %",
    }
    description = metric_of(metric)
    unit = "%" if description.unit == "share" else description.unit
    return units.get(metric) or (f"{description.label}, {unit}" if unit else description.label)


def _statistic(record: Mapping[Any, Any] | None, metric: str) -> dict[str, Any]:
    """A table cell: text, sort key, and the interval as a second line."""
    if record is None:
        return {"text": "", "sort": "", "interval": ""}
    write = formatter(metric)
    interval = ""
    if record["n"] > 1 and write(record["low"]) != write(record["high"]):
        interval = f"± {write(record['sd'])} [{write(record['low'])}, {write(record['high'])}]"
        interval = interval.replace("-", MINUS)
    return {"text": write(record["mean"]), "sort": record["mean"], "interval": interval}


def summary_rows(
    report: Report, summary: pd.DataFrame, flags: Iterable[Flag], metrics: Iterable[str]
) -> list[dict[str, Any]]:
    """Rows of the main table: one per model, method, target and recovery, controls included."""
    index = {
        (r["model"], r["method"], r["target"], r["recovery"], r["metric"]): r
        for r in summary.to_dict("records")
    }
    looks, found = styles(report), list(flags)
    rows = []
    for group, cells in report.groups.items():
        first = cells[0]
        names = dict.fromkeys(
            name for cell in cells for name in flags_of(cell.id, found).split("; ") if name
        )
        dense = index.get((first.model, *_dense_group(report, first.model), "perplexity"))
        perplexity = index.get((*group, "perplexity"))
        ratio = perplexity["mean"] / dense["mean"] if perplexity and dense else math.nan
        rows.append(
            {
                "model": first.model,
                "method": first.display,
                "colour": looks[first.method].colour if first.method in looks else "#000000",
                "control": first.control,
                "target": first.target_label,
                "recovery": first.recovery,
                "seeds": len(cells),
                "ratio": number(ratio, 3),
                "ratio_sort": ratio if math.isfinite(ratio) else "",
                "values": [_statistic(index.get((*group, name)), name) for name in metrics],
                "flags": list(names),
                "off": "off budget" in names,
                "absent": not any(cell.artefacts for cell in cells),
            }
        )
    return rows


def _dense_group(report: Report, model: str) -> tuple[str, str, str]:
    for cell in report.controls:
        if (cell.model, cell.control) == (model, "dense"):
            return cell.group[1:]
    return ("", "", "")


def flag_groups(flags: Iterable[Flag]) -> list[dict[str, Any]]:
    """Flags by rule, in the order of severity; cells that say the same share a line."""
    rules: dict[tuple[str, str], dict[str, list[str]]] = {}
    for flag in flags:
        messages = rules.setdefault((flag.severity, flag.rule), {})
        messages.setdefault(flag.message, []).extend(flag.cells)
    return [
        {"severity": severity, "rule": rule, "messages": messages}
        for (severity, rule), messages in rules.items()
    ]


def cost_tables(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """One table of efficiency per hardware and dtype: means over the cells of a group."""
    if "place" not in frame.columns:
        return []
    measured = frame[frame["efficiency_key"].notna()]
    tables = []
    for place, part in measured.groupby("place", sort=False):
        metrics = [name for name in _COSTS if name in part and part[name].notna().any()]
        rows = []
        for group, members in part.groupby(["model", "method", "target", "recovery"], sort=False):
            values = [members[name].astype(float).mean() for name in metrics]
            cells = [
                {
                    "text": "" if math.isnan(value) else formatter(name)(value),
                    "sort": "" if math.isnan(value) else value,
                }
                for name, value in zip(metrics, values, strict=True)
            ]
            busy = bool(members["undisturbed"].eq(False).any())
            rows.append({"names": list(group), "values": cells, "busy": busy})
        tables.append(
            {
                "place": place,
                "main": any(main_place(frame, m) == place for m in part["model"].unique()),
                "headings": [heading(name) for name in metrics],
                "rows": rows,
                "conditions": _cost_conditions(part),
            }
        )
    return tables


def scoring_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """What scoring took per model and method: mean seconds and largest peaks over its runs."""
    names = ("scoring_seconds", "scoring_peak_memory_bytes", "scoring_peak_gpu_memory_bytes")
    present = [name for name in names if name in frame.columns]
    if not present:
        return []
    # Cells that differ in recovery alone share their pruned model.
    scored = frame[frame[names[0]].notna()].drop_duplicates("prune_key")
    rows = []
    for group, runs in scored.groupby(["model", "method"], sort=False):
        values = dict.fromkeys(names, math.nan)
        for name in present:
            values[name] = runs[name].mean() if name == names[0] else runs[name].max()
        texts = [
            ""
            if math.isnan(value)
            else (number(value) if name == names[0] else f"{value / 2**20:,.0f}")
            for name, value in values.items()
        ]
        rows.append(
            {"names": list(cast("tuple[str, str]", group)), "runs": len(runs), "values": texts}
        )
    return rows


def _cost_conditions(part: pd.DataFrame) -> str:
    texts = []
    for name, label in (
        ("prefill_batch", "prefill batch"),
        ("prefill_length", "prefill tokens"),
        ("decode_prompt", "decode prompt"),
        ("decode_new_tokens", "new tokens"),
        ("prefill_repeats", "repeats"),
        ("memory_kind", "memory"),
    ):
        if name in part:
            values = [f"{value:g}" if isinstance(value, float) else str(value)
                      for value in part[name].dropna().unique()]  # fmt: skip
            texts.append(f"{label} {', '.join(values)}")
    return "; ".join(texts)


def paired_rows(paired: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of the table of paired differences, in the order of the experiment."""
    rows = []
    for record in paired.to_dict("records"):
        nll = record["metric"] == "nll"
        scale = 1.0 if nll else 100.0
        low, high = (_signed(scale * record[name], nll) for name in ("low", "high"))
        ratio = ""
        if nll and not math.isnan(record["ratio"]):
            ratio = f"{number(record['ratio'], 3)} [{number(record['ratio_low'], 3)}, "
            ratio += f"{number(record['ratio_high'], 3)}]"
        known = not math.isnan(record["difference"])
        documents = record["documents"]
        rows.append(
            {name: record[name] for name in ("model", "method", "target", "recovery", "reference")}
            | {
                "metric": "perplexity (NLL)" if nll else record["metric"].replace("/", " "),
                "documents": "" if math.isnan(documents) else f"{documents:.0f}",
                "seeds": record["seeds"] if isinstance(record["seeds"], str) else "",
                "difference": _signed(scale * record["difference"], nll) if known else "",
                "sort": record["difference"] if known else "",
                "interval": f"[{low}, {high}]" if known else "",
                "ratio": ratio,
                "verdict": record["verdict"],
                "note": record["note"] if isinstance(record["note"], str) else "",
            }
        )
    return rows


def _signed(value: float, nll: bool) -> str:
    if math.isnan(value):
        return ""
    text = f"{value:+.4f}" if nll else f"{value:+.2f}"
    return text.replace("-", MINUS)


def headlines(report: Report, summary: pd.DataFrame) -> list[str]:
    """One sentence per model, target and recovery: who has the lowest perplexity."""
    perplexity = summary[summary["metric"] == "perplexity"].to_dict("records")
    controls = {cell.group for cell in report.controls if cell.control != "random"}
    sentences = []
    spots = dict.fromkeys((r["model"], r["target"], r["recovery"]) for r in perplexity)
    for spot in spots:
        rows = [
            r
            for r in perplexity
            if (r["model"], r["target"], r["recovery"]) == spot
            and (r["model"], r["method"], r["target"], r["recovery"]) not in controls
        ]
        if len(rows) < 2:
            continue
        best, second, *_ = sorted(rows, key=lambda r: float(r["mean"]))
        dense = [
            r["mean"]
            for r in perplexity
            if (r["model"], r["method"], r["target"], r["recovery"])
            == (spot[0], *_dense_group(report, spot[0]))
        ]
        times = f", {best['mean'] / dense[0]:.2f} times dense" if dense else ""
        stage = "without recovery" if spot[2] == "none" else f"after {spot[2]}"
        sentences.append(
            f"{spot[0]}, {spot[1]}, {stage}: {best['method']} has the lowest perplexity "
            f"({number(best['mean'])}{times}); next is {second['method']} "
            f"({number(second['mean'])})."
        )
    return sentences


def methods_paragraph(report: Report) -> str:
    """A Methods paragraph in plain words, from what the artefacts say was really done."""
    models = ", ".join(
        f"{name} ({entry.get('source')})" if entry.get("source") else name
        for name, entry in report.models.items()
    )
    pruned = [cell for cell in report.cells if cell.target and cell.control != "prune_zero"]
    methods = dict.fromkeys(cell.method for cell in pruned)
    titles = [str(report.methods.get(name, {}).get("title") or name) for name in methods]
    targets = dict.fromkeys(cell.target_label for cell in pruned)
    seeds = dict.fromkeys(str(cell.seed) for cell in pruned if cell.seed is not None)
    text = f"We pruned {models} with {_listed(titles)} to {_listed(list(targets))}"
    text += f" with seeds {_listed(list(seeds))}. " if seeds else ". "
    calibration = report.experiment.get("calibration")
    if calibration:
        text += f"Importance was estimated on the calibration set {_plain(calibration)}. "
    recovered = next((c for c in report.cells if c.artefacts.get("recovery")), None)
    if recovered:
        text += f"Recovery was {recovered.recovery} ({describe_recovery(report, recovered)}). "
    conventions = _conventions(report)
    if conventions:
        text += f"Perplexity was measured in the convention {_listed(conventions)}. "
    tasks = sorted({t for c in report.cells for t in (c.content("tasks").get("tasks") or {})})
    if tasks:
        version = next(v for c in report.cells if (v := c.content("tasks").get("lm_eval")) or True)
        text += f"Zero-shot tasks ({_listed(tasks)}) were run with lm-eval {version or ''}. "
    text += (
        "Means over seeds carry Student t intervals (95 %); differences are paired per document, "
        "with bootstrap intervals (10,000 resamples). "
    )
    packages = sorted(
        {
            f"{name} {version}"
            for cell in report.cells
            for step in STEPS
            for name, version in packages_of(cell, step).items()
        }
    )
    hardware = _listed(sorted({h for c in report.cells for h in _hardware(c)}))
    text += f"Hardware: {hardware}. " if hardware else ""
    return text + (f"Software: {', '.join(packages)}." if packages else "")


def citations(report: Report) -> str:
    """BibTeX of the methods and models that have cells, each entry once."""
    entries = [
        report.methods.get(name, {}).get("citation")
        for name in dict.fromkeys(cell.method for cell in report.cells)
    ]
    entries += [
        report.models.get(name, {}).get("citation")
        for name in dict.fromkeys(cell.model for cell in report.cells)
    ]
    return "\n\n".join(dict.fromkeys(str(entry).strip() for entry in entries if entry))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return _listed([str(v) for v in value]) if isinstance(value, list | tuple) else str(value)


def _listed(items: list[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _conventions(report: Report) -> list[str]:
    found = [convention_label(c.content("perplexity")) for c in report.cells]
    return list(dict.fromkeys(label for label in found if label))


def _hardware(cell: Cell) -> set[str]:
    found = [cell.content(step).get("hardware") for step in ("perplexity", "tasks", "efficiency")]
    return {hardware_label(value) for value in found if value}


def provenance_rows(report: Report) -> list[dict[str, Any]]:
    """What every cell was made from: keys, upstream keys, versions, hardware, commit, seconds."""
    rows = []
    for cell in report.cells:
        steps = []
        for step in STEPS:
            artefact = cell.artefacts.get(step)
            if artefact is None:
                if step in cell.missing:
                    steps.append({"step": step, "missing": cell.missing[step]})
                continue
            record = artefact.provenance
            upstream = record.get("upstream")
            steps.append(
                {
                    "step": step,
                    "key": artefact.key,
                    "directory": str(artefact.directory),
                    "upstream": _plain(upstream) if upstream else "",
                    "packages": _plain(packages_of(cell, step)),
                    "hardware": hardware_label(
                        artefact.content.get("hardware") or (record.get("host") or {}).get("name")
                    ),
                    "commit": _commit(record.get("git")),
                    "seconds": number(record.get("seconds"), 3),
                }
            )
        rows.append({"id": cell.id, "title": _title(cell), "steps": steps})
    return rows


def sharing_sizes(report: Report) -> str:
    """One sentence: what checkpoints and adapters take in full, and checkpoints as plans."""
    found: dict[str, dict[str, int]] = {}
    for cell in report.cells:
        for name, size in sharing_bytes(cell).items():
            step = "recovery" if name == "adapter_bytes" else "prune"
            found.setdefault(name, {})[cell.artefacts[step].key] = size
    if not found:
        return ""
    total = {name: sum(sizes.values()) / 1e6 for name, sizes in found.items()}
    sentences = []
    if "checkpoint_bytes" in found:
        sentences.append(
            f"{len(found['checkpoint_bytes'])} pruned checkpoints take "
            f"{total['checkpoint_bytes']:,.1f} MB; shared as plans, from which the same bytes are "
            f"made again, {total['plan_bytes']:,.3f} MB"
        )
    if "adapter_bytes" in found:
        sentences.append(
            f"{len(found['adapter_bytes'])} adapters take {total['adapter_bytes']:,.1f} MB in both "
            "forms"
        )
    return "; ".join(sentences) + "."


def _commit(git: Any) -> str:
    if not isinstance(git, Mapping):
        return ""
    return f"{git.get('commit')}{' with local changes' if git.get('dirty') else ''}"


def _title(cell: Cell) -> str:
    seed = f", seed {cell.seed}" if cell.seed is not None else ""
    recovery = f", {cell.recovery}" if cell.recovery != "none" else ""
    return f"{cell.model}: {cell.display}, {cell.target_label}{seed}{recovery}"


def render(
    report: Report,
    *,
    frame: pd.DataFrame,
    summary: pd.DataFrame,
    paired: pd.DataFrame,
    flags: list[Flag],
    comparisons: list[Comparison],
    plots: list[Plot],
    csv: str,
) -> str:
    """The whole report as one self-contained HTML page.

    Args:
        report: the experiment and its finished cells.
        frame: one row per cell (``table.load_cells``).
        summary: averages over seeds (``table.summarise``).
        paired: paired differences (``table.paired_differences``).
        flags: what to know before trusting a row.
        comparisons: published figures beside ours.
        plots: PNG plots, embedded as data URIs.
        csv: text of benchmark.csv, offered for download from within the page.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = Path(__file__).with_name("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    tasks = [name for name in metric_columns(frame) if metric_of(name).step == "tasks"]
    metrics = [name for name in (*_QUALITY, *tasks) if name in frame.columns]
    used = dict.fromkeys(cell.method for cell in report.cells)
    return environment.get_template(TEMPLATE).render(
        name=str(report.experiment.get("name") or "benchmark"),
        description=str(report.experiment.get("description") or ""),
        baseline=report.baseline,
        cells=len(report.cells),
        complete=sum(not cell.missing for cell in report.cells),
        headlines=headlines(report, summary),
        headings=[heading(name) for name in metrics],
        rows=summary_rows(report, summary, flags, metrics),
        costs=cost_tables(frame),
        scoring=scoring_rows(frame),
        paired=paired_rows(paired),
        flags=flag_groups(flags),
        comparisons=comparisons,
        plots=[(plot, base64.b64encode(plot.png).decode()) for plot in plots],
        provenance=provenance_rows(report),
        sizes=sharing_sizes(report),
        models=report.models,
        texts=report.texts,
        methods={name: report.methods[name] for name in used if name in report.methods},
        paragraph=methods_paragraph(report),
        conventions=_conventions(report),
        citations=citations(report),
        csv=base64.b64encode(csv.encode()).decode(),
        number=number,
        plain=_plain,
        script=script,
        digest=digest,
    )
