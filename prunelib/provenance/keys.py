"""Content keys: what a result depends on, hashed.

Two sides compute the key of a step with these functions: the workflow when it builds the DAG, and
the step itself before it writes. Neither mtimes nor the git commit take part.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from typing import Any

from prunelib.errors import InputError
from prunelib.provenance.fingerprint import Fingerprint

_KEY_RULES = 1
"""Raised when the meaning of a key changes, so that old and new keys never collide."""
_PLAIN = frozenset({str, int, bool, type(None)})


@cache
def _version(name: str) -> str:
    try:
        version = metadata.version(name)
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise InputError(f"package {name!r} is not installed, but results depend on it") from error
    return version.split("+")[0]


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each distribution, without local tags such as ``+cpu``.

    Raises:
        InputError: a distribution is not installed.
    """
    return {name: _version(name) for name in sorted(set(names))}


def canonical_json(value: Any, where: str) -> str:
    """Return the one JSON text of a value: sorted keys, no blanks, floats by ``repr``, ASCII.

    Raises:
        InputError: the value holds NaN, an infinity, a key that is not a string, or an object
            that JSON does not have; the message names the place, beginning with ``where``.
    """
    _refuse_what_json_lacks(value, where)
    return _dump(value)


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _refuse_what_json_lacks(value: Any, where: str) -> None:
    # By exact type first: this runs over every value of every key while the DAG is built.
    kind = type(value)
    if kind in _PLAIN:
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{where}: {value!r} is not a finite number")
    elif kind is dict or isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                raise InputError(f"{where}: key {name!r} is not a string")
            if type(item) not in _PLAIN:
                _refuse_what_json_lacks(item, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if type(item) not in _PLAIN:
                _refuse_what_json_lacks(item, f"{where}[{index}]")
    elif not isinstance(value, str | int):
        raise InputError(f"{where}: a {type(value).__name__} cannot be part of a key")


def step_key(
    step: str,
    params: Mapping[str, Any],
    fingerprint: Fingerprint,
    upstream: Mapping[str, str],
    packages: Mapping[str, str],
) -> str:
    """Return the content key of a step: 16 hex digits of a sha256.

    Args:
        step: name of the step.
        params: everything the step is told, JSON values only. ``1`` and ``1.0`` differ.
        fingerprint: the code that it runs.
        upstream: name of each input to the content key of that artefact.
        packages: distribution name to version, see ``package_versions``.

    Raises:
        InputError: the parameters are not plain finite JSON values.
    """
    payload = {
        "rules": _KEY_RULES,
        "step": step,
        "params": dict(params),
        "code": fingerprint.digest,
        "upstream": dict(upstream),
        "packages": dict(packages),
    }
    # The rest is text of our own; the parameters are what may hold anything.
    _refuse_what_json_lacks(payload["params"], f"key of step {step!r}.params")
    text = _dump(payload)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
