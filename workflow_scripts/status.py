"""Print how each cell of an experiment stands, one line each; a run may be going on meanwhile.

The state of a cell is that of the first of its steps that is not done: running, queued in SLURM,
failed (with the cause and the log), or waiting for another one.
"""

from __future__ import annotations

import sys
from collections import Counter

from prunelib.cluster import progress
from prunelib.command import experiment_parser, reporting_errors
from prunelib.errors import PrunelibError
from prunelib.experiment.experiment import Cell, Experiment
from prunelib.experiment.graph import Node, closure
from prunelib.sharing.repository import is_here, is_shared

_ORDER = (progress.FAILED, progress.RUNNING, progress.QUEUED, progress.WAITING)


def cell_line(cell: Cell, found: dict[str, progress.Standing]) -> tuple[str, str]:
    """Return a cell's state and its line."""
    own = list(cell.steps.values())
    done = sum(found[node.key].state == progress.DONE for node in own)
    if done == len(own):
        return progress.DONE, f"{progress.DONE:8}{cell.id}"
    # Only what the missing steps wait for: a finished step needs nothing more.
    missing: dict[str, Node] = {}
    waiting = [node for node in own if found[node.key].state != progress.DONE]
    while waiting:
        node = waiting.pop()
        missing[node.key] = node
        waiting.extend(
            upstream
            for upstream in node.inputs.values()
            if found[upstream.key].state != progress.DONE and upstream.key not in missing
        )
    for state in _ORDER:
        those = [node for node in missing.values() if found[node.key].state == state]
        if those and state != progress.WAITING:
            more = f" (and {len(those) - 1} more)" if len(those) > 1 else ""
            detail = found[those[0].key].detail
            return (
                state,
                f"{state:8}{cell.id}  {done}/{len(own)} steps; {those[0].step}: {detail}{more}",
            )
    steps = ", ".join(dict.fromkeys(node.step for node in missing.values()))
    return progress.WAITING, (
        f"{progress.WAITING:8}{cell.id}  {done}/{len(own)} steps; to be made: {steps}"
    )


@reporting_errors("status")
def main(arguments: list[str] | None = None) -> int:
    """Print the lines and a summary; returns the exit code, 0 when every cell is done."""
    parser = experiment_parser(__doc__)
    options = parser.parse_args(arguments)
    cells = Experiment.load(options.experiment, options.catalogue).cells
    nodes = closure(node for cell in cells for node in cell.steps.values())
    try:
        jobs = progress.workflow_jobs() or []
    except PrunelibError as error:
        print(f"status: SLURM's queue cannot be read: {error}", file=sys.stderr)
        jobs = []
    found = progress.standings(nodes, jobs)
    # A checkpoint that others share is as good as done, unless a step waits for it.
    shared = [key for key, node in nodes.items() if not is_here(node.directory)]
    found |= {key: progress.Standing(progress.DONE) for key in shared if is_shared(nodes[key])}
    states: Counter[str] = Counter()
    for cell in cells:
        state, line = cell_line(cell, found)
        states[state] += 1
        print(line)
    print(", ".join(f"{states[state]} {state}" for state in (progress.DONE, *_ORDER)))
    return 0 if states[progress.DONE] == len(cells) else 1


if __name__ == "__main__":
    sys.exit(main())
