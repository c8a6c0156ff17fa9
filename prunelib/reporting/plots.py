"""The plots of a report, as PNG files.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; a method has the same
colour and marker in every plot, and open markers stand for before recovery, filled ones for after.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prunelib.evaluation.tasks import CHOICE_METRICS, TASK_METRICS
from prunelib.reporting.artefacts import Cell, Report, read_losses
from prunelib.reporting.stats import estimate
from prunelib.reporting.table import measured_on, number, realised_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
# Black is kept for the controls; yellow is too pale on white and comes last.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F4F24", "#8A8D00")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
CONTROL_COLOUR = "#444444"
FAINT = "#9a9a9a"

# The panels before and after recovery share an axis unless that would squeeze one of them.
_SHARED_RANGE = 100

# Accuracy of blind guessing.
CHANCE = {
    "boolq": 0.5,
    "piqa": 0.5,
    "winogrande": 0.5,
    "hellaswag": 0.25,
    "arc_easy": 0.25,
    "arc_challenge": 0.25,
    "openbookqa": 0.25,
    "local_continuation": 0.25,
    "local_analogies": 0.25,
}
# Tasks whose length-normalised accuracy is the customary one.
NORMALISED = ("hellaswag", "arc_challenge", "openbookqa", "local_continuation")


@dataclass(frozen=True)
class Plot:
    """One plot: file name, what it shows, and its PNG bytes."""

    name: str
    title: str
    caption: str
    png: bytes

    @property
    def width(self) -> int:
        """Width in CSS pixels at which all plots have letters of the same size."""
        return round(int.from_bytes(self.png[16:20], "big") * 108 / DPI)


@dataclass(frozen=True)
class Style:
    """Colour and marker of a method."""

    colour: str
    marker: str


def styles(report: Report) -> dict[str, Style]:
    """One style per method, the same in every plot, in the order of the experiment."""
    found: dict[str, Style] = {}
    index = 0
    for cell in report.cells:
        if cell.method in found:
            continue
        if cell.control in ("dense", "recovery_only"):
            found[cell.method] = Style("black", "*")
            continue
        if cell.control == "prune_zero":
            continue
        colour = PALETTE[index % len(PALETTE)]
        marker = MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]
        if cell.control == "random":
            colour, marker = FAINT, "X"
        else:
            index += 1
        found[cell.method] = Style(colour, marker)
    return found


def _models(report: Report) -> list[str]:
    return list(dict.fromkeys(cell.model for cell in report.cells))


def _perplexities(cells: Sequence[Cell]) -> list[float]:
    """Finite perplexities of the distinct measurements of a group."""
    found: dict[str, float] = {}
    for cell in cells:
        value = cell.content("perplexity").get("perplexity")
        if isinstance(value, int | float) and math.isfinite(value) and value > 0:
            found[cell.artefacts["perplexity"].key] = float(value)
    return list(found.values())


def _control(report: Report, model: str, control: str) -> list[Cell]:
    return [cell for cell in report.controls if (cell.model, cell.control) == (model, control)]


def _pruned_groups(report: Report, model: str, *, recovered: bool) -> list[list[Cell]]:
    return [
        cells
        for (name, _, _, recovery), cells in report.groups.items()
        if name == model
        and cells[0].target is not None
        and cells[0].control != "prune_zero"
        and (recovery != "none") == recovered
    ]


def _geometric(values: Sequence[float]) -> tuple[float, float, float]:
    """Centre and lengths of the error bar (down, up): one standard deviation of the logarithm."""
    result = estimate(np.log(values))
    centre, spread = math.exp(result.mean), math.exp(result.sd or 0.0)
    return centre, centre - centre / spread, centre * spread - centre


def _figure(rows: int, columns: int, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure drawn without a display, in the common style."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(
        context="notebook",
        style="whitegrid",
        font_scale=0.85,
        rc={
            "axes.edgecolor": "#666666",
            "grid.color": "#e6e6e6",
            "font.family": "DejaVu Sans",
            "legend.frameon": False,
        },
    )
    return plt.subplots(rows, columns, squeeze=False, layout="constrained", **kwargs)


def _png(figure: Figure) -> bytes:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    # No software and version in the file: the same figures give the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _legend(figure: Figure, axes: Sequence[Axes], *, fillings: bool) -> None:
    """One legend for the whole figure, below it, each entry once.

    ``fillings`` adds what open and filled markers mean, where one panel holds both.
    """
    from matplotlib.lines import Line2D

    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if fillings:
        for label, face in (("before recovery", "white"), ("after recovery", CONTROL_COLOUR)):
            entries[label] = Line2D(
                [], [], marker="o", color=CONTROL_COLOUR, markerfacecolor=face, linestyle="none"
            )
    if entries:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower center",
            ncols=min(4, len(entries)),
        )


def _log_perplexity(axis: Axes, *, vertical: bool = True) -> None:
    """Logarithmic scale with plain numbers at 1, 2 and 5 times a power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ticks = axis.yaxis if vertical else axis.xaxis
    (axis.set_yscale if vertical else axis.set_xscale)("log")
    low, high = axis.get_ylim() if vertical else axis.get_xlim()
    decades = math.log10(high / low)
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0)
    ticks.set_major_locator(LogLocator(subs=subs if decades < 3 else (1.0,), numticks=20))
    ticks.set_minor_locator(NullLocator())
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


