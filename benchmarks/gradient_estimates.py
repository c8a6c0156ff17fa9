"""How much of the true gradients' ranking an estimate from forward passes finds.

Scores of every estimator are held against those from true gradients on the same calibration
windows: MLP channels by Spearman's correlation within a layer (mean over layers), kv groups over
all layers together. Gates are held against true gates and against the criterion itself. Directions
are drawn once per seed; smaller numbers of perturbations are the first of them. Wanda-sp and
Wanda-sp times noise, which know no gradient, stand beside.

    python benchmarks/gradient_estimates.py --seeds 3 --json estimates.json
    python benchmarks/gradient_estimates.py --estimators mini_llm_gates --counts 1 8 --seeds 1
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

if TYPE_CHECKING:
    from collections.abc import Mapping

CATALOGUE = Path(__file__).parent.parent / "config" / "methods.yaml"
ESTIMATORS = (
    "mini_llm_99",
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


def spearman(one: Any, other: Any) -> float:
    """Return the rank correlation of two arrays without ties."""
    ranks: list[Any] = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def agreement(scores: Mapping[str, Any], true: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean correlation of channels within a layer, and that of all kv groups."""
    layers = zip(scores["mlp_channel"], true["mlp_channel"], strict=True)
    return {
        "mlp_channel": float(np.mean([spearman(a, b) for a, b in layers])),
        "kv_group": spearman(np.concatenate(scores["kv_group"]), np.concatenate(true["kv_group"])),
    }


def main() -> int:
    """Measure and print one line per estimator, number of perturbations and reference."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint directory")
    parser.add_argument("--text", type=Path, help="directory with articles.jsonl")
    parser.add_argument("--estimators", nargs="+", default=ESTIMATORS, help="catalogue names")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()

    from dataclasses import fields, replace

    from prunelib.checkpoint import WeightReader
    from prunelib.families import family_of
    from prunelib.methods import create
    from prunelib.methods.base import ScoringInputs
    from prunelib.statistics import activations, fms_direct, fms_gradients, zeroth_order
    from prunelib.statistics.estimator import Estimator
    from prunelib.statistics.layerwise import Layers

    options.model = options.model or newest_artefact("fetch_model")
    options.text = options.text or newest_artefact("fetch_text")
    catalogue = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    model, config, windows = embedded(options.model, options.text)
    family, batch = family_of(config), len(windows)
    passes = {
        module.__name__.rpartition(".")[2]: module.collect(model, family, config, windows, batch)
        for module in (activations, fms_gradients, fms_direct)
    }

    def scores(name: str, seed: int, **more: Any) -> Any:
        entry = catalogue[name]
        method = create(entry["method"], entry.get("parameters", {}))
        reader = WeightReader(options.model)
        return method.scores(ScoringInputs(family, config, reader, passes | more, seed))

    references = {
        name: scores(name, 0)
        for name in (
            "mini_llm_backprop",
            "mini_llm_backprop_gates",
            "mini_llm_backprop_gates_taylor",
        )
    }
    rows: list[dict[str, Any]] = []

    def add(name: str, count: int, cost: float, seed: int, found: Any, reference: str) -> None:
        agreed = agreement(found, references[reference])
        row = {"estimator": name, "perturbations": count, "forward_passes": cost, "seed": seed}
        rows.append(row | {"reference": reference} | agreed)
        print(
            f"{name} {count} ({cost:.0f} passes) seed {seed} against {reference}: "
            f"channels {agreed['mlp_channel']:.3f}, kv groups {agreed['kv_group']:.3f}",
            flush=True,
        )

    add("wanda_sp", 0, 1, 0, scores("wanda_sp", 0), "mini_llm_backprop")
    for name in ("mini_llm_backprop_gates", "mini_llm_backprop_gates_taylor"):
        add(name, 0, 4, 0, references[name], "mini_llm_backprop")
    add("mini_llm_direct", 0, 2, 0, scores("mini_llm_direct", 0), "mini_llm_backprop")
    for same in ("gates", "gates_taylor"):
        found = scores(f"mini_llm_direct_{same}", 0)
        for reference in ("mini_llm_backprop", f"mini_llm_backprop_{same}"):
            add(f"mini_llm_direct_{same}", 0, 2, 0, found, reference)
    for seed in range(options.seeds):
        add("wanda_noise", 0, 1, seed, scores("wanda_noise", seed), "mini_llm_backprop")
        for name in options.estimators:
            method: Any = create("mini_llm", catalogue[name]["parameters"])
            settings = Estimator(
                **{field.name: getattr(method, field.name) for field in fields(Estimator)}
            )
            settings = replace(settings, perturbations=max(options.counts))
            layers = Layers(model, family)
            estimate = zeroth_order.estimate(layers, config, windows, batch, seed, settings)
            whole = estimate.statistics["forward_passes"].item()
            for count in options.counts:
                tensors = estimate.statistics | estimate.reduce(layers, count)
                found = scores(name, seed, zeroth_order=tensors)
                cost = 1 + (whole - 1) * count / settings.perturbations
                add(name, count, cost, seed, found, "mini_llm_backprop")
                if method.gates:
                    same = "gates" if method.activation else "gates_taylor"
                    add(name, count, cost, seed, found, f"mini_llm_backprop_{same}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
