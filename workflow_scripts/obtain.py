"""Obtain what others have published of an experiment, and say what is left to compute.

Metrics come with git; only checkpoints and adapters that something still to be computed waits for
are pulled, or all of them with ``--all``. Every file is held against the sha256 in the provenance
that git has. Afterwards `snakemake` finds nothing to do but what is named here.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prunelib.cluster.cost import cost_rows, render
from prunelib.cluster.settings import Cluster
from prunelib.command import experiment_parser, reporting_errors
from prunelib.errors import IntegrityError
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import Node
from prunelib.sharing.obtain import Wanted, obtain, survey
from prunelib.sharing.repository import (
    in_words,
    restore_deleted,
    run_script,
    sharing,
    size_of,
    steps_of,
    write_report,
)

_ROOT = Path(__file__).resolve().parents[1]


def say(line: str) -> None:
    """Print a line at once: the next step may take long."""
    print(line, flush=True)


def make(node: Node) -> None:
    """Run the step that makes the artefact of a node without inputs."""
    run_script(node.step, ["--request", node.request()])


def describe(wanted: Wanted, cluster: Cluster) -> None:
    """Print what is here, what can be had, and what is left to compute, with its cost."""
    say(
        f"found     {len(wanted.here)} artefacts here or in git; to get: {len(wanted.pull)} by DVC "
        f"({in_words(sum(map(size_of, wanted.pull)))}), {len(wanted.rebuild)} from plans; to "
        f"compute: {len(wanted.compute)} steps"
    )
    for node in wanted.compute:
        say(f"compute   {node.name} ({node.key})")
    if wanted.compute:
        gpu_type, _ = cluster.gpu(None)
        say(render(cost_rows(wanted.compute, cluster, gpu_type), [], gpu_type).rstrip())


@reporting_errors("obtain")
def main(arguments: list[str] | None = None) -> int:
    """Obtain and print each step; returns the exit code, 0 when all that is shared is here."""
    parser = experiment_parser(__doc__)
    parser.add_argument("--remote", help="name of the DVC remote; default: the default one")
    parser.add_argument(
        "--all", action="store_true", help="all checkpoints and adapters, needed or not"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument(
        "--cluster",
        type=Path,
        default=_ROOT / "config" / "cluster.yaml",
        help="the cluster file, for the cost",
    )
    options = parser.parse_args(arguments)
    experiment = Experiment.load(options.experiment, options.catalogue)
    cluster = Cluster.load(options.cluster)
    nodes = steps_of(experiment)
    with sharing():
        if not options.dry_run and (number := restore_deleted()):
            say(f"restored  {number} files that git holds and that were deleted here")
        wanted = survey(nodes, everything=options.all)
        describe(wanted, cluster)
        if options.dry_run:
            return 0
        failed = obtain(wanted, remote=options.remote, make=make, say=say)
        if failed:
            raise IntegrityError(f"{failed} artefacts could not be obtained, see above")
        if not wanted.compute:
            say(f"report    {write_report(experiment, partial=False).resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
