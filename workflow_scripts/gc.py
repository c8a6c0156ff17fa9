"""List artefacts that nothing needs any more, and with --delete remove them.

Live is what an experiment file plans, what a live artefact was made from, what a .dvc file or a git
tag names, and what somebody works on. All else is dead, as are the remains of dead processes.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

from prunelib.command import reporting_errors
from prunelib.errors import InputError
from prunelib.sharing import gc


def days(text: str) -> float:
    """Read a number of days that is not negative."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def line(found: gc.Found) -> str:
    """Return size, date and path."""
    date = datetime.fromtimestamp(found.made, UTC).date().isoformat()
    return f"{size(found.size):>9}  {date}  {found.path}"


def total(name: str, found: Iterable[gc.Found]) -> str:
    """Return count and size of many."""
    sizes = [one.size for one in found]
    return f"{name}: {len(sizes)}, {size(sum(sizes))}"


def show(census: gc.Census) -> None:
    """Print what is dead, the totals, and what stands against removing it."""
    for name, group in (("dead artefacts", census.dead), ("leftovers", census.leftovers)):
        if group:
            print(f"{name}:")
            for found in sorted(group, key=lambda one: -one.size):
                print(line(found))
    groups = (("dead", census.dead), ("leftovers", census.leftovers), ("live", census.live))
    print("; ".join(total(name, group) for name, group in groups))
    for objection in census.objections:
        print(f"gc: {objection}", file=sys.stderr)


def remove(census: gc.Census) -> int:
    """Remove and print each; returns the exit code, 1 if something could not be removed."""
    removed, failed = [], 0
    for found, fault in gc.delete(census):
        if fault:
            failed = 1
            print(f"error: gc: {found.path}: {fault}", file=sys.stderr)
        else:
            removed.append(found)
            print(f"removed {line(found)}", flush=True)
    print(total("removed", removed))
    return failed


@reporting_errors("gc")
def main(arguments: list[str] | None = None) -> int:
    """Print the lists; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--experiments",
        type=Path,
        default=Path("config/experiments"),
        help="directory of the experiment files",
    )
    parser.add_argument(
        "--experiment", type=Path, action="append", default=[], help="one more experiment file"
    )
    parser.add_argument("--catalogue", type=Path, default=Path("config"), help="the catalogues")
    parser.add_argument("--older-than", type=days, metavar="DAYS", help="only what is older")
    parser.add_argument("--why", metavar="KEY", help="print what refers to one key, and end")
    parser.add_argument("--delete", action="store_true", help="remove what is listed")
    options = parser.parse_args(arguments)
    if options.why and options.delete:
        raise InputError("--why and --delete do not go together")
    files = gc.experiment_files(options.experiments, options.experiment)
    with gc.no_launches() if options.delete else nullcontext():
        census = gc.take_census(files, options.catalogue, options.older_than)
        if options.why:
            print("\n".join(gc.why(options.why, census)))
        elif options.delete:
            return remove(census)
        else:
            show(census)
    return 0


if __name__ == "__main__":
    # Ends quietly under `| head`.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
