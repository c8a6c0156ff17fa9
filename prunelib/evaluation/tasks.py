"""What is evaluated by lm-eval: tasks by name, and local ones with definition and documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunelib.errors import InputError

# Multiple choice: right answers, and with log-likelihoods by the character. Generation: texts that
# are the reference, and their chrF against it (Popovic 2015). All from 0 to 1.
CHOICE_METRICS = ("acc", "acc_norm")
GENERATION_METRICS = ("exact_match", "chrf")
TASK_METRICS = (*CHOICE_METRICS, *GENERATION_METRICS)


@dataclass(frozen=True)
class TaskSpec:
    """One task: a hub task of lm-eval by name, or a local one with its definition and documents.

    Attributes:
        name: lm-eval's name of the task, or the local task's ``task`` key.
        definition: lm-eval task definition as data; None for a hub task.
        documents: JSON-lines file of a local task; None for a hub task.
    """

    name: str
    definition: Mapping[str, Any] | None = None
    documents: Path | None = None

    def __post_init__(self) -> None:
        if (self.definition is None) != (self.documents is None):
            raise InputError(f"task {self.name}: a local task needs both definition and documents")
        if self.definition is not None and self.definition.get("task") != self.name:
            raise InputError(f"task {self.name}: its definition says {self.definition.get('task')}")


def read_definition(path: Path) -> dict[str, Any]:
    """Read an lm-eval task file as data.

    A safe loader refuses lm-eval's ``!function`` tag: definitions are data here, never code. The
    result belongs in the step's parameters, so that a changed definition gives another key.

    Raises:
        InputError: the file is missing, not plain YAML, or has no ``task`` key.
    """
    import yaml

    try:
        definition = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise InputError(f"{path}: not a plain YAML file ({message})") from error
    if not isinstance(definition, dict) or not isinstance(definition.get("task"), str):
        raise InputError(f"{path}: must be a mapping with the key `task`")
    return definition
