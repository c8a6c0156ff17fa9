"""Model families: the only place that knows one architecture from another.

A family is one module of this package. It names the ``model_type`` values that it serves in a
literal ``MODEL_TYPES`` and its class in ``FAMILY``; it is found by reading that literal, so that
adding a family touches no other file.
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from prunelib.errors import InputError

if TYPE_CHECKING:
    from prunelib.families.base import Config, Family


@cache
def _modules_by_model_type() -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id == "MODEL_TYPES"
            ):
                for model_type in ast.literal_eval(node.value):
                    found[model_type] = f"{__name__}.{path.stem}"
    return found


def family_module(model_type: str) -> str:
    """Return the name of the module that serves ``model_type``, without importing it.

    Raises:
        InputError: no family serves it.
    """
    modules = _modules_by_model_type()
    if model_type not in modules:
        raise InputError(
            f"architecture {model_type!r} is not supported; supported model_type values: "
            f"{', '.join(sorted(modules))}"
        )
    return modules[model_type]


def family_of(config: Config) -> Family:
    """Return the family that serves a config (a config.json as a mapping), after its check.

    Raises:
        InputError: the architecture, or something in this config, is not supported.
    """
    if "model_type" not in config:
        raise InputError("the model's config.json has no model_type")
    module = importlib.import_module(family_module(str(config["model_type"])))
    family: Family = module.FAMILY()
    family.check(config)
    return family
