"""Steps and their content keys: the nodes of the graph that an experiment needs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prunelib.errors import PrunelibError
from prunelib.provenance import artefact
from prunelib.provenance.step import StepRequest, planned_key

RESULTS = Path("results")

# Distributions whose versions can change a step's numbers. Steps that load an adapter add peft.
_MODEL = ("torch", "transformers", "safetensors", "numpy")
PACKAGES: dict[str, tuple[str, ...]] = {
    "fetch_model": ("gguf", *_MODEL),
    "fetch_text": ("datasets", "mwparserfromhell"),
    "fetch_analogies": (),
    "calibration": ("numpy", "tokenizers", "transformers"),
    "tasks_data": ("numpy",),
    "statistics": _MODEL,
    "scores": ("numpy", "torch"),
    "prune": ("numpy", "safetensors", "torch"),
    "recover": ("peft", "tokenizers", *_MODEL),
    "merge": ("peft", *_MODEL),
    "perplexity": ("tokenizers", *_MODEL),
    "tasks": ("datasets", "lm-eval", "tokenizers", *_MODEL),
    "efficiency": _MODEL,
}
SCRIPTS = {step: f"workflow_scripts/{step}.py" for step in PACKAGES} | {
    # Not statistics.py, which would hide the standard library's module of that name.
    "statistics": "workflow_scripts/collect_statistics.py",
    "scores": "workflow_scripts/score.py",
}


@dataclass(frozen=True, eq=False)
class Node:
    """One step with all that decides its result.

    Attributes:
        step: name of the step, a key of ``SCRIPTS``.
        labels: readable path parts before the key.
        params: everything that the step is told.
        inputs: upstream nodes by name.
        modules: modules that the step imports by name at run time (method, family, pass).
    """

    step: str
    labels: tuple[str, ...]
    params: Mapping[str, Any]
    inputs: Mapping[str, Node]
    modules: tuple[str, ...] = ()

    @cached_property
    def packages(self) -> tuple[str, ...]:
        """Distributions in the key."""
        extra = {"peft"} if "adapter" in self.inputs else set()
        if "text" in self.inputs and self.inputs["text"].params.get("stream"):
            extra.add("datasets")
        if self.params.get("recipe", {}).get("processes", 1) > 1:
            extra.add("accelerate")
        return tuple(sorted(extra | {*PACKAGES[self.step]}))

    @cached_property
    def entry(self) -> tuple[str, ...]:
        """Where the fingerprint of the code starts."""
        return (SCRIPTS[self.step], *sorted(self.modules))

    @cached_property
    def key(self) -> str:
        """The content key."""
        upstream = {name: node.key for name, node in self.inputs.items()}
        return planned_key(self.step, self.params, self.entry, upstream, self.packages)

    @cached_property
    def directory(self) -> Path:
        """The artefact directory, relative to the working directory."""
        return RESULTS.joinpath(self.step, *self.labels, self.key)

    @cached_property
    def target(self) -> str:
        """The file that Snakemake waits for."""
        return f"{self.directory}/{artefact.RECORD}"

    @property
    def name(self) -> str:
        """What people call it: the step, then model, method, target and seed as far as they go."""
        return f"{self.step} of {'/'.join(self.labels)}"

    @property
    def log(self) -> Path:
        """Where the workflow writes the step's log."""
        return Path("logs", self.step, *self.labels, f"{self.key}.log")

    def request(self) -> str:
        """Return the step's request as one line of JSON."""
        return StepRequest(
            step=self.step,
            key=self.key,
            params=dict(self.params),
            inputs={name: node.directory for name, node in self.inputs.items()},
            out=self.directory,
            entry=self.entry,
            packages=self.packages,
        ).to_json()


def closure(nodes: Iterable[Node]) -> dict[str, Node]:
    """Return all nodes that ``nodes`` need, themselves included, by key.

    Raises:
        PrunelibError: two places are planned for one result, of which one would stay empty.
    """
    found: dict[str, Node] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.key not in found:
            found[node.key] = node
            waiting.extend(node.inputs.values())
        elif node.labels != found[node.key].labels:
            raise PrunelibError(f"{node.name} and {found[node.key].name} have the key {node.key}")
    return found


def needed(terminal: Iterable[Node]) -> dict[str, Node]:
    """Return the nodes, by key, that are not valid and that some asked-for artefact waits for.

    Going up from the terminal nodes, a valid artefact ends the search: an intermediate one that
    is missing is not made again when nothing needs it.
    """
    found: dict[str, Node] = {}
    waiting = list(terminal)
    seen: set[str] = set()
    while waiting:
        node = waiting.pop()
        if node.key in seen:
            continue
        seen.add(node.key)
        # Most of a new experiment is not there at all, which takes one look.
        if not (
            os.path.exists(node.target)  # noqa: PTH110
            and artefact.is_valid(node.directory, node.key)
        ):
            found[node.key] = node
            waiting.extend(node.inputs.values())
    return found


def waits_for(nodes: Iterable[Node], making: Mapping[str, Node]) -> list[Node]:
    """Return what something that needs ``nodes`` has to wait for: those that bring no other along.

    A step that will be made has waited for its own inputs; to wait for these again says nothing
    new, and a planner pays for every edge of the graph.

    Args:
        nodes: what is needed, in order.
        making: the nodes, by key, that are going to be made.
    """
    nodes = list(nodes)
    brought: set[str] = set()
    waiting = [node for node in nodes if node.key in making]
    seen: set[str] = set()
    while waiting:
        for above in waiting.pop().inputs.values():
            brought.add(above.key)
            if above.key in making and above.key not in seen:
                seen.add(above.key)
                waiting.append(above)
    return [node for node in nodes if node.key not in brought]


def report_key(description: Mapping[str, Any], nodes: Mapping[str, Node]) -> str:
    """Return the key of what the report would show: the cells, their artefacts and its code."""
    packages = ("matplotlib", "pandas", "seaborn")
    upstream = {str(node.directory): key for key, node in nodes.items()}
    return planned_key("report", description, ("workflow_scripts/report.py",), upstream, packages)
