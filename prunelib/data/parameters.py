"""Reading a step's parameters: present, of the right kind, or one clear line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunelib.errors import InputError

_NAMES = {str: "a string", int: "a whole number", dict: "a mapping"}


def required(params: Mapping[str, Any], key: str, kind: type, step: str) -> Any:
    """Return ``params[key]``.

    Raises:
        InputError: it is missing or not of the given kind.
    """
    value = params.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        given = "is missing" if value is None else f"is {value!r}"
        raise InputError(f"{step}: {key} {given}; it must be {_NAMES[kind]}")
    return value
