"""Write the commits of unpinned hub sources into a catalogue: ``python -m prunelib.data.pin``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from prunelib.data.sources import UNPINNED
from prunelib.errors import InputError, PrunelibError

_UNPINNED = re.compile(rf"hf:(?P<name>[\w.-]+/[\w.-]+)@{UNPINNED}\b")


def current_commit(name: str, *, dataset: bool) -> str:
    """Look up the commit that the main branch of a hub repository stands at.

    Raises:
        InputError: it cannot be looked up.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().repo_info(name, repo_type="dataset" if dataset else "model")
    except Exception as error:  # HTTP and validation errors of three libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"hf:{name}: its commit cannot be looked up: {reason}") from error
    if not info.sha:
        raise InputError(f"hf:{name}: the hub names no commit")
    return info.sha


def pin(text: str, lookup: Callable[[str], str]) -> str:
    """Return a catalogue's text with every unpinned revision replaced; the rest is untouched."""
    return _UNPINNED.sub(lambda found: f"hf:{found['name']}@{lookup(found['name'])}", text)


def main(paths: list[str]) -> int:
    """Pin each catalogue in place; texts are datasets, everything else is a model."""
    try:
        for path in map(Path, paths):
            dataset = path.name == "texts.yaml"
            before = path.read_text(encoding="utf-8")
            after = pin(before, lambda name, d=dataset: current_commit(name, dataset=d))  # type: ignore[misc]
            path.write_text(after, encoding="utf-8")
            print(f"{path}: {len(_UNPINNED.findall(before))} revisions pinned")
    except (PrunelibError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
