"""The registry of pruning methods: found by name, imported only when used.

``name`` is a module of this package, or an entry point of the group ``prunelib.methods`` of a
separately installed package (``name = "package.module"``). No list of methods exists anywhere, so
adding one changes no other file.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunelib.errors import InputError

if TYPE_CHECKING:
    from prunelib.methods.base import Method

GROUP = "prunelib.methods"
_NOT_METHODS = {"__init__", "base"}


@cache
def available() -> dict[str, str]:
    """Return the module of every known method, by name."""
    here = Path(__file__).parent
    own = {p.stem: f"{__name__}.{p.stem}" for p in here.glob("*.py") if p.stem not in _NOT_METHODS}
    outside = {e.name: e.value.partition(":")[0] for e in entry_points(group=GROUP)}
    return outside | own


def method_module(name: str) -> str:
    """Return the module that holds the method ``name``.

    Raises:
        InputError: there is no such method.
    """
    modules = available()
    if name not in modules:
        raise InputError(f"method {name!r} is unknown; known: {', '.join(sorted(modules))}")
    return modules[name]


def create(name: str, parameters: Mapping[str, Any]) -> Method:
    """Return the method ``name`` with hyper-parameters ``parameters``.

    Raises:
        InputError: unknown method, unknown hyper-parameter or a value that it refuses.
    """
    method_class: type[Method] = importlib.import_module(method_module(name)).METHOD
    allowed = [field.name for field in fields(method_class)]
    if unknown := sorted(set(parameters) - set(allowed)):
        raise InputError(
            f"method {name}: unknown hyper-parameter {', '.join(unknown)}; "
            f"allowed: {', '.join(allowed)}"
        )
    method = method_class(**parameters)
    method.rule()
    return method
