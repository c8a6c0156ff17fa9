"""Iterative pruning: statistics, scores and plans of what the steps before left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, tiny_config, tiny_model
from safetensors.torch import save_file
from test_llm_pruner import WINDOWS
from test_pruned_equals_masked import Checkpoints, pruned, random_plan
from tiny_project import CATALOGUES, EXPERIMENT, make_project

from prunelib import checkpoint
from prunelib.errors import InputError, IntegrityError
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import Node
from prunelib.families import family_of
from prunelib.methods import create
from prunelib.methods.base import ScoringInputs
from prunelib.plan import Plan
from prunelib.provenance import artefact
from prunelib.provenance.step import StepRequest
from prunelib.rules import Rule, Target
from prunelib.selection import select
from prunelib.statistics import activations, gradients
from prunelib.statistics.inputs import PassInputs
from workflow_scripts import collect_statistics, prune, score

WIDTH = Rule(("kv_group", "mlp_channel"))


@pytest.mark.parametrize("name", TINY)
def test_the_masked_model_gives_the_statistics_of_the_smaller_one(name: str) -> None:
    """The smaller model's by plain autograd; what is removed has products of zero."""
    model = tiny_model(name)
    config = model.config.to_dict()
    family = family_of(config)
    plan = random_plan(config, WIDTH.kinds, shape="per layer", seed=7)
    checkpoint.mask_model(model, config, plan)
    found = gradients.collect(PassInputs(model, family, config, WINDOWS, 2))
    felt = activations.collect(PassInputs(model, family, config, WINDOWS, 2))
    small = pruned(name, config, plan)
    layers = family.layers(small)
    small(WINDOWS, labels=WINDOWS).loss.backward()
    alone = activations.collect(PassInputs(small, family, config, WINDOWS, 2))
    for index in range(len(layers)):
        keep = family.kept_positions(config, plan.kept[index] or {})
        for parameter, weight in layers[index].named_parameters():
            product = (weight * weight.grad).detach().abs()
            for axis, label in ((0, "rows"), (1, "columns"))[: product.ndim]:
                sums = found[f"{index}.{parameter}.abs.{label}"]
                there = keep.get((parameter, axis), np.arange(len(sums)))
                expected = product.sum(1 - axis) if product.ndim == 2 else product
                # A bias of keys that nothing rotates has a gradient of rounding errors.
                assert (sums[there] - expected).abs().max() < 1e-5 * expected.abs().max() + 1e-8
                gone = np.setdiff1d(np.arange(len(sums)), there)
                assert not sums[gone].any()
        for module in family.activation_inputs():
            key = f"{index}.{module}.sum_squares"
            there = keep.get((f"{module}.weight", 1), np.arange(len(felt[key])))
            assert felt[key][there].numpy() == pytest.approx(alone[key].numpy(), rel=1e-4)


