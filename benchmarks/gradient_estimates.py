"""How much of the true gradients' ranking an estimate from forward passes finds.

Scores of every estimator are held against those from true gradients on the same calibration
windows: MLP channels by Spearman's correlation within a layer (mean over layers), kv groups over
all layers together. Gates are held against true gates and against the criterion itself. Directions
are drawn once per seed; smaller numbers of perturbations are the first of them. Wanda-sp and
Wanda-sp times noise, which know no gradient, stand beside. All scores are also held against what
they are for: the perplexity without the lower half of every layer's MLP channels, the first and the
last layer excepted, on windows of the evaluation articles.

A seed takes hours on a CPU; those of two processes go into one table and plot:

    OMP_NUM_THREADS=1 python benchmarks/gradient_estimates.py --seeds 0 --json estimates0.json &
    OMP_NUM_THREADS=1 python benchmarks/gradient_estimates.py --seeds 1 --json estimates1.json
    python benchmarks/gradient_estimates.py --read estimates*.json --plot estimates.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from artefacts import newest_artefact
from scoring import embedded

from prunelib.reporting.stats import spearman

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

CATALOGUE = Path(__file__).parent.parent / "config" / "methods.yaml"
REFERENCES = (
    "mini_llm_backprop",
    "mini_llm_backprop_gates",
    "mini_llm_backprop_gates_taylor",
)
KINDS = {"mlp_channel": "MLP channels within a layer", "kv_group": "kv groups over all layers"}
LAYERS = "mlp_channel_layers"
ESTIMATORS = (
    "mini_llm",
    "mini_llm_rademacher",
    "mini_llm_one_sided",
    "mini_llm_fresh",
    "mini_llm_layer",
    "mini_llm_low_rank",
    "mini_llm_low_rank_layer",
    "mini_llm_gates",
    "mini_llm_gates_layer",
    "mini_llm_gates_taylor",
)


def agreement(scores: Mapping[str, Any], true: Mapping[str, Any]) -> dict[str, Any]:
    """Return the correlations of channels, their mean over layers, and that of all kv groups."""
    pairs = zip(scores["mlp_channel"], true["mlp_channel"], strict=True)
    layers = [spearman(a, b) for a, b in pairs]
    return {
        "mlp_channel": float(np.mean(layers)),
        LAYERS: [round(value, 4) for value in layers],
        "kv_group": spearman(np.concatenate(scores["kv_group"]), np.concatenate(true["kv_group"])),
    }


def figures(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print one line per estimator, number of perturbations and reference."""
    from dataclasses import fields, replace

    import torch

    from prunelib.checkpoint import WeightReader
    from prunelib.data.calibration import evaluation_ids
    from prunelib.data.text import read_articles
    from prunelib.data.tokenizer import load_tokenizer
    from prunelib.evaluation.perplexity import cut_windows, perplexity
    from prunelib.families import family_of
    from prunelib.methods import create
    from prunelib.methods.base import ScoringInputs
    from prunelib.statistics import activations, fms_direct, fms_gradients, zeroth_order
    from prunelib.statistics.estimator import Estimator
    from prunelib.statistics.fms import gate_slices
    from prunelib.statistics.inputs import PassInputs
    from prunelib.statistics.layerwise import Layers

    options.model = options.model or newest_artefact("fetch_model")
    options.text = options.text or newest_artefact("fetch_text")
    catalogue = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    model, config, windows = embedded(options.model, options.text, *options.windows)
    family = family_of(config)
    articles = read_articles(options.text, "evaluation")
    ids = evaluation_ids(articles, load_tokenizer(options.model))
    evaluated = cut_windows(ids, 128, options.evaluated)
    part = gate_slices(family, config, ["mlp_channel"])["mlp_channel"]
    inputs = PassInputs(model, family, config, windows, len(windows))
    passes = {
        module.__name__.rpartition(".")[2]: module.collect(inputs)
        for module in (activations, fms_gradients, fms_direct)
    }

    def scores(name: str, seed: int, **more: Any) -> Any:
        entry = catalogue[name]
        method = create(entry["method"], entry.get("parameters", {}))
        reader = WeightReader(options.model)
        return method.scores(ScoringInputs(family, config, reader, passes | more, seed))

    references = {name: scores(name, 0) for name in REFERENCES}
    rows: list[dict[str, Any]] = []

    def without_half(found: Any) -> float:
        """Return the perplexity without the lower half of the MLP channels."""
        kept = {}
        for index, layer in enumerate(family.layers(model)[1:-1], start=1):
            values = found["mlp_channel"][index]
            gone = np.zeros(len(values), dtype=bool)
            gone[np.argsort(values)[: len(values) // 2]] = True
            weight = layer.get_parameter(part.parameter)
            kept[weight] = weight.data
            weight.data = weight.data * torch.from_numpy(~gone[part.owner])
        result = perplexity(model, evaluated).perplexity
        for weight, data in kept.items():
            weight.data = data
        return result

    def add(name: str, count: int, cost: float, seed: int, found: Any, *against: str) -> None:
        left = without_half(found)
        for reference in against:
            agreed = agreement(found, references[reference])
            row = {"estimator": name, "perturbations": count, "forward_passes": cost, "seed": seed}
            rows.append(row | {"reference": reference} | agreed | {"perplexity": left})
            print(
                f"{name} {count} ({cost:.0f} passes) seed {seed} against {reference}: "
                f"channels {agreed['mlp_channel']:.3f}, kv groups {agreed['kv_group']:.3f}, "
                f"perplexity {left:.4g}",
                flush=True,
            )

    if options.references:
        add("wanda_sp", 0, 1, 0, scores("wanda_sp", 0), "mini_llm_backprop")
        for name in REFERENCES:
            add(name, 0, 4, 0, references[name], "mini_llm_backprop")
        for kind in ("", "_gates", "_gates_taylor"):
            found = scores(f"mini_llm_direct{kind}", 0)
            names = dict.fromkeys(("mini_llm_backprop", f"mini_llm_backprop{kind}"))
            add(f"mini_llm_direct{kind}", 0, 2, 0, found, *names)
    for seed in options.seeds:
        if options.references:
            add("wanda_noise", 0, 1, seed, scores("wanda_noise", seed), "mini_llm_backprop")
        # Variants that score the same estimate in different ways share it.
        estimates: dict[Estimator, Any] = {}
        for name in options.estimators:
            method: Any = create("mini_llm", catalogue[name]["parameters"])
            settings = Estimator(
                **{field.name: getattr(method, field.name) for field in fields(Estimator)}
            )
            depth = (len(family.layers(model)) + 1) / 2 if settings.scope == "layer" else 1
            counts = [
                count
                for count in sorted(options.counts)
                if count * settings.sides * depth <= options.most_passes
            ]
            settings = replace(settings, perturbations=counts[-1])
            layers = Layers(model, family)
            if settings not in estimates:
                estimates[settings] = zeroth_order.estimate(layers, inputs, seed, settings)
            estimate = estimates[settings]
            whole = estimate.statistics["forward_passes"].item()
            for count in counts:
                tensors = estimate.statistics | estimate.reduce(layers, count)
                found = scores(name, seed, zeroth_order=tensors)
                cost = 1 + (whole - 1) * count / settings.perturbations
                against = ["mini_llm_backprop"]
                if method.gates:
                    same = "gates" if method.activation else "gates_taylor"
                    against.append(f"mini_llm_backprop_{same}")
                add(name, count, cost, seed, found, *against)
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the mean and standard deviation over seeds of every estimator, count and reference."""
    import pandas as pd

    keys = ["reference", "estimator", "perturbations"]
    data = pd.DataFrame(rows).drop_duplicates([*keys, "seed"])
    groups = data.groupby(keys)
    columns = {"forward_passes": groups.forward_passes.mean(), "seeds": groups.seed.count()}
    for figure in (*KINDS, "perplexity"):
        columns |= {f"{figure}_mean": groups[figure].mean(), f"{figure}_std": groups[figure].std()}
    return pd.DataFrame(columns).reset_index()


def markdown(table: pd.DataFrame) -> str:
    """Return the summary as a table."""
    heads = ["against", "estimator", "perturbations", "forward passes", "channels", "kv groups"]
    heads += ["perplexity", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in table.to_dict("records"):
        cells = [
            f"{row[f'{figure}_mean']:.{digits}f}"
            + (f" ± {row[f'{figure}_std']:.{digits}f}" if row["seeds"] > 1 else "")
            for figure, digits in (*((kind, 3) for kind in KINDS), ("perplexity", 1))
        ]
        names = f"| {row['reference']} | {row['estimator']} | {row['perturbations'] or '-'} "
        cells.append(f"{row['seeds']}")
        lines.append(f"{names}| {row['forward_passes']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_layer(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return every estimator's correlations with the criterion by layer, means over seeds.

    With as many directions as it was measured with; of rows that have no list, none.
    """
    most: dict[str, dict[int, list[list[float]]]] = {}
    for row in rows:
        if LAYERS in row and row["reference"] == REFERENCES[0] != row["estimator"]:
            counts = most.setdefault(row["estimator"], {})
            counts.setdefault(row["perturbations"], []).append(row[LAYERS])
    return {
        name: list(np.mean(counts[max(counts)], axis=0)) for name, counts in sorted(most.items())
    }


def plot(table: pd.DataFrame, layers: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write correlation, and perplexity without half of the channels, against forward passes.

    One panel per reference and kind of unit, one for perplexity, and one of the channels'
    correlations by layer. What draws no directions, or has no number of them, is a horizontal
    line.
    """
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10, 20), layout="constrained")
    grid = figure.add_gridspec(len(REFERENCES) + 2, len(KINDS), height_ratios=[1, 1, 1, 1.4, 1.4])
    names = sorted(table.estimator[table.perturbations > 0].unique())
    styles = dict(zip(names, [(f"C{i}", "osv^D"[i % 5]) for i in range(len(names))], strict=True))

    def draw(place: Any, part: pd.DataFrame, column: str, title: str, label: str) -> Any:
        axis = figure.add_subplot(place)
        for name in names:
            rows = part[(part.estimator == name) & (part.perturbations > 0)]
            if len(rows):
                colour, marker = styles[name]
                axis.errorbar(
                    rows.forward_passes,
                    rows[f"{column}_mean"],
                    rows[f"{column}_std"],
                    color=colour,
                    marker=marker,
                    capsize=3,
                    label=name,
                )
        for number, row in enumerate(part[part.perturbations == 0].to_dict("records")):
            height = row[f"{column}_mean"]
            axis.axhline(height, color="0.4", ls=["-", "--", ":", "-."][number % 4])
            axis.annotate(
                row["estimator"],
                # Side by side: several lie close together.
                (0.01 + 0.19 * (number % 5), height),
                xycoords=("axes fraction", "data"),
                fontsize=6,
                va="bottom",
            )
        axis.set(xscale="log", xlabel="forward passes", ylabel=label)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
        return axis

    for line, reference in enumerate(REFERENCES):
        part = table[table.reference == reference]
        for column, (kind, label) in enumerate(KINDS.items()):
            title = f"{label}, against {reference}"
            draw(grid[line, column], part, kind, title, "Spearman's correlation")
    once = table.drop_duplicates(["estimator", "perturbations"])
    # Beyond twice and a half the best there is nothing to choose between.
    most = 2.5 * once.perplexity_mean.min()
    beyond = sorted(once.estimator[once.perplexity_mean > most].unique())
    title = "without the lower half of the MLP channels of all layers but the outer two"
    title += f"; above: {', '.join(beyond)}" if beyond else ""
    once = once[~once.estimator.isin(beyond)]
    axis = draw(grid[-2, :], once, "perplexity", title, "perplexity")
    axis.set_ylim(0.95 * once.perplexity_mean.min(), most)
    drawn = [axis.get_legend_handles_labels() for axis in figure.axes]
    labels = {label: handle for pair in drawn for handle, label in zip(*pair, strict=True)}
    places = [labels[name] for name in names]
    figure.legend(places, names, loc="outside lower center", ncols=3, fontsize=8)
    axis = figure.add_subplot(grid[-1, :])
    for name, values in layers.items():
        colour, marker = styles.get(name, (None, ""))
        axis.plot(values, color=colour, marker=marker, ms=4, ls="-" if marker else "--", label=name)
    title = f"MLP channels within each layer, against {REFERENCES[0]}, most directions measured"
    axis.set_title(title, fontsize=9)
    axis.set(xlabel="layer", ylabel="Spearman's correlation")
    axis.grid(alpha=0.3)
    if layers:
        axis.legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure, or read what was measured, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint directory")
    parser.add_argument("--text", type=Path, help="directory with articles.jsonl")
    parser.add_argument("--windows", nargs=2, type=int, default=[10, 128], help="count and tokens")
    parser.add_argument("--evaluated", type=int, default=16, help="windows of the perplexity")
    parser.add_argument("--estimators", nargs="*", default=ESTIMATORS, help="catalogue names")
    parser.add_argument(
        "--references",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure what uses no random directions, too",
    )
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--most-passes", type=int, default=300, help="larger counts are left out")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--read", nargs="+", type=Path, help="figures that were written before")
    parser.add_argument("--plot", type=Path, help="write a plot here")
    options = parser.parse_args()
    if options.read:
        rows = [row for path in options.read for row in json.loads(path.read_text("utf-8"))]
    else:
        rows = figures(options)
    if options.json:
        lines = ",\n".join(json.dumps(row) for row in rows)
        options.json.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    table = summary(rows)
    print(markdown(table))
    if options.plot:
        plot(table, by_layer(rows), options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
