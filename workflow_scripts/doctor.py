"""Check experiment, profile and cluster before anything is submitted; one line per check.

Ends with exit code 1 if a check failed, so that it can stand before `snakemake --profile slurm`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prunelib.cluster.doctor import FAIL, Profile, Setup, examine
from prunelib.cluster.settings import Cluster
from prunelib.command import experiment_parser, reporting_errors
from prunelib.experiment.experiment import Experiment


@reporting_errors("doctor")
def main(arguments: list[str] | None = None) -> int:
    """Print the checks; returns the exit code."""
    parser = experiment_parser(__doc__)
    parser.add_argument(
        "--cluster", type=Path, default=Path("config/cluster.yaml"), help="the resource model"
    )
    parser.add_argument(
        "--profile",
        type=Path,
        default=Path("profiles/slurm/config.yaml"),
        help="the Snakemake profile's file",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long jobs that look for the work directory may wait in the queue (default 60)",
    )
    options = parser.parse_args(arguments)
    failed = 0
    setup = Setup(
        experiment=Experiment.load(options.experiment, options.catalogue),
        cluster=Cluster.load(options.cluster),
        profile=Profile.load(options.profile),
        wait_seconds=options.wait,
    )
    for check in examine(setup):
        failed += check.status == FAIL
        print(check, flush=True)
    print(f"{failed} failed" if failed else "nothing stands against a start")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
