"""What the commands for people have in common: arguments, and errors as one line each."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from prunelib.errors import PrunelibError


def experiment_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with ``--experiment`` and ``--catalogue``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--experiment", type=Path, required=True, help="the experiment file")
    parser.add_argument(
        "--catalogue", type=Path, default=Path("config"), help="the catalogues' directory"
    )
    return parser


def reporting_errors(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Let a command end with one line on standard error and an exit code, not with a traceback.

    Args:
        name: the command's, in front of the message.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def command(arguments: list[str] | None = None) -> int:
            try:
                return main(arguments)
            except PrunelibError as error:
                print(f"error: {name}: {error}", file=sys.stderr)
                return error.exit_code
            except OSError as error:
                print(f"error: {name}: {error}", file=sys.stderr)
                return 1

        return command

    return decorate
