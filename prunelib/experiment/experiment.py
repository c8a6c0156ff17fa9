"""An experiment file to cells: which runs it asks for, and the steps of each.

A cell is one row of the report: a model, a method (or control), a target, a seed and a recovery.
Everything that can be refused without a network or weights is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from prunelib.data.sources import parse_source, require_pinned
from prunelib.data.stream import FORMATS as STREAM_FORMATS
from prunelib.depth_selection import block_count
from prunelib.errors import InputError, PrunelibError
from prunelib.experiment.graph import Node
from prunelib.experiment.schema import (
    CATALOGUES,
    load_catalogue,
    lookup,
    read_yaml,
    validate,
)
from prunelib.families import family_module, family_of
from prunelib.methods import create, method_module
from prunelib.methods.base import Method
from prunelib.rules import Target
from prunelib.selection import check_reachable
from prunelib.statistics import WITHIN
from prunelib.statistics.merges import check_merges

# Methods that choose at random: controls of all others.
RANDOM_METHODS = ("random", "random_blocks")


@dataclass(frozen=True, eq=False)
class Cell:
    """One row of the report.

    Attributes:
        model: catalogue name.
        method: catalogue name of the method, or ``dense`` or ``recovery_only``.
        control: ``dense``, ``random``, ``prune_zero``, ``recovery_only`` or None.
        target: what was to be removed; None for unpruned models.
        seed: None where nothing random is involved.
        recovery: catalogue name of the recovery, or ``none``.
        steps: the cell's nodes by name: prune, recovery, merged, perplexity, tasks, efficiency.
    """

    model: str
    method: str
    control: str | None
    target: Target | None
    seed: int | None
    recovery: str
    steps: Mapping[str, Node]

    @property
    def id(self) -> str:
        """A name that is unique in the experiment."""
        target = _target_label(self.target) if self.target else "unpruned"
        seed = "no-seed" if self.seed is None else f"seed{self.seed}"
        return "/".join((self.model, self.method, target, seed, self.recovery))

    def describe(self) -> dict[str, Any]:
        """Return the cell as data for the report step."""
        names = ("prune", "recovery", "perplexity", "tasks", "efficiency")
        target = self.target
        return {
            "id": self.id,
            "model": self.model,
            "method": self.method,
            "control": self.control,
            "target": (
                {"kind": target.kind, "value": target.value, "only": target.only}
                if target
                else None
            ),
            "seed": self.seed,
            "recovery": self.recovery,
            "artefacts": {
                name: str(self.steps[name].directory) if name in self.steps else None
                for name in names
            },
        }


def _after(previous: Node | None) -> tuple[tuple[str, ...], dict[str, Node]]:
    """Return labels and inputs of a step that goes on from a partly pruned model."""
    return (
        ((), {}) if previous is None else (("after", *previous.labels[1:]), {"previous": previous})
    )


def _target_label(target: Target) -> str:
    label = f"{target.kind}-{target.value:g}"
    if target.only:
        label += f"-{target.only}"
    if target.protects:
        label += f"-protect-{target.protect_first:g}-{target.protect_last:g}"
        label += "".join(f"-{layer}" for layer in target.protect_layers)
    return label


def _with_named_targets(data: Any, path: Path, config: Path) -> Any:
    """Return an experiment's data with the catalogue's targets in the place of their names."""
    targets = data.get("targets") if isinstance(data, dict) else None
    if not isinstance(targets, list) or not any(isinstance(entry, str) for entry in targets):
        return data
    known = load_catalogue(config, "targets")
    found = [
        lookup(known, entry, "target", f"{path}: targets[{number}]")
        if isinstance(entry, str)
        else entry
        for number, entry in enumerate(targets)
    ]
    return data | {"targets": found}


@dataclass(frozen=True, eq=False)
class Experiment:
    """A validated experiment with its catalogues.

    Attributes:
        path: the experiment file.
        config: the configuration directory with the catalogues.
        data: the experiment's content.
        catalogues: entries by catalogue and name.
    """

    path: Path
    config: Path
    data: Mapping[str, Any]
    catalogues: Mapping[str, Mapping[str, Any]] = field(repr=False)

    @classmethod
    def load(cls, path: Path, config: Path) -> Experiment:
        """Read and validate an experiment and the catalogues that it names entries of.

        Raises:
            InputError: file, key, what was given and what is allowed.
        """
        data = _with_named_targets(read_yaml(path), path, config)
        validate(data, "experiment", path)
        catalogues = {name: load_catalogue(config, name) for name in CATALOGUES}
        experiment = cls(path, config, data, catalogues)
        experiment._check_names()
        return experiment

    def _check_names(self) -> None:
        wanted = {
            "models": self.data["models"],
            "methods": [*self.data["methods"], self.data["baseline"]],
            "calibration": [self.data["calibration"]],
            "recovery": self.data["recovery"],
            "evaluation": [self.data["evaluation"]],
        }
        for catalogue, names in wanted.items():
            for name in names:
                lookup(self.catalogues[catalogue], name, catalogue, f"{self.path}: {catalogue}")
        if self.data["baseline"] not in self.data["methods"]:
            raise InputError(
                f"{self.path}: baseline: {self.data['baseline']!r} is not one of the methods"
            )
        self._check_texts()

    def _check_texts(self) -> None:
        """Refuse a text of instructions or a stream where articles are read, and what lacks parts.

        Validation needs instructions; epochs need a text with an end, token budgets one of windows.
        """
        texts = self.catalogues["texts"]

        def instructions(name: str, where: str) -> bool:
            entry = lookup(texts, name, "text", str(self.config / where))
            return bool(entry["format"] == "alpaca")

        evaluation = self.catalogues["evaluation"][self.data["evaluation"]]
        articles = [
            ("calibration.yaml", self.catalogues["calibration"][self.data["calibration"]]["text"]),
            ("evaluation.yaml", evaluation["perplexity"]["text"]),
        ]
        if local := evaluation.get("tasks", {}).get("local"):
            articles.append(("evaluation.yaml", local["text"]))
        for where, name in articles:
            if instructions(name, where):
                raise InputError(
                    f"{self.config / where}: text {name!r} holds instructions; "
                    "allowed: a text of articles"
                )
            if texts[name].get("stream"):
                raise InputError(
                    f"{self.config / where}: text {name!r} is a stream; allowed: a text that is "
                    "fetched, and streams for recovery alone"
                )
        for recovery in self.data["recovery"]:
            entry = self.catalogues["recovery"][recovery]
            wanted = entry["recipe"].get("eval_every") is not None
            if wanted and not instructions(entry["text"], "recovery.yaml"):
                raise InputError(
                    f"{self.config / 'recovery.yaml'}: {recovery}: eval_every needs a validation "
                    f"part, which text {entry['text']!r} of articles has not; "
                    "allowed: a text of the format alpaca"
                )
            self._check_length(recovery)

    def _check_length(self, recovery: str) -> None:
        """Refuse a recovery whose text and recipe do not agree on how long it is."""
        entry = self.catalogues["recovery"][recovery]
        text, recipe = self.catalogues["texts"][entry["text"]], entry["recipe"]
        where = f"{self.config / 'recovery.yaml'}: {recovery}: text {entry['text']!r}"
        budget = recipe.get("tokens")
        if text.get("stream"):
            if text["format"] not in STREAM_FORMATS or set(text.get("split", {})) - {"recovery"}:
                raise InputError(
                    f"{where} is a stream, which has no parts but recovery and one of the formats "
                    f"{', '.join(STREAM_FORMATS)}"
                )
            if budget is None and recipe.get("max_steps") is None:
                raise InputError(
                    f"{where} is a stream, which has no epochs; allowed: a recipe with tokens or "
                    "max_steps"
                )
        elif budget is not None and text["format"] == "alpaca":
            raise InputError(
                f"{where} holds instructions; tokens is allowed for texts of articles and streams"
            )

    @cached_property
    def methods(self) -> dict[str, Method]:
        """The methods of the experiment by catalogue name."""
        made = {}
        for name in self.data["methods"]:
            entry = self.catalogues["methods"][name]
            try:
                made[name] = create(entry["method"], entry.get("parameters", {}))
            except PrunelibError as error:
                raise InputError(f"{self.config / 'methods.yaml'}: {name}: {error}") from error
        return made

    @cached_property
    def targets(self) -> list[Target]:
        """The targets of the experiment."""
        targets = []
        for number, entry in enumerate(self.data["targets"]):
            protect = entry.get("protect", {})
            ((kind, value),) = ((k, v) for k, v in entry.items() if k not in ("protect", "only"))
            try:
                targets.append(
                    Target(
                        kind,
                        value,
                        protect.get("first", 0),
                        protect.get("last", 0),
                        tuple(sorted(protect.get("layers", ()))),
                        entry.get("only"),
                    )
                )
            except InputError as error:
                raise InputError(f"{self.path}: targets[{number}]: {error}") from error
        return targets

    @cache  # noqa: B019
    def geometry(self, model: str) -> dict[str, Any]:
        """Return the published config of a model, reduced to what shapes need.

        Raises:
            InputError: the geometry file is missing, or a ``dir:`` model does not exist.
        """
        entry = self.catalogues["models"][model]
        source = parse_source(entry["source"])
        if "geometry" in entry:
            path = self.config / entry["geometry"]
        elif source.kind == "dir":
            path = Path(source.name) / "config.json"
            if not path.parent.is_dir():
                raise InputError(
                    f"{self.config / 'models.yaml'}: {model}: model directory "
                    f"{source.name} does not exist"
                )
        else:
            raise InputError(
                f"{self.config / 'models.yaml'}: {model}: geometry is needed for {entry['source']}"
            )
        try:
            geometry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: geometry of model {model} cannot be read ({error})"
            ) from error
        return geometry

    def preflight(self) -> list[str]:
        """Return what stands against running this experiment now, one line each."""
        problems = []
        for catalogue, names in (("models", self.data["models"]), ("texts", self._texts())):
            for name in names:
                entry = self.catalogues[catalogue][name]
                source = parse_source(entry["source"])
                try:
                    if source.kind == "hf":
                        require_pinned(source)
                    elif source.kind == "dir" and not Path(source.name).exists():
                        raise InputError(f"{entry['source']} does not exist")
                except InputError as error:
                    problems.append(f"{self.config / (catalogue + '.yaml')}: {name}: {error}")
        return problems

    def _texts(self) -> list[str]:
        evaluation = self.catalogues["evaluation"][self.data["evaluation"]]
        names = {self.catalogues["calibration"][self.data["calibration"]]["text"]}
        names |= {self.catalogues["recovery"][name]["text"] for name in self.data["recovery"]}
        names.add(evaluation["perplexity"]["text"])
        if local := evaluation.get("tasks", {}).get("local"):
            names |= {local["text"], local["analogies_text"]}
        return sorted(names)

    @cached_property
    def _task_definitions(self) -> dict[str, Any]:
        """The lm-eval definitions of local tasks, by name."""
        return {path.stem: read_yaml(path) for path in (self.config / "tasks").glob("*.yaml")}

    # ---------------------------------------------------------------- nodes

    @cached_property
    def _compute(self) -> dict[str, Any]:
        compute = self.data["compute"]
        return {name: compute[name] for name in ("device", "dtype", "threads")}

    def _family(self, model: str) -> str:
        return family_module(self.geometry(model))

    @cache  # noqa: B019
    def _model(self, name: str) -> Node:
        entry = dict(self.catalogues["models"][name])
        for unused in ("licence_url", "citation"):
            entry.pop(unused, None)
        params = entry | {"name": name, "geometry": self.geometry(name)}
        return Node("fetch_model", (name,), params, {})

    @cache  # noqa: B019
    def _text(self, name: str) -> Node:
        entry = dict(
            lookup(self.catalogues["texts"], name, "text", str(self.config / "texts.yaml"))
        )
        for unused in ("licence_url", "citation", "attribution"):
            entry.pop(unused, None)
        step = "fetch_analogies" if entry["format"] == "analogies" else "fetch_text"
        return Node(step, (name,), entry | {"name": name}, {})

    @cache  # noqa: B019
    def _calibration(self, model: str, seed: int) -> Node:
        name = self.data["calibration"]
        entry = self.catalogues["calibration"][name]
        params = {"windows": entry["windows"], "length": entry["length"], "seed": seed}
        inputs = {"text": self._text(entry["text"]), "model": self._model(model)}
        return Node("calibration", (name, model, f"seed{seed}"), params, inputs)

    @cache  # noqa: B019
    def _statistics(
        self, model: str, name: str, options: str, seed: int, previous: Node | None = None
    ) -> Node:
        compute = self._compute | {"batch_windows": self.data["compute"]["batch_windows"]}
        # Variants that tell a pass the same share it.
        if options:
            compute |= {"options": json.loads(options), "seed": seed}
        inputs = {"model": self._model(model), "calibration": self._calibration(model, seed)}
        after, more = _after(previous)
        return Node(
            "statistics",
            (model, name, self.data["calibration"], f"seed{seed}", *after),
            compute | {"name": name},
            inputs | more,
            (f"prunelib.statistics.{name}", self._family(model)),
        )

    @cached_property
    def _merged(self) -> dict[str, str]:
        """The pass that is run in the place of each pass of the experiment's methods."""
        asked = {name for method in self.methods.values() for name in method.statistics}
        if not self.data.get("merge_passes", False):
            return {name: name for name in asked}
        return {
            name: next((more for more in reversed(WITHIN.get(name, ())) if more in asked), name)
            for name in asked
        }

    def _seeded(self, method: Method) -> bool:
        return bool(method.statistics) or method.seeded

    def _scored_with(self, variant: str, method: Method) -> dict[str, Any]:
        """Return the hyper-parameters of a variant that its scores depend on."""
        given = self.catalogues["methods"][variant].get("parameters", {})
        return {key: value for key, value in given.items() if key not in method.selection_fields}

    @cache  # noqa: B019
    def _scores(self, model: str, variant: str, seed: int, previous: Node | None = None) -> Node:
        entry = self.catalogues["methods"][variant]
        method = self.methods[variant]
        parameters = self._scored_with(variant, method)
        params = {
            "method": entry["method"],
            "parameters": parameters,
            "seed": seed if method.seeded else None,
        }
        inputs = {"model": self._model(model)}
        for name in method.statistics:
            told = method.statistic_options.get(name)
            options = json.dumps(told, sort_keys=True) if told else ""
            inputs[name] = self._statistics(model, self._merged[name], options, seed, previous)
        after, more = _after(previous)
        inputs |= more
        # Variants that share scores share their place, too: the first one's in the catalogue.
        first = next(
            name
            for name, other in self.catalogues["methods"].items()
            if other["method"] == entry["method"] and self._scored_with(name, method) == parameters
        )
        labels = (model, first, *((f"seed{seed}",) if self._seeded(method) else ()), *after)
        modules = (method_module(entry["method"]), self._family(model))
        return Node("scores", labels, params, inputs, modules)

    @cache  # noqa: B019
    def _prune(
        self, model: str, variant: str, target: Target, seed: int, step: int | None = None
    ) -> Node:
        """Return the step that reaches ``target``, or ``step`` of the method's iterative steps."""
        entry = self.catalogues["methods"][variant]
        method = self.methods[variant]
        steps = method.iterative_steps if target.value else 1
        whole, step = target, steps if step is None else step
        previous = self._prune(model, variant, target, seed, step - 1) if step > 1 else None
        if step < steps:
            target = replace(target, value=target.value * step / steps)
        params = {
            "method": entry["method"],
            "variant": variant,
            "parameters": dict(entry.get("parameters", {})),
            "target": target.to_dict(),
            "seed": seed if self._seeded(method) else None,
        }
        inputs = {
            "model": self._model(model),
            "scores": self._scores(model, variant, seed, previous),
        }
        inputs |= _after(previous)[1]
        labels = (
            model,
            variant,
            _target_label(whole),
            *((f"seed{seed}",) if self._seeded(method) else ()),
            *((f"step{step}of{steps}",) if step < steps else ()),
        )
        modules = (method_module(entry["method"]), self._family(model))
        return Node("prune", labels, params, inputs, modules)

    def _trained_with(self, recovery: str, shares: bool) -> tuple[str, dict[str, Any]]:
        """Return text and recipe of a recovery, of the latter what matters to a checkpoint."""
        entry = self.catalogues["recovery"][recovery]
        recipe = {k: v for k, v in entry["recipe"].items() if shares or k != "kept_lora"}
        return entry["text"], recipe

    def _filed(self, recovery: str, shares: bool) -> str:
        """Return the recovery whose place a result has: the catalogue's first that trains alike."""
        wanted = self._trained_with(recovery, shares)
        known = self.catalogues["recovery"]
        return next(name for name in known if self._trained_with(name, shares) == wanted)

    def _recover(
        self, checkpoint: Node, labels: tuple[str, ...], name: str, seed: int, shares: bool
    ) -> Node:
        text, recipe = self._trained_with(name, shares)
        params = self._compute | {"recipe": recipe, "seed": seed}
        inputs = {"checkpoint": checkpoint, "text": self._text(text)}
        return Node("recover", (*labels, name), params, inputs, (self._family(labels[0]),))

    def _evaluations(
        self, checkpoint: Node, adapter: Node | None, labels: tuple[str, ...], efficiency: bool
    ) -> dict[str, Node]:
        entry = self.catalogues["evaluation"][self.data["evaluation"]]
        inputs = {"checkpoint": checkpoint} | ({"adapter": adapter} if adapter else {})
        family = (self._family(labels[0]),)
        perplexity = dict(entry["perplexity"])
        text = self._text(perplexity.pop("text"))
        nodes = {
            "perplexity": Node(
                "perplexity", labels, self._compute | perplexity, inputs | {"text": text}, family
            )
        }
        if "tasks" in entry:
            nodes["tasks"] = self._tasks(dict(entry["tasks"]), inputs, labels, family)
        if efficiency and "efficiency" in entry:
            params = self._compute | dict(entry["efficiency"])
            params["hardware_class"] = self.data["compute"]["hardware_class"]
            nodes["efficiency"] = Node("efficiency", labels, params, inputs, family)
        return nodes

    def _tasks(
        self,
        entry: dict[str, Any],
        inputs: Mapping[str, Node],
        labels: tuple[str, ...],
        family: tuple[str, ...],
    ) -> Node:
        local = entry.pop("local", None)
        entry.pop("columns", None)
        params = self._compute | entry
        more: dict[str, Node] = {}
        if local:
            params["definitions"] = {
                name: self._task_definitions[name]
                for name in entry["tasks"]
                if name in self._task_definitions
            }
            counts = {
                key: local[key]
                for key in ("continuation", "analogies", "completion", "seed")
                if key in local
            }
            sources = {
                "text": self._text(local["text"]),
                "analogies": self._text(local["analogies_text"]),
            }
            more["tasks_data"] = Node("tasks_data", (local["text"],), counts, sources)
        return Node("tasks", labels, params, {**inputs, **more}, family)

    # ---------------------------------------------------------------- cells

    def check(self) -> None:
        """Refuse what no run could reach: every method on every model at every target.

        Raises:
            InputError: naming experiment, model, method and target.
        """
        for model in self.data["models"]:
            geometry = self.geometry(model)
            try:
                family = family_of(geometry)
            except PrunelibError as error:
                raise InputError(f"{self.path}: models: {model}: {error}") from error
            for variant, method in self.methods.items():
                for number, target in enumerate(self.targets):
                    try:
                        check_reachable(family, geometry, target, method.rule())
                        if "laco" in method.statistics:
                            check_merges(
                                method.statistic_options["laco"],
                                family.dimensions(geometry).layers,
                                block_count(family, geometry, target, method.rule()),
                            )
                    except PrunelibError as error:
                        raise InputError(
                            f"{self.path}: targets[{number}] with {variant} on {model}: {error}"
                        ) from error

    @cached_property
    def cells(self) -> list[Cell]:
        """All rows of the report, controls included.

        Raises:
            InputError: a target cannot be reached, a model is missing.
        """
        self.check()
        cells: list[Cell] = []
        for model in self.data["models"]:
            cells += self._dense(model)
            cells.append(self._prune_zero(model))
            for variant in self.methods:
                for target in self.targets:
                    cells += self._pruned(model, variant, target)
        return cells

    def _row(
        self,
        model: str,
        method: str,
        control: str | None,
        target: Target | None,
        seed: int | None,
        prune: Node | None,
        recovery: str = "none",
        efficiency: bool = False,
    ) -> Cell:
        labels: tuple[str, ...] = (model, method)
        if target:
            labels += (_target_label(target),)
        if seed is not None:
            labels += (f"seed{seed}",)
        checkpoint = prune or self._model(model)
        steps: dict[str, Node] = {"prune": prune} if prune else {}
        adapter, filed = None, recovery
        if recovery != "none":
            assert seed is not None
            shares = prune is not None and self.methods[method].rule().sharer is not None
            filed = self._filed(recovery, shares)
            adapter = self._recover(checkpoint, labels, filed, seed, shares)
            steps["recovery"] = adapter
            if self.data.get("merge", False):
                pair = {"checkpoint": checkpoint, "adapter": adapter}
                modules = (self._family(model),)
                steps["merged"] = Node("merge", (*labels, filed), {}, pair, modules)
        steps |= self._evaluations(checkpoint, adapter, (*labels, filed), efficiency)
        return Cell(model, method, control, target, seed, recovery, steps)

    def _dense(self, model: str) -> list[Cell]:
        cells = [self._row(model, "dense", "dense", None, None, None, efficiency=True)]
        for recovery in self.data["recovery"]:
            for seed in self.data["seeds"]:
                cells.append(
                    self._row(model, "recovery_only", "recovery_only", None, seed, None, recovery)
                )
        return cells

    def _prune_zero(self, model: str) -> Cell:
        variant, seed = self.data["baseline"], self.data["seeds"][0]
        target = Target("parameters", 0.0)
        prune = self._prune(model, variant, target, seed)
        return self._row(model, variant, "prune_zero", target, seed, prune)

    def _pruned(self, model: str, variant: str, target: Target) -> list[Cell]:
        method = self.methods[variant]
        registered = self.catalogues["methods"][variant]["method"]
        control = "random" if registered in RANDOM_METHODS else None
        cells = []
        seeds = self.data["seeds"]
        for number, seed in enumerate(seeds):
            prune = self._prune(model, variant, target, seed)
            if self._seeded(method) or number == 0:
                own = seed if self._seeded(method) else None
                # All seeds give the same widths; one of them is timed.
                cells.append(
                    self._row(model, variant, control, target, own, prune, efficiency=number == 0)
                )
            for recovery in self.data["recovery"]:
                cells.append(self._row(model, variant, control, target, seed, prune, recovery))
        return cells

    def report(self) -> dict[str, Any]:
        """Return what the report step is told."""
        evaluation = self.catalogues["evaluation"][self.data["evaluation"]]
        texts = {name: self.catalogues["texts"][name] for name in self._texts()}
        return {
            "experiment": {**self.data, "evaluation_settings": evaluation},
            "models": {name: self.catalogues["models"][name] for name in self.data["models"]},
            "texts": texts,
            "methods": {
                variant: {
                    "method": self.catalogues["methods"][variant]["method"],
                    "title": self.catalogues["methods"][variant].get("title", method.title),
                    "citation": method.citation,
                    "parameters": self.catalogues["methods"][variant].get("parameters", {}),
                }
                for variant, method in self.methods.items()
            },
            "cells": [cell.describe() for cell in self.cells],
        }
