"""Export a pruned checkpoint for tools that know only the stock architecture.

``--stock`` pads it with zero units to the original widths: it loads anywhere, computes the same
function, and is neither smaller nor faster than the original.
"""

import argparse
import sys
from pathlib import Path

from prunelib.checkpoint import export_stock, read_config
from prunelib.command import reporting_errors
from prunelib.errors import InputError


@reporting_errors("export")
def main(arguments: list[str] | None = None) -> int:
    """Write the export and print its path; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stock", action="store_true", required=True, help="pad with zero units")
    parser.add_argument("--pruned", type=Path, required=True, help="pruned checkpoint directory")
    parser.add_argument("--original", type=Path, required=True, help="the unpruned checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    options = parser.parse_args(arguments)
    if options.out.exists():
        raise InputError(f"--out {options.out} exists already; name a new directory")
    export_stock(options.pruned, read_config(options.original), options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
