"""Publish what is finished of an experiment: checkpoints to a remote, all else into one commit.

Pruned checkpoints and adapters go to DVC's remote, metrics, plans, provenance and the report into
git. ``--light`` shares checkpoints as plans, from which `obtain` makes the same bytes again. May be
repeated at any time, and repairs what a killed call left. `git push` is left to you.
"""

from __future__ import annotations

import argparse
import sys

from prunelib.command import experiment_parser, reporting_errors
from prunelib.experiment.experiment import Experiment
from prunelib.provenance import artefact
from prunelib.sharing.publish import describe, publish, take_stock
from prunelib.sharing.repository import awaited, git, sharing, steps_of, write_report


def say(line: str) -> None:
    """Print a line at once: the next step may take long."""
    print(line, flush=True)


def warn_of_uncommitted(options: argparse.Namespace) -> None:
    """Say what others would miss: keys follow from code and configuration."""
    status = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
    changed = [line[3:] for line in git(*status, literal=False).splitlines()]
    own = [str(options.experiment), *map(str, options.catalogue.glob("*.yaml"))]
    unknown = git("ls-files", "--others", "--", *own).splitlines()
    if names := sorted({*changed, *unknown}):
        listed = ", ".join(names[:3]) + (" ..." if names[3:] else "")
        say(
            f"warning   not committed: {listed}; clones with other code or configuration look for "
            "other keys"
        )


@reporting_errors("publish")
def main(arguments: list[str] | None = None) -> int:
    """Publish and print each step; returns the exit code."""
    parser = experiment_parser(__doc__)
    parser.add_argument("--remote", help="name of the DVC remote; default: the default one")
    parser.add_argument("--no-push", action="store_true", help="commit only, push another time")
    parser.add_argument("--light", action="store_true", help="share checkpoints as plans")
    parser.add_argument(
        "--read-back", action="store_true", help="read all objects on the remote, mend damaged ones"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what there is and how large both forms are"
    )
    options = parser.parse_args(arguments)
    experiment = Experiment.load(options.experiment, options.catalogue)
    nodes = steps_of(experiment)
    with sharing():
        if options.dry_run:
            describe(take_stock(nodes, light=options.light), say)
            return 0
        warn_of_uncommitted(options)
        unfinished = any(not artefact.is_valid(node.directory, node.key) for node in awaited(nodes))
        write_report(experiment, partial=unfinished)
        publish(
            experiment.data["name"],
            nodes,
            remote=options.remote,
            push=not options.no_push,
            light=options.light,
            read_back=options.read_back,
            say=say,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
