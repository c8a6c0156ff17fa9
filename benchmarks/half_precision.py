"""What half precision does to the loss differences that gradients are estimated from.

The same directions through the same weights, those of the type in question: once computed in that
type, moved weights rounded to it, and once in fp32. Two numbers per type, kind of direction and
step: the correlation of both coefficients ``c_k`` over directions, and the root mean square of what
rounding adds over that of the coefficients. In fp32 with other steps: what curvature adds, against
the smallest step. Losses are summed in fp64 in any type.

    python benchmarks/half_precision.py     # on the newest fetched model and text
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from artefacts import newest_artefact
from scoring import embedded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Coefficients = NDArray[np.float64]

HEADS = ("computed in", "against", "directions", "step", "correlation", "added, rms")


def compared(found: Coefficients, reference: Coefficients) -> tuple[float, float]:
    """Return the correlation and the root mean square of the difference, relative."""
    added = np.sqrt(np.mean((found - reference) ** 2) / np.mean(reference**2))
    return float(np.corrcoef(found, reference)[0, 1]), float(added)


def measure(options: argparse.Namespace) -> None:
    """Print one row per type, kind of direction and step."""
    import torch

    from prunelib.families import family_of
    from prunelib.statistics import zeroth_order
    from prunelib.statistics.estimator import Estimator
    from prunelib.statistics.inputs import PassInputs
    from prunelib.statistics.layerwise import Layers

    original, config, windows = embedded(options.model, options.text, *options.windows)
    family = family_of(config)

    def coefficients(model: Any, kind: str, step: float) -> Coefficients:
        settings = Estimator(perturbation=kind, perturbations=options.perturbations, epsilon=step)
        inputs = PassInputs(model, family, config, windows, len(windows))
        estimate = zeroth_order.estimate(Layers(model, family), inputs, options.seed, settings)
        values: Coefficients = estimate.coefficients[0].numpy()
        return values

    print("| " + " | ".join(HEADS) + " |")
    print("|---" * len(HEADS) + "|")
    for name in options.dtypes:
        rounded = original.to(getattr(torch, name))
        for kind in ("weights", "gates"):
            halves = {step: coefficients(rounded, kind, step) for step in options.steps}
            # ``to`` moves the model in place: fp32 holds the same values from here on.
            exact = rounded.float()
            wholes = {step: coefficients(exact, kind, step) for step in options.steps}
            least = min(options.steps)
            for step in options.steps:
                rows = [(name, "float32", compared(halves[step], wholes[step]))]
                if step != least:
                    against = f"float32, step {least:g}"
                    rows.append(("float32", against, compared(wholes[step], wholes[least])))
                for computed, against, (correlation, added) in rows:
                    shown = (kind, f"{step:g}", f"{correlation:.3f}", f"{added:.3f}")
                    print(f"| {computed} | {against} | {' | '.join(shown)} |", flush=True)
            rounded = exact.to(getattr(torch, name))
        original = embedded(options.model, options.text, *options.windows)[0]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint directory")
    parser.add_argument("--text", type=Path, help="directory with articles.jsonl")
    parser.add_argument("--windows", nargs=2, type=int, default=[10, 32], help="count and tokens")
    parser.add_argument("--perturbations", type=int, default=16, help="directions")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--steps", nargs="+", type=float, default=[1e-3, 1e-2, 3e-2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.model = options.model or newest_artefact("fetch_model")
    options.text = options.text or newest_artefact("fetch_text")
    measure(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
