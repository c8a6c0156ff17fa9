"""Print a study's table from its ``benchmark.csv``: mean, standard deviation and single seeds.

One row per target, recovery and method, the best of each method first; the share of parameters
removed, and the same with adapters not counted where there are any; millions of parameters that
recovery trained, where it is known; perplexity, its ratio to that of the unpruned model and, where
the study has tasks, their mean accuracy and chrF, over the seeds.
Cells without a seed count once.

    python benchmarks/study_table.py docs/studies/llm_pruner.csv
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pandas as pd

GROUP = ["target", "recovery", "method"]
# What is not pruned, and so has no place in the table.
CONTROLS = ["dense", "prune_zero"]


def markdown(studies: list[Path]) -> str:
    """Return the table of these files' cells, each counted once, as markdown.

    Raises:
        ValueError: a file has no complete unpruned cell, or they disagree about it.
    """
    data = pd.concat([pd.read_csv(path) for path in studies], ignore_index=True)
    data = data.drop_duplicates("cell")
    dense = data[(data.control == "dense") & (data.recovery == "none")].perplexity.unique()
    if len(dense) != 1:
        raise ValueError(f"perplexities of the unpruned model: {list(dense)}")
    tasks = [name for name in map(str, data.columns) if name.endswith("_acc")]
    shares = {"removed": data.realised_ratio}
    if "gross_ratio" in data.columns:
        shares["adapters not counted"] = data.gross_ratio.fillna(data.realised_ratio)
    trained = ["trained"] if "trained_parameters" in data.columns else []
    heads = ["target", "recovery", "method", *shares, *trained, "perplexity", "ratio to unpruned"]
    texts = [name for name in map(str, data.columns) if name.endswith("_chrf")]
    scores = {name: columns for name, columns in (("accuracy", tasks), ("chrF", texts)) if columns}
    heads += ["single seeds", *scores]
    lines = [f"Unpruned: {dense[0]:.2f}.", "", _line(heads), "|---" * len(heads) + "|"]
    cells = data[~data.control.isin(CONTROLS) & (data.status == "complete")]
    means = cells.groupby(GROUP).perplexity.mean().sort_values().index
    for target, recovery, method in sorted(means, key=lambda names: names[:2]):
        rows = cells[(cells[GROUP] == [target, recovery, method]).all(axis=1)].sort_values("seed")
        ratio = rows.perplexity / dense[0]
        row = [target, recovery, method]
        row += [f"{share[rows.index].mean():.2%}" for share in shares.values()]
        if trained:
            count = rows.trained_parameters.mean()
            row.append("" if math.isnan(count) else f"{count / 1e6:.2f} M")
        row += [
            f"{rows.perplexity.mean():.1f}",
            _spread(ratio),
            ", ".join(map("{:.2f}".format, ratio)),
        ]
        row += [_spread(rows[columns].mean(axis=1), 3) for columns in scores.values()]
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(values: pd.Series, digits: int = 2) -> str:
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("studies", nargs="+", type=Path, help="benchmark.csv files of one model")
    print(markdown(parser.parse_args().studies))


if __name__ == "__main__":
    main()
