"""Plans as data: round trip, and refusal of what is not a plan."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config, tiny_model

from prunelib.checkpoint import build_model
from prunelib.errors import InputError
from prunelib.families import family_of
from prunelib.plan import Plan
from prunelib.rules import Rule, Target
from prunelib.selection import select
from prunelib.surgery import prune_tensors, pruned_config


def plan_of(config: dict[str, Any]) -> Plan:
    family, rule = family_of(config), Rule(("kv_group", "mlp_channel"))
    rng = np.random.default_rng(0)
    scores = {
        kind: [rng.random(family.kind(config, kind).count) for _ in range(4)] for kind in rule.kinds
    }
    target = Target("groups", 0.4, 1, 0)
    return select(scores, family, config, target, rule, {"method": "random"})


def test_round_trip(tmp_path: Path) -> None:
    plan = plan_of(tiny_config("llama"))
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version 1 expected"),
        (lambda d: d.update(surprise=1), "unknown keys surprise"),
        (lambda d: d["layers"][0].update(index=99), "out of range"),
        (lambda d: d["layers"][1].update(index=0), "given twice"),
        (lambda d: d["layers"][1]["kept"].update(kv_group=[0, 0]), "without repeats"),
        (lambda d: d["layers"][1]["kept"].update(kv_group=[0, 7]), r"0\.\.2"),
        (lambda d: d["layers"][1]["kept"].update(kv_group=[]), "at least one must stay"),
        (lambda d: d["layers"][1]["kept"].update(heads=[0]), "unknown kind"),
        (lambda d: d.update(layers=[], removed_blocks=[0, 1, 2, 3]), "every block"),
        (lambda d: d.update(removed_blocks=[2]), "disagree"),
        (lambda d: d.pop("units", d.pop("original")), "malformed"),
    ],
)
def test_what_is_not_a_plan_is_refused(change: Any, message: str) -> None:
    data = copy.deepcopy(plan_of(tiny_config("llama")).to_dict())
    change(data)
    with pytest.raises(InputError, match=message):
        Plan.from_dict(data)


def test_a_plan_for_another_model_is_refused() -> None:
    config, other = tiny_config("llama"), tiny_config("qwen3")
    plan = plan_of(config)
    with pytest.raises(InputError, match="plan is for llama"):
        list(prune_tensors([], family_of(other), other, plan))
    wide = config | {"intermediate_size": 44}
    with pytest.raises(InputError, match="plan is for units"):
        list(prune_tensors([], family_of(wide), wide, plan))


def test_json_is_text_for_git(tmp_path: Path) -> None:
    plan_of(tiny_config("llama")).save(tmp_path)
    text = (tmp_path / "plan.json").read_text()
    assert json.loads(text)["parameters"]["removed_ratio"] > 0
    assert text.endswith("\n")


def test_counts_on_the_meta_device_equal_the_plan() -> None:
    """Selection, surgery and the modelling classes agree on a 7B model that is never allocated."""
    import torch
    from test_selection import LLAMA_3_8B, LLAMA_7B, TINYLLAMA, WIDTH, random_scores

    cases = [
        (LLAMA_7B, Target("groups", 0.25, 4, 2), 5_422_977_024),
        (LLAMA_3_8B, Target("groups", 0.25, 4, 2), 6_612_586_496),
        (TINYLLAMA, Target("groups", 0.25, 4, 4), 945_907_712),
    ]
    for config, target, expected in cases:
        family = family_of(config)
        plan = select(random_scores(config, WIDTH), family, config, target, WIDTH, {})
        with torch.device("meta"):
            dense = build_model(dict(config), lambda cls, parsed: cls(parsed))
            new, stock = pruned_config(family, config, plan)
            small = build_model(new, lambda cls, parsed: cls(parsed))
        assert not stock
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in prune_tensors(dense.state_dict().items(), family, config, plan)
        }
        assert shapes == {name: tuple(t.shape) for name, t in small.state_dict().items()}
        assert sum(p.numel() for p in small.parameters()) == expected


def test_uniform_heads_that_do_not_divide_are_saved_as_mistral() -> None:
    """LlamaConfig refuses them; a bias-free Mistral without window is the same network."""
    import torch

    config = tiny_model("llama").config.to_dict() | {"num_attention_heads": 5, "hidden_size": 48}
    config |= {"num_key_value_heads": 5, "model_type": "llama", "head_dim": 8}
    family = family_of(config)
    kept = tuple({"kv_group": (0, 2, 3, 4), "mlp_channel": tuple(range(40))} for _ in range(4))
    kept5 = tuple({"kv_group": (0, 1, 2, 3, 4), "mlp_channel": tuple(range(39))} for _ in range(4))
    for layers, model_type in ((kept, "llama"), (kept5, "mistral")):
        plan = Plan("llama", "llama", layers, {"kv_group": 5, "mlp_channel": 40}, (1, 1))
        new, stock = pruned_config(family, config, plan)
        assert stock
        assert new["model_type"] == model_type
        with torch.device("meta"):
            build_model(new, lambda cls, parsed: cls(parsed))
