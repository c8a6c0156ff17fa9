"""Print what an experiment would cost on the cluster: nothing is fetched, run or submitted.

By step: jobs, GPUs, GPU-hours, CPU-hours, memory, time and disk; then one sentence per model and
step that says how the memory follows from the arithmetic.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from prunelib.cluster.cost import cost_rows, largest_requests, render
from prunelib.cluster.settings import Cluster
from prunelib.command import experiment_parser, reporting_errors
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import closure, needed


@reporting_errors("cost")
def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = experiment_parser(__doc__)
    parser.add_argument(
        "--cluster", type=Path, default=Path("config/cluster.yaml"), help="the cluster file"
    )
    parser.add_argument("--gpu-type", help="a GPU type of the cluster file; default: its default")
    parser.add_argument(
        "--all", action="store_true", help="count all jobs, not only those still to be done"
    )
    options = parser.parse_args(arguments)
    experiment = Experiment.load(options.experiment, options.catalogue)
    cluster = Cluster.load(options.cluster)
    gpu_type, _ = cluster.gpu(options.gpu_type)
    terminal = [node for cell in experiment.cells for node in cell.steps.values()]
    nodes = (closure if options.all else needed)(terminal).values()
    rows = cost_rows(nodes, cluster, gpu_type)
    print(render(rows, largest_requests(nodes, cluster, gpu_type), gpu_type))
    return 0


if __name__ == "__main__":
    # Ends quietly under `| head`.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
