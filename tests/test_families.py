"""Every step of the workflow, in process, on a tiny model of every family."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_model
from safetensors.torch import load_file
from test_pruned_equals_masked import pruned, random_plan, relative_difference
from tiny_project import ROOT

from prunelib.checkpoint import build_model, load_model, read_config, read_tensors
from prunelib.errors import InputError
from prunelib.evaluation.efficiency import count_macs
from prunelib.families import family_of
from prunelib.methods import create
from prunelib.plan import Plan
from prunelib.provenance import artefact
from prunelib.provenance.step import StepRequest
from prunelib.recovery import adapters
from prunelib.rules import Rule, Target
from prunelib.selection import select
from prunelib.surgery import prune_tensors, pruned_config
from workflow_scripts import (
    calibration,
    collect_statistics,
    efficiency,
    merge,
    perplexity,
    prune,
    recover,
    score,
)

# A tiny model of every family, and the linear maps of one of its layers.
FAMILIES = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "glm": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
}
RUN = {"device": "cpu", "dtype": "float32", "threads": 1}
RECIPE = {"max_steps": 3, "warmup_steps": 0, "batch": 2, "micro_batch": 2, "length": 16, "lr": 0.02}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    words = {"calibration": "The cat sat. ", "recovery": "A dog ran by. ", "evaluation": "Why? "}
    rows = [
        {"id": number, "title": split, "text": sentence * 40, "split": split}
        for number, (split, sentence) in enumerate(words.items())
    ]
    (directory / "articles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "meta.json").write_text('{"source": "made up"}')
    return directory


@pytest.mark.parametrize(
    ("name", "method", "parameters"),
    [
        *((name, "llm_pruner", {}) for name in FAMILIES),
        *((name, "llm_pruner", {"ranking": "global"}) for name in FAMILIES),
        *((name, "llm_pruner", {"strategy": "channel"}) for name in FAMILIES),
        ("glm", "wanda_sp", {"heads": "query_slot"}),
        ("glm", "llm_pruner", {"heads": "query_slot"}),
        ("glm", "llm_pruner", {"criterion": "vector", "heads": "query_slot"}),
        ("glm", "magnitude", {"order": 2, "heads": "query_slot"}),
        ("glm", "random", {"heads": "query_slot"}),
        *((name, "mini_llm", {"perturbations": 2}) for name in FAMILIES),
        *((name, "mini_llm_backprop", {}) for name in ("llama", "bloom", "opt")),
        ("bloom", "mini_llm", {"perturbations": 2, "perturbation": "gates", "streamed": True}),
        ("glm", "mini_llm", {"perturbation": "gates", "heads": "query_slot"}),
        ("opt", "mini_llm_direct", {"streamed": True}),
        ("opt", "wanda_noise", {}),
        *((name, "shortgpt", {}) for name in FAMILIES),
        ("bloom", "shortgpt", {"remove": "attention", "recompute": True}),
        ("opt", "shortgpt", {"remove": "mlp"}),
        ("llama", "flexigpt", {"rank": 4}),
        ("glm", "flexigpt", {"rank": 0.25, "distance": "scaled", "normalise": False}),
        ("opt", "flexigpt", {"rank": 4, "distance": "frobenius", "recompute": True}),
        ("bloom", "flexigpt", {"rank": 4, "distance": "nearest", "svd_init": False}),
        ("opt", "flexigpt_extend", {"rank": 4, "start": 1, "end": 2}),
        ("glm", "flexigpt_extend", {"rank": 4, "start": 1, "end": 2}),
        *((name, "first_layers", {}) for name in FAMILIES),
        ("opt", "laco", {"layers_per_merge": 2, "threshold": -1.0}),
        ("bloom", "deeper_look", {"emulate": "low_rank", "rank": 3}),
        ("glm", "deeper_look", {"emulate": "mean", "metric": "loss_shapley"}),
    ],
)
def test_every_step(
    name: str,
    method: str,
    parameters: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
) -> None:
    def step(script: ModuleType, label: str, params: dict[str, Any], **inputs: Path) -> Path:
        out = tmp_path / label
        request = StepRequest(label, "0" * 16, params, inputs, out, (), ())
        artefact.commit(out, lambda scratch: script.main(request, scratch), {"key": request.key})
        return out

    def metrics(label: str, **inputs: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        sizes = {"batch": 1, "length": 8, "new_tokens": 2, "warmup": 0, "repeats": 1}
        where = (
            step(perplexity, f"{label}-perplexity", RUN | {"window": 16}, text=text, **inputs),
            step(
                efficiency, f"{label}-efficiency", RUN | sizes | {"hardware_class": "x"}, **inputs
            ),
        )
        first, second = (json.loads((path / "metrics.json").read_text()) for path in where)
        return first, second

    class Fetch(ModuleType):
        @staticmethod
        def main(request: StepRequest, out: Path) -> None:
            for file in tiny_checkpoint(name).iterdir():
                (out / file.name).write_bytes(file.read_bytes())

    model = step(Fetch("fetch"), "model", {})
    config = read_config(model)
    sample = {"windows": 4, "length": 16, "seed": 0}
    windows = step(calibration, "calibration", sample, text=text, model=model)
    chosen_method = create(method, parameters)
    options = chosen_method.statistic_options
    passes = {
        which: step(
            collect_statistics,
            which,
            RUN
            | {"name": which, "batch_windows": 4}
            | ({"options": options[which], "seed": 0} if which in options else {}),
            model=model,
            calibration=windows,
        )
        for which in chosen_method.statistics
    }
    chosen = {"method": method, "parameters": parameters, "seed": 0}
    channel = "strategy" in parameters
    scores = step(score, "scores", chosen, model=model, **passes)
    assert all(
        array.isfinite().all() for array in load_file(scores / "scores.safetensors").values()
    )
    first = 0 if channel else 1
    target = {"kind": "groups", "value": 0.34, "protect_first": first, "protect_last": 0}
    extends = method == "flexigpt_extend"
    if extends:
        target = {"kind": "layers", "value": 6}
    smaller = step(
        prune, "pruned", chosen | {"variant": method, "target": target}, model=model, scores=scores
    )
    plan = Plan.load(smaller)
    if parameters.get("remove"):
        assert [len(layers) for layers in plan.skipped.values()] == [1]
        assert set(plan.skipped) == {parameters["remove"]}
    elif method in ("shortgpt", "flexigpt", "laco", "deeper_look"):
        assert len(plan.removed_blocks) == 1
        assert (method == "flexigpt") == (plan.sharing is not None)
    elif extends:
        assert plan.sharing is not None
        assert [(b.place, b.base) for b in plan.sharing.blocks] == [(2, 1), (4, 2)]
    elif method == "first_layers":
        assert plan.kept_layers == (0, 1, 2)
    elif channel:
        # 48 - int(48 * 0.66) of the channels.
        assert len(plan.whole["residual_channel"]) == read_config(smaller)["hidden_size"] == 31
    elif "ranking" in parameters:
        # One list of all units of the three layers that are not protected: the lowest go.
        values = load_file(scores / "scores.safetensors")
        ranked = sorted(
            (float(value), kind, layer, unit)
            for kind in plan.units
            for layer in (1, 2, 3)
            for unit, value in enumerate(values[f"{kind}.{layer}"])
        )
        gone = {
            (kind, layer, unit)
            for layer, kept in enumerate(plan.kept)
            for kind, count in plan.units.items()
            for unit in set(range(count)) - set((kept or {})[kind])
        }
        assert gone == {place[1:] for place in ranked[: int(0.34 * len(ranked))]}
    else:
        heads = parameters.get("heads", "kv_group")
        sizes = family_of(config).units(config)
        kept = {kind: len(ids) for kind, ids in (plan.kept[1] or {}).items()}
        # LLM-Pruner's arithmetic: a third of the heads, whole ones only.
        assert kept[heads] == math.ceil(sizes[heads].count * 0.66)
        assert kept["mlp_channel"] == math.floor(sizes["mlp_channel"].count * 0.66)
        assert {kind: len(ids) for kind, ids in (plan.kept[0] or {}).items()} == {
            kind: unit.count for kind, unit in sizes.items() if kind in kept
        }
    adapter = step(
        recover, "adapter", RUN | {"recipe": RECIPE, "seed": 0}, checkpoint=smaller, text=text
    )
    if plan.sharing is None:
        targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
        assert {target.rpartition(".")[2] for target in targets} == FAMILIES[name]
    else:
        assert {path.name for path in adapter.glob("*.safetensors")} == {"trained.safetensors"}
    merged = step(merge, "merged", {}, checkpoint=smaller, adapter=adapter)
    assert (merged / "config.json").read_bytes() == (smaller / "config.json").read_bytes()
    ids = torch.arange(3, 19).view(2, 8)
    with torch.inference_mode():
        before = load_model(smaller)(ids).logits
        recovered = adapters.load_recovered(smaller, adapter)(ids).logits
        assert relative_difference(load_model(merged)(ids).logits, recovered) < 1e-5
        assert relative_difference(before, recovered) > 1e-3
    dense, small = metrics("dense", checkpoint=model), metrics("small", checkpoint=smaller)
    after, one = (
        metrics("after", checkpoint=smaller, adapter=adapter),
        metrics("merged", checkpoint=merged),
    )
    assert small[1]["parameters"] == plan.parameters[1] == one[1]["parameters"]
    assert dense[1]["parameters"] == plan.parameters[0]
    assert (small[1]["parameters"] < dense[1]["parameters"]) != extends
    # Shared blocks are computed as often as they are used.
    assert (small[1]["macs"]["macs"] < dense[1]["macs"]["macs"]) == (plan.sharing is None)
    assert len({row[0]["perplexity"] for row in (dense, small, after)}) == 3
    assert one[0]["perplexity"] == pytest.approx(after[0]["perplexity"], rel=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_macs_of_layers_of_different_widths(name: str) -> None:
    """By hand: every linear map once per token, scores and values over the square of positions."""
    config = tiny_model(name).config.to_dict()
    family = family_of(config)
    plan = random_plan(config, ("kv_group", "mlp_channel"), shape="per layer", seed=7)
    model = pruned(name, config, plan)
    size, tokens = family.dimensions(config), 12
    linears = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)
    )
    groups = sum(len((kept or {})["kv_group"]) for kept in plan.kept)
    heads = groups * size.heads // size.kv_heads
    before = model.config._attn_implementation
    expected = tokens * linears + 2 * tokens**2 * heads * size.head_dim
    assert count_macs(model, 1, tokens) == expected
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_are_named_as_the_model_names_them(
    name: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    config = read_config(tiny_checkpoint(name))
    family = family_of(config)
    layer = family.layer_shapes(config)
    expected = dict(family.outer_shapes(config))
    for index in range(family.dimensions(config).layers):
        expected |= {f"{family.layer_prefix}.{index}.{key}": size for key, size in layer.items()}
    found = {key: tuple(tensor.shape) for key, tensor in read_tensors(tiny_checkpoint(name))}
    assert found == expected


CATALOGUE = yaml.safe_load((ROOT / "config" / "models.yaml").read_text())


@pytest.mark.parametrize("name", CATALOGUE)
def test_catalogue_geometries_count_as_transformers_does(name: str) -> None:
    entry = CATALOGUE[name]
    geometry = json.loads((ROOT / "config" / entry["geometry"]).read_text())
    with torch.device("meta"):
        model = build_model(dict(geometry), lambda cls, parsed: cls(parsed))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == entry["parameters"] == family_of(geometry).parameters(geometry)
    # What the fetch step compares: the published config with its class's defaults filled in.
    filled = model.config.to_dict()
    stated = {key: value for key, value in geometry.items() if key not in ("dtype", "head_dim")}
    assert {key: filled.get(key) for key in stated} == stated


# Kept of 32 heads and of all channels at a group ratio of a quarter, layers 4 to the last but two.
@pytest.mark.parametrize(
    ("name", "heads", "channels"),
    [
        ("llama-7b", 24, 8256),
        ("opt-6.7b", 24, 12288),
        ("bloom-7b1", 24, 12288),
        ("glm-4-9b", 2, 10272),
    ],
)
def test_the_plan_s_count_is_that_of_the_model_built_from_it(
    name: str, heads: int, channels: int
) -> None:
    geometry = json.loads((ROOT / "config" / CATALOGUE[name]["geometry"]).read_text())
    family = family_of(geometry)
    units, layers = family.units(geometry), family.dimensions(geometry).layers
    kinds = ("kv_group", "mlp_channel")
    scores = {
        kind: list(np.random.default_rng(0).random((layers, units[kind].count))) for kind in kinds
    }
    target = Target("groups", 0.25, 4, 2)
    plan = select(scores, family, geometry, target, Rule(kinds), {})
    kept = plan.kept[4] or {}
    assert (len(kept["kv_group"]), len(kept["mlp_channel"])) == (heads, channels)
    new, stock = pruned_config(family, geometry, plan)
    assert not stock
    with torch.device("meta"):
        small = build_model(new, lambda cls, parsed: cls(parsed))
        whole = build_model(dict(geometry), lambda cls, parsed: cls(parsed))
    assert sum(parameter.numel() for parameter in small.parameters()) == plan.parameters[1]
    tensors = prune_tensors(whole.state_dict().items(), family, geometry, plan)
    assert {key: tensor.shape for key, tensor in tensors} == {
        key: tensor.shape for key, tensor in small.state_dict().items()
    }


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.25])
def test_query_slots_reach_what_two_kv_heads_cannot(ratio: float) -> None:
    geometry = json.loads((ROOT / "config" / "models" / "glm-4-9b.json").read_text())
    family, target = family_of(geometry), Target("parameters", ratio, 1, 1)
    heads = {}
    for kind in ("kv_group", "query_slot"):
        rule = create("random", {"heads": kind}).rule()
        scores = {
            name: [np.arange(family.kind(geometry, name).count, dtype=float)] * 40
            for name in rule.kinds
        }
        plan = select(scores, family, geometry, target, rule, {})
        assert plan.removed_ratio == pytest.approx(ratio, abs=1e-4)
        kept = plan.kept[5] or {}
        heads[kind] = len(kept[kind]) * 32 // family.kind(geometry, kind).count
        channels = len(kept["mlp_channel"])
    assert heads["kv_group"] == 32
    # Heads and channels go by the same share, up to a slot and a half of sixteen.
    assert heads["query_slot"] / 32 == pytest.approx(channels / 13696, abs=1.5 / 16)
    assert heads["query_slot"] < 32


def test_an_unknown_kind_of_heads_is_refused() -> None:
    with pytest.raises(InputError, match="'head' is unknown; allowed: kv_group, query_slot"):
        create("random", {"heads": "head"})
