"""Write the report of an experiment: benchmark.csv, summary.json, plots and report.html.

Not a keyed step: the files are made anew from the artefacts each time and are never merged.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prunelib.cluster.progress import why_missing
from prunelib.command import experiment_parser, reporting_errors
from prunelib.experiment.experiment import Experiment
from prunelib.reporting.build import build
from prunelib.sharing.repository import readable

PUBLISHED = Path(__file__).resolve().parents[1] / "config" / "published"


@reporting_errors("report")
def main(arguments: list[str] | None = None) -> int:
    """Write the report and print the path of its page; returns the exit code."""
    parser = experiment_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the report")
    parser.add_argument(
        "--partial", action="store_true", help="report the finished cells, name the missing ones"
    )
    options = parser.parse_args(arguments)
    experiment = Experiment.load(options.experiment, options.catalogue)
    description = experiment.report()
    if options.partial:
        for cell, told in zip(experiment.cells, description["cells"], strict=True):
            told["failures"] = why_missing(cell.steps)
    for told in description["cells"]:
        # Of a checkpoint that others share, git's record is enough.
        told["artefacts"] = {
            name: str(readable(Path(place))) if place else None
            for name, place in told["artefacts"].items()
        }
    path = build(description, options.out, published=PUBLISHED, partial=options.partial)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