# ------------------------------------------------------------------------------ quality and ratio


def quality(report: Report) -> Plot | None:
    """Perplexity against the share of parameters really removed, before and after recovery."""
    models = [m for m in _models(report) if any(_points(report, m, r) for r in (False, True))]
    if not models:
        return None
    style = styles(report)
    figure, axes = _figure(len(models), 2, figsize=(10, 0.8 + 4.2 * len(models)), sharex="row")
    for row, model in enumerate(models):
        values = [
            v for r in (False, True) for _, _, seeds in _points(report, model, r) for v in seeds
        ]
        shared = max(values) / min(values) <= _SHARED_RANGE
        if shared:
            axes[row][1].sharey(axes[row][0])
        for column, recovered in enumerate((False, True)):
            axis = axes[row][column]
            _draw_quality(axis, report, model, style, recovered=recovered)
            axis.set_title(f"{model}, {'after' if recovered else 'before'} recovery")
            axis.set_xlabel("parameters removed, %")
        axes[row][0].set_ylabel("perplexity (log scale)")
        _pad(axes[row], report, model)
        for axis in axes[row][: 1 if shared else 2]:
            _log_perplexity(axis)
        axes[row][1].tick_params(labelleft=not shared)
    _legend(figure, axes.ravel(), fillings=False)
    return Plot(
        "quality",
        "Quality against realised ratio",
        "Perplexity on the evaluation text against the share of all parameters really removed. "
        "Markers: geometric mean over seeds; bars: one standard deviation of the logarithm; small "
        "dots: single seeds. Methods at the same ratio are set slightly apart to stay legible. "
        "Dashed: the dense model; dotted: the dense model after the same recovery. The two panels "
        "share their axis unless the perplexities span more than two decades.",
        _png(figure),
    )


def _points(report: Report, model: str, recovered: bool) -> list[tuple[Cell, float, list[float]]]:
    points = []
    for cells in _pruned_groups(report, model, recovered=recovered):
        ratio, values = realised_ratio(cells), _perplexities(cells)
        if ratio is not None and values:
            points.append((cells[0], 100 * ratio, values))
    return points


def _draw_quality(
    axis: Axes, report: Report, model: str, style: dict[str, Style], *, recovered: bool
) -> None:
    points = _points(report, model, recovered)
    names = [name for name in style if any(cell.method == name for cell, _, _ in points)]
    width = max([1.0, *(x for _, x, _ in points)]) * 0.006
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell, ratio, values in points:
        look = style[cell.method]
        x = ratio + (names.index(cell.method) - (len(names) - 1) / 2) * width
        centre, down, up = _geometric(values)
        axis.errorbar(
            x,
            centre,
            yerr=[[down], [up]],
            color=look.colour,
            marker=look.marker,
            markersize=7,
            markerfacecolor=look.colour if recovered else "white",
            markeredgewidth=1.6,
            capsize=3,
            linestyle="none",
            label=cell.method,
            zorder=3,
        )
        if len(values) > 1:
            axis.scatter([x] * len(values), values, s=9, color=look.colour, alpha=0.6, zorder=4)
        lines.setdefault(cell.method, []).append((x, centre))
    for method, line in lines.items():
        axis.plot(*zip(*sorted(line), strict=True), color=style[method].colour, linewidth=1)
    for control, dash in (("dense", "--"), ("recovery_only", ":")):
        values = _perplexities(_control(report, model, control))
        if values and (control == "dense" or recovered):
            axis.axhline(
                _geometric(values)[0],
                color="black",
                linestyle=dash,
                linewidth=1.2,
                label=control,
            )
    if not points:
        axis.text(0.5, 0.5, "no finished row", transform=axis.transAxes, ha="center", color=FAINT)


