"""Model families: the only place that knows one architecture from another.

A family is one module of this package. It names the ``model_type`` values that it serves in a
literal ``MODEL_TYPES`` and its class in ``FAMILY``; it is found by reading that literal, so that
adding a family touches no other file.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from prunelib.errors import InputError

if TYPE_CHECKING:
    from prunelib.families.base import Config, Family

# What the families have no units for, told by what a config of that kind always states.
_UNSUPPORTED = {
    "mixture of experts": (
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "num_experts_per_tok",
    ),
    "latent attention": ("kv_lora_rank",),
    "state space": ("state_size", "mamba_d_state", "ssm_state_size", "ssm_cfg"),
}


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


def _reasons(config: Config) -> str:
    """Return in parentheses what stands against an unsupported architecture, if it is known."""
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    reasons = [
        reason
        for reason, keys in _UNSUPPORTED.items()
        if any(part.get(key) for part in parts for key in keys)
    ]
    return f" ({', '.join(reasons)})" if reasons else ""


def family_module(config: Config) -> str:
    """Return the name of the module that serves a config, without importing it.

    Raises:
        InputError: no family serves its ``model_type``.
    """
    if "model_type" not in config:
        raise InputError("the model's config.json has no model_type")
    model_type = str(config["model_type"])
    modules = _modules_by_model_type()
    if model_type not in modules:
        supported = sorted(name for name in modules if not name.startswith("pruned_"))
        raise InputError(
            f"architecture {model_type!r} is not supported{_reasons(config)}; "
            f"supported model_type values: {', '.join(supported)}"
        )
    return modules[model_type]


def family_of(config: Config) -> Family:
    """Return the family that serves a config (a config.json as a mapping), after its check.

    Raises:
        InputError: the architecture, or something in this config, is not supported.
    """
    module = importlib.import_module(family_module(config))
    family: Family = module.FAMILY()
    try:
        family.check(config)
    except KeyError as error:
        raise InputError(f"config.json is not a valid {family.name} config: no {error}") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"config.json is not a valid {family.name} config: {error}") from error
    return family
