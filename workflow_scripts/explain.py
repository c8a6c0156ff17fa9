"""Print why the steps of an experiment would run: which part of their keys differs, and from what.

Steps that would run for the same reason are told together; a changed upstream step is explained
once, not by everything that follows from it.
"""

from __future__ import annotations

import signal
import sys

from prunelib.command import experiment_parser, reporting_errors
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import RESULTS, closure, report_key
from prunelib.sharing.explain import explain, render, select


def report_line(experiment: Experiment) -> str | None:
    """Return a line if the report does not show the cells as they are now."""
    nodes = closure(node for cell in experiment.cells for node in cell.steps.values())
    stamp = RESULTS / f".report-{report_key(experiment.report(), nodes)}"
    return None if stamp.exists() else "the report would be made anew: it does not show these cells"


@reporting_errors("explain")
def main(arguments: list[str] | None = None) -> int:
    """Print the reasons; returns the exit code."""
    parser = experiment_parser(__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="STEP-OR-KEY-OR-CELL",
        help="a step (perplexity), a key, or the id of a cell; all that would run if left out",
    )
    options = parser.parse_args(arguments)
    experiment = Experiment.load(options.experiment, options.catalogue)
    nodes, lines = select(experiment, options.names)
    text = render(explain(nodes))
    report = None if options.names else report_line(experiment)
    if not nodes and not options.names:
        lines.append(f"nothing would run: {len(experiment.cells)} cells are complete")
    for line in (*lines, text, report):
        if line:
            print(line)
    return 0


if __name__ == "__main__":
    # Ends quietly under `| head`.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