def _pad(axes: Sequence[Axes], report: Report, model: str) -> None:
    """At least eight percentage points on the axis, so that a single target is not a wide blur."""
    ratios = [x for r in (False, True) for _, x, _ in _points(report, model, r)]
    middle, half = (max(ratios) + min(ratios)) / 2, (max(ratios) - min(ratios)) / 2
    half = max(4.0, half * 1.12)
    axes[0].set_xlim(max(middle - half, -1.0), middle + half)


# -------------------------------------------------------------------------------- recovery arrows


def recovery(report: Report) -> Plot | None:
    """Perplexity before and after recovery, one row per method, joined by arrows."""
    models = [m for m in _models(report) if _pairs(report, m)]
    if not models:
        return None
    style = styles(report)
    counts = [len(_pairs(report, model)) for model in models]
    figure, axes = _figure(
        len(models),
        1,
        figsize=(9, 1.1 + sum(0.42 * n + 0.9 for n in counts)),
        height_ratios=[n + 2 for n in counts],
    )
    for axis, model in zip(axes[:, 0], models, strict=True):
        pairs = _pairs(report, model)
        for y, (_, method, before, after) in enumerate(pairs):
            look = style[method]
            axis.annotate(
                "",
                (after, y),
                (before, y),
                zorder=2,
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": look.colour,
                    "linewidth": 1.6,
                    "shrinkA": 5,
                    "shrinkB": 4,
                },
            )
            axis.scatter(
                before,
                y,
                s=52,
                facecolor="white",
                edgecolor=look.colour,
                linewidth=1.6,
                marker=look.marker,
                zorder=3,
            )
            axis.scatter(after, y, s=52, color=look.colour, marker=look.marker, zorder=4)
            rightmost = max(before, after)
            axis.annotate(
                f"{number(before)} → {number(after)}",
                (rightmost, y),
                (9, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
            if after > before:
                axis.annotate(
                    "rise",
                    (min(before, after), y),
                    (-9, 0),
                    ha="right",
                    va="center",
                    textcoords="offset points",
                    fontsize=8.5,
                    color="#b00020",
                )
        values = _perplexities(_control(report, model, "dense"))
        everything = [value for _, _, before, after in pairs for value in (before, after)] + values
        if values:
            axis.axvline(_geometric(values)[0], color="black", linestyle="--", linewidth=1.2)
        axis.set_yticks(range(len(pairs)), [label for label, *_ in pairs])
        axis.set_ylim(len(pairs) - 0.4, -0.6)
        span = max(everything) / min(everything)
        axis.set_xlim(min(everything) / span**0.08 / 1.05, max(everything) * span**0.3 * 1.1)
        _log_perplexity(axis, vertical=False)
        axis.set_xlabel("perplexity (log scale)")
        axis.set_title(f"{model}: open before, filled after recovery")
    return Plot(
        "recovery",
        "What recovery does",
        "Geometric mean over seeds of the perplexity before (open) and after (filled) recovery. "
        "Dashed: the dense model.",
        _png(figure),
    )


def _pairs(report: Report, model: str) -> list[tuple[str, str, float, float]]:
    """(label, method, before, after) of every recovered group, worst before recovery first."""
    recipes = {c.recovery for c in report.cells if c.model == model and c.recovery != "none"}
    pairs = []
    for (name, method, target, recipe), cells in report.groups.items():
        if name != model or recipe == "none" or cells[0].control == "prune_zero":
            continue
        if cells[0].control == "recovery_only":
            others = _control(report, model, "dense")
        else:
            others = report.groups.get((name, method, target, "none"), [])
        before, after = _perplexities(others), _perplexities(cells)
        if before and after:
            label = f"{method}, {target}" if cells[0].target else method
            label += f", {recipe}" if len(recipes) > 1 else ""
            pairs.append((label, method, _geometric(before)[0], _geometric(after)[0]))
    return sorted(pairs, key=lambda pair: -pair[2])


# ------------------------------------------------------------------------------------ kept widths

KIND_LABELS = {
    "block": "blocks kept, %",
    "kv_group": "kv groups kept, %",
    "mlp_channel": "MLP channels kept, %",
    "head": "heads kept, %",
    "query_slot": "query heads per kv head kept, %",
    "residual_channel": "residual channels kept, %",
}


def widths(plan: dict[str, Any]) -> dict[str, list[float]]:
    """Kept share of every unit kind per original layer; NaN for a removed block.

    A plan that removes whole blocks only has the one kind ``block``.
    """
    original = plan.get("original") or {}
    count = int(original.get("num_hidden_layers") or 0)
    removed = set(plan.get("removed_blocks") or ())
    # What runs through the whole model is as wide in every layer.
    whole = plan.get("kept") or {}
    layers = {
        int(layer["index"]): {**(layer.get("kept") or {}), **whole}
        for layer in plan.get("layers") or ()
    }
    kinds = list(dict.fromkeys(kind for kept in layers.values() for kind in kept))
    if not kinds:
        return {"block": [math.nan if i in removed else 1.0 for i in range(count)]}
    totals = {
        "kv_group": original.get("num_key_value_heads"),
        "head": original.get("num_attention_heads"),
        "mlp_channel": original.get("intermediate_size"),
    } | dict(original.get("units") or {})
    shares: dict[str, list[float]] = {}
    for kind in kinds:
        total = totals.get(kind) or 1 + max(
            (max(kept[kind]) for kept in layers.values() if kept.get(kind)), default=0
        )
        shares[kind] = [
            math.nan if i in removed else len(layers.get(i, {}).get(kind, range(total))) / total
            for i in range(count)
        ]
    return shares


def kept_width(report: Report) -> Plot | None:
    """Kept width per layer and method: a heat map per model and unit kind."""
    rows = {model: _plans(report, model) for model in _models(report)}
    rows = {model: plans for model, plans in rows.items() if plans}
    if not rows:
        return None
    kinds = list(dict.fromkeys(k for plans in rows.values() for _, shares in plans for k in shares))
    # A removed block is missing from every kind; it gets no panel of its own beside them.
    kinds = [kind for kind in kinds if kind != "block"] or kinds
    heights = [0.34 * len(plans) + 1.0 for plans in rows.values()]
    figure, axes = _figure(
        len(rows),
        len(kinds),
        figsize=(10, 0.6 + sum(heights)),
        height_ratios=heights,
        sharey="row",
    )
    for row, (model, plans) in enumerate(rows.items()):
        for column, kind in enumerate(kinds):
            _heat_map(axes[row][column], model, kind, plans, first=column == 0)
    mappable = axes[0][0].collections[0]
    bar = figure.colorbar(mappable, ax=axes, shrink=0.8, aspect=8 * sum(heights), pad=0.015)
    bar.set_label("kept, % of the dense layer")
    return Plot(
        "kept_width",
        "Kept width per layer",
        "Share of the units that every layer keeps (first seed of each method). Crossed cells are "
        "blocks removed as a whole.",
        _png(figure),
    )


def _plans(report: Report, model: str) -> list[tuple[str, dict[str, list[float]]]]:
    """(label, shares) of the first finished seed of every group that prunes."""
    found: dict[str, dict[str, list[float]]] = {}
    for cell in report.cells:
        plan = cell.content("prune")
        if cell.model == model and plan and cell.control != "prune_zero":
            found.setdefault(f"{cell.method}, {cell.target_label}", widths(dict(plan)))
    return list(found.items())


def _heat_map(
    axis: Axes,
    model: str,
    kind: str,
    plans: list[tuple[str, dict[str, list[float]]]],
    *,
    first: bool,
) -> None:
    layers = max((len(values) for _, shares in plans for values in shares.values()), default=1)
    grid = np.full((len(plans), layers), 100.0)
    for y, (_, shares) in enumerate(plans):
        values = shares.get(kind) or shares.get("block", [])
        grid[y, : len(values)] = 100 * np.asarray(values)
    image = axis.pcolormesh(
        np.ma.masked_invalid(grid),
        cmap="cividis",
        vmin=0,
        vmax=100,
        edgecolors="white",
        linewidth=0.6,
    )
    image.set_clip_on(False)
    removed = np.argwhere(np.isnan(grid))
    axis.set_facecolor("#eeeeee")
    axis.scatter(removed[:, 1] + 0.5, removed[:, 0] + 0.5, marker="x", color="#b00020", s=22)
    axis.set_ylim(len(plans), 0)
    axis.grid(False)
    axis.set_title(f"{model}: {KIND_LABELS.get(kind, f'{kind} kept, %')}")
    axis.set_xlabel("layer")
    step = max(1, 5 * math.ceil(layers / 50)) if layers > 12 else 1
    axis.set_xticks(np.arange(0, layers, step) + 0.5, [str(i) for i in range(0, layers, step)])
    if first:
        axis.set_yticks(np.arange(len(plans)) + 0.5, [label for label, _ in plans])


# ------------------------------------------------------------------------------ quality and speed


def latency(report: Report) -> Plot | None:
    """Perplexity against prefill and decode latency; one row per model and hardware."""
    rows: dict[tuple[str, str], list[tuple[list[Cell], dict[str, list[float]]]]] = {}
    for cells in report.groups.values():
        if cells[0].control == "prune_zero" or not _perplexities(cells):
            continue
        for place, timings in _timings(report, cells).items():
            rows.setdefault((cells[0].model, place), []).append((cells, timings))
    if not rows:
        return None
    style = styles(report)
    figure, axes = _figure(len(rows), 2, figsize=(10, 0.9 + 4.2 * len(rows)), sharey="row")
    for row, ((model, place), entries) in enumerate(rows.items()):
        for column, phase in enumerate(("prefill", "decode")):
            axis = axes[row][column]
            for cells, timings in entries:
                if timings[phase]:
                    _draw_latency(axis, cells, timings[phase], style[cells[0].method])
            axis.set_xlabel(_phase_label(entries[0][0], phase, report))
            axis.margins(0.12)
        axes[row][0].set_ylabel("perplexity (log scale)")
        axes[row][0].set_title(model, loc="left")
        axes[row][1].set_title(place, loc="right", fontsize=9)
        _log_perplexity(axes[row][0])
    _legend(figure, axes.ravel(), fillings=True)
    return Plot(
        "latency",
        "Quality against latency",
        "Perplexity against median latency, means over seeds, before (open) and after (filled) "
        "recovery; lower left is better. A row whose latency was not measured after recovery has "
        "the one before it: a merged adapter does not change the shapes. Figures of different "
        "hardware have panels of their own.",
        _png(figure),
    )


def _timings(report: Report, cells: list[Cell]) -> dict[str, dict[str, list[float]]]:
    """Hardware -> phase -> latencies in ms (prefill per call, decode per token)."""
    measured = [cell for cell in cells if cell.content("efficiency")]
    if not measured and cells[0].recovery != "none":
        if cells[0].control == "recovery_only":
            measured = _control(report, cells[0].model, "dense")
        else:
            measured = report.groups.get((*cells[0].group[:3], "none"), [])
    found: dict[str, dict[str, list[float]]] = {}
    for cell in measured:
        metrics = cell.content("efficiency")
        if not metrics:
            continue
        phases = found.setdefault(measured_on(metrics), {"prefill": [], "decode": []})
        prefill, decode = metrics.get("prefill") or {}, metrics.get("decode") or {}
        if "latency_s" in prefill:
            phases["prefill"].append(1000 * prefill["latency_s"])
        if "latency_s" in decode:
            phases["decode"].append(1000 * decode["latency_s"] / max(1, decode["new_tokens"]))
    return found


def _phase_label(cells: list[Cell], phase: str, report: Report) -> str:
    every = [cell.content("efficiency").get(phase) or {} for cell in [*cells, *report.cells]]
    facts = next((found for found in every if found), {})
    batch = facts.get("batch", "?")
    if phase == "prefill":
        return f"prefill latency, ms (batch {batch} x {facts.get('length', '?')} tokens)"
    return (
        f"decode latency, ms per token (batch {batch}, {facts.get('new_tokens', '?')} new tokens)"
    )


def _draw_latency(axis: Axes, cells: list[Cell], times: list[float], look: Style) -> None:
    centre, down, up = _geometric(_perplexities(cells))
    filled = cells[0].recovery != "none"
    time = estimate(times)
    axis.errorbar(
        time.mean,
        centre,
        xerr=time.sd or 0,
        yerr=[[down], [up]],
        color=look.colour,
        marker=look.marker,
        markersize=11 if look.marker == "*" else 7,
        markeredgewidth=1.6,
        markerfacecolor=look.colour if filled else "white",
        elinewidth=1,
        capsize=2,
        linestyle="none",
        label=cells[0].method,
        zorder=3,
    )


# ------------------------------------------------------------------------------------------ tasks


def accuracy(report: Report) -> Plot | None:
    """Accuracy (or chrF) per task and method, with standard errors and the chance level."""
    tasks = sorted({t for cell in report.cells for t in (cell.content("tasks").get("tasks") or {})})
    rows = _task_rows(report)
    if not tasks or not rows:
        return None
    style = styles(report)
    columns = min(4, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure, axes = _figure(
        lines,
        columns,
        figsize=(2.4 + 3.1 * columns, 0.7 + lines * (0.38 * len(rows) + 1.0)),
        sharey=True,
    )
    for axis, task in zip(axes.ravel(), tasks, strict=False):
        kind = _task_metric(report, task)
        for y, (_, before, after) in enumerate(rows):
            for cells, shift in ((before, -0.14), (after, 0.14)):
                _draw_accuracy(axis, cells, task, kind, y + shift * bool(before and after), style)
        chance = CHANCE.get(task)
        if chance is not None:
            axis.axvline(chance - 0.04, alpha=0)  # keeps the chance level off the frame
            axis.axvline(chance, color="#b00020", linestyle=":", linewidth=1.4, label="chance")
        dense = [cells for _, cells, _ in rows if cells and cells[0].control == "dense"]
        value = _task_value(dense[0], task, kind) if dense else None
        if value:
            axis.axvline(value[0], color="black", linestyle="--", linewidth=1, label="dense")
        axis.set_title(f"{task} ({kind})")
        axis.set_xlabel("accuracy" if kind in CHOICE_METRICS else kind)
        axis.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
    for axis in axes.ravel()[len(tasks) :]:
        axis.set_visible(False)
    _legend(figure, axes.ravel(), fillings=True)
    return Plot(
        "accuracy",
        "Accuracy per task",
        "Means over seeds before (open) and after (filled) recovery; bars: the harness's standard "
        "error over items. A bar that reaches the dotted line is not told from guessing.",
        _png(figure),
    )


def _task_rows(report: Report) -> list[tuple[str, list[Cell], list[Cell]]]:
    """(label, cells before, cells after recovery) per model, method and target."""
    several = len(_models(report)) > 1
    found: dict[str, tuple[list[Cell], list[Cell]]] = {}
    for cells in report.groups.values():
        first = cells[0]
        if first.control == "prune_zero" or not any(cell.content("tasks") for cell in cells):
            continue
        label = f"{first.method}, {first.target_label}" if first.target else first.method
        label = f"{first.model}: {label}" if several else label
        before, after = found.setdefault(label, ([], []))
        (before if first.recovery == "none" else after).extend(cells)
    return [(label, *pair) for label, pair in found.items()]


def _task_metric(report: Report, task: str) -> str:
    """Return the metric by which a task is shown: the customary one, or the first it has."""
    if task in NORMALISED:
        return "acc_norm"
    results = [(c.content("tasks").get("tasks") or {}).get(task) or {} for c in report.cells]
    measured = (k for k in TASK_METRICS if any(r.get(k) is not None for r in results))
    return next(measured, "acc")


def _task_value(cells: list[Cell], task: str, kind: str) -> tuple[float, float] | None:
    """Mean accuracy over seeds and the standard error over items (not reduced by seeds)."""
    results = [(cell.content("tasks").get("tasks") or {}).get(task) or {} for cell in cells]
    values = [r[kind] for r in results if isinstance(r.get(kind), int | float)]
    errors = [e for r in results if isinstance(e := r.get(f"{kind}_stderr"), int | float)]
    if not values:
        return None
    return float(np.mean(values)), float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0


def _draw_accuracy(
    axis: Axes, cells: list[Cell], task: str, kind: str, y: float, style: dict[str, Style]
) -> None:
    value = _task_value(cells, task, kind)
    if value is None:
        return
    look = style[cells[0].method]
    axis.errorbar(
        value[0],
        y,
        xerr=value[1],
        color=look.colour,
        marker=look.marker,
        capsize=2.5,
        markersize=10 if look.marker == "*" else 6,
        markeredgewidth=1.5,
        linestyle="none",
        markerfacecolor="white" if cells[0].recovery == "none" else look.colour,
    )


# ----------------------------------------------------------------------------------------- losses


def losses(report: Report) -> Plot | None:
    """Training loss of every recovery; one panel per model and target."""
    runs = _recoveries(report)
    panels = list(dict.fromkeys((c.model, c.target_label) for c, _ in runs if c.target))
    panels = panels or list(dict.fromkeys((cell.model, "none") for cell, _ in runs))
    if not panels:
        return None
    style = styles(report)
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _figure(
        rows, columns, figsize=(10 if columns == 2 else 7, 0.9 + 3.6 * rows), sharey=True
    )
    for axis, (model, target) in zip(axes.ravel(), panels, strict=False):
        shown = [run for run in runs if run[0].model == model]
        shown = [run for run in shown if run[0].target_label in (target, "none")]
        drawn: set[str] = set()
        for cell, log in shown:
            axis.plot(
                [entry["step"] for entry in log],
                _smooth([entry["loss"] for entry in log]),
                color=style[cell.method].colour,
                linewidth=1.5,
                alpha=0.4 if cell.method in drawn else 1.0,
                label=None if cell.method in drawn else cell.method,
            )
            drawn.add(cell.method)
        axis.set_title(f"{model}, {target}" if target != "none" else model)
        axis.set_xlabel("optimiser step")
        axis.label_outer(remove_inner_ticks=False)
    for axis in axes[:, 0]:
        axis.set_ylabel("training loss, nat per token")
    for axis in axes.ravel()[len(panels) :]:
        axis.set_visible(False)
    _legend(figure, axes.ravel(), fillings=False)
    return Plot(
        "losses",
        "Loss during recovery",
        "Training loss per optimiser step (long logs: running mean over 2 % of the steps); one "
        "line per seed, the first one opaque.",
        _png(figure),
    )


def _recoveries(report: Report) -> list[tuple[Cell, list[dict[str, Any]]]]:
    """The distinct recoveries and their loss logs."""
    found: dict[str, tuple[Cell, list[dict[str, Any]]]] = {}
    for cell in report.cells:
        artefact = cell.artefacts.get("recovery")
        if artefact is None or artefact.key in found or cell.control == "prune_zero":
            continue
        log = [entry for entry in read_losses(cell) if "step" in entry and "loss" in entry]
        if log:
            found[artefact.key] = (cell, log)
    return list(found.values())


def _smooth(values: list[float]) -> list[float]:
    window = max(1, len(values) // 50)
    kernel = np.ones(window)
    total = np.convolve(values, kernel, mode="full")[: len(values)]
    counts = np.convolve(np.ones(len(values)), kernel, mode="full")[: len(values)]
    return [float(value) for value in total / counts]


PLOTS: tuple[Callable[[Report], Plot | None], ...] = (
    quality,
    recovery,
    latency,
    accuracy,
    kept_width,
    losses,
)


def draw(report: Report) -> list[Plot]:
    """Every plot that the finished cells can feed."""
    return [plot for make in PLOTS if (plot := make(report)) is not None]