def test_units_removed_before_go_first() -> None:
    config = tiny_config("llama")
    family, rng = family_of(config), np.random.default_rng(0)
    scores = {
        kind: [rng.random(family.kind(config, kind).count) for _ in range(4)]
        for kind in WIDTH.kinds
    }
    for rule in (WIDTH, Rule(WIDTH.kinds, "global")):
        first = select(scores, family, config, Target("groups", 0.2), rule, {})
        # The opposite order: without the plan before, what went would come back.
        other = {kind: [-values for values in arrays] for kind, arrays in scores.items()}
        target = Target("groups", 0.4)
        alone = select(other, family, config, target, rule, {})
        second = select(other, family, config, target, rule, {}, first)
        assert alone.parameters[1] < first.parameters[1]
        for a, b, c in zip(first.kept, second.kept, alone.kept, strict=True):
            for kind in WIDTH.kinds:
                assert set((b or {})[kind]) <= set((a or {})[kind])
                if rule is WIDTH:
                    assert len((b or {})[kind]) == len((c or {})[kind])
        assert any(
            not set((c or {})["mlp_channel"]) <= set((a or {})["mlp_channel"])
            for a, c in zip(first.kept, alone.kept, strict=True)
        )
        with pytest.raises(InputError, match="keeps more units than the step before left"):
            select(other, family, config, Target("groups", 0.1), rule, {}, first)


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("shortgpt", {}, "iterative_steps: not for block units"),
        ("random", {"strategy": "channel"}, "iterative_steps: not for residual_channel units"),
        ("random", {"iterative_steps": 0}, "iterative_steps 0 given; a whole number from 1"),
    ],
)
def test_what_cannot_be_iterated_is_refused(
    method: str, parameters: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        create(method, {"iterative_steps": 2} | dict(parameters))
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------- the steps


def by_rebuilding(name: str, source: Path, out: Path, ratios: tuple[float, ...]) -> Any:
    """Kept units per layer after real checkpoints, each scored as a model of its own.

    The ratios are of what a step finds. Kept indices of kept indices are those of the original.
    """
    composed: Any = None
    for number, ratio in enumerate(ratios):
        config, model = checkpoint.read_config(source), checkpoint.load_model(source)
        assert "auto_map" not in config
        family = family_of(config)
        passes = {"gradients": gradients.collect(PassInputs(model, family, config, WINDOWS, 5))}
        scores = create("llm_pruner", {}).scores(
            ScoringInputs(family, config, lambda key: pytest.fail(key), passes, 0)
        )
        plan = select(scores, family, config, Target("groups", ratio), WIDTH, {})
        checkpoint.prune_checkpoint(source, plan, out / str(number))
        source = out / str(number)
        composed = [
            {
                kind: ids if composed is None else tuple(composed[i][kind][j] for j in ids)
                for kind, ids in (layer or {}).items()
            }
            for i, layer in enumerate(plan.kept)
        ]
    return composed


@pytest.mark.parametrize("name", ["llama-mha", "qwen2", "llama-tied"])
def test_two_steps_equal_pruning_the_pruned_checkpoint(
    name: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    # 26 and then 13 of 40 channels stay; 3 and 2 of four kv heads, or 2 and 1 of three.
    expected = by_rebuilding(name, tiny_checkpoint(name), tmp_path / "rebuilt", (0.34, 0.5))

    def commit(label: str, write: Any) -> Path:
        artefact.commit(tmp_path / label, write, {"key": "0" * 16})
        return tmp_path / label

    def step(script: Any, label: str, params: dict[str, Any], **inputs: Path) -> Path:
        request = StepRequest(label, "0" * 16, params, inputs, tmp_path / label, (), ())
        return commit(label, lambda scratch: script.main(request, scratch))

    def fetch(out: Path) -> None:
        for file in tiny_checkpoint(name).iterdir():
            (out / file.name).write_bytes(file.read_bytes())

    model = commit("model", fetch)
    windows = commit(
        "windows", lambda out: save_file({"input_ids": WINDOWS}, out / "windows.safetensors")
    )
    run = {"device": "cpu", "dtype": "float32", "threads": 1, "batch_windows": 5}
    method = {"method": "llm_pruner", "parameters": {"iterative_steps": 2}, "seed": 0}
    more: dict[str, Path] = {}
    # Half of what a third leaves is two thirds of all.
    for number, ratio in ((1, 0.34), (2, 0.67)):
        passes = step(
            collect_statistics, f"gradients{number}", run | {"name": "gradients"},
            model=model, calibration=windows, **more,
        )  # fmt: skip
        scores = step(score, f"scores{number}", method, model=model, gradients=passes, **more)
        target = {"kind": "groups", "value": ratio, "protect_first": 0, "protect_last": 0}
        params = method | {"variant": "twice", "target": target}
        more = {
            "previous": step(prune, f"prune{number}", params, model=model, scores=scores, **more)
        }
    plan = Plan.load(more["previous"])
    assert plan.units == {
        kind: family_of(tiny_config(name)).kind(tiny_config(name), kind).count
        for kind in WIDTH.kinds
    }
    assert list(plan.kept) == expected
    # Without a second look, others would stay.
    once = step(prune, "once", params, model=model, scores=tmp_path / "scores1")
    assert list(Plan.load(once).kept) != expected
    assert Plan.load(once).parameters == plan.parameters
    small = checkpoint.load_model(more["previous"])
    assert sum(p.numel() for p in small.parameters()) == plan.parameters[1]
    # A plan that is not what its record says is not gone on from.
    (more["previous"] / "plan.json").write_text("{}")
    with pytest.raises(IntegrityError):
        step(score, "scores3", method, model=model, gradients=passes, **more)


def test_magnitudes_after_a_step_are_those_of_what_is_left(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama-bias")
    config = checkpoint.read_config(source)
    plan = random_plan(config, WIDTH.kinds, shape="per layer", seed=5)
    read, whole = checkpoint.MaskedReader(source, plan), checkpoint.WeightReader(source)
    name = "model.layers.2.mlp.up_proj"
    kept = list((plan.kept[2] or {})["mlp_channel"])
    for kind in ("weight", "bias"):
        masked, full = read(f"{name}.{kind}"), whole(f"{name}.{kind}")
        assert torch.equal(masked[kept], full[kept])
        assert masked.abs().sum() == pytest.approx(full[kept].abs().sum())
    assert torch.equal(read("model.norm.weight"), whole("model.norm.weight"))


# ------------------------------------------------------------------------------- experiments


def test_every_step_of_an_experiment_goes_on_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    methods = dict(CATALOGUES["methods"])
    parameters = {"iterative_steps": 3}
    methods["thrice"] = {"method": "llm_pruner", "parameters": parameters}
    (tmp_path / "catalogue" / "methods.yaml").write_text(yaml.safe_dump(methods))
    data = EXPERIMENT | {"methods": ["element1", "thrice"], "baseline": "element1"}
    data["targets"] = [{"groups": 0.6, "protect": {"first": 1}}]
    (tmp_path / "iterative.yaml").write_text(yaml.safe_dump(data))
    experiment = Experiment.load(Path("iterative.yaml"), Path("catalogue"))
    steps: dict[str, Node] = {
        cell.method: cell.steps["prune"]
        for cell in experiment.cells
        if cell.control is None and "prune" in cell.steps
    }
    third = steps["thrice"]
    second = third.inputs["previous"]
    first = second.inputs["previous"]
    assert "previous" not in first.inputs
    assert [n.params["target"]["value"] for n in (first, second, third)] == pytest.approx(
        [0.2, 0.4, 0.6]
    )
    assert all(n.params["target"]["protect_first"] == 1 for n in (first, second, third))
    for now, before in ((third, second), (second, first)):
        scores = now.inputs["scores"]
        assert scores.inputs["previous"] is before
        assert scores.inputs["gradients"].inputs["previous"] is before
        assert now.inputs["model"] is scores.inputs["model"] is first.inputs["model"]
    # The first step is that of the method in one step.
    assert first.inputs["scores"].key == steps["element1"].inputs["scores"].key
    assert len({n.directory for n in (first, second, third)}) == 3
    assert second.inputs["scores"].labels != third.inputs["scores"].labels
