"""Plans from scores: local and global ranking, solved targets, refusals, exact published counts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config

from prunelib.depth_selection import block_count
from prunelib.errors import InputError, NonFiniteError
from prunelib.families import family_of
from prunelib.methods import create
from prunelib.methods.base import ScoringInputs
from prunelib.plan import Plan
from prunelib.rules import Rule, Target
from prunelib.selection import check_reachable, group_ratio_counts, local_counts, select

LLAMA_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
LLAMA_3_8B = LLAMA_7B | {
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
TINYLLAMA = LLAMA_7B | {
    "hidden_size": 2048,
    "num_key_value_heads": 4,
    "num_hidden_layers": 22,
    "intermediate_size": 5632,
}
SMOLLM2 = LLAMA_7B | {
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
WIDTH = Rule(("kv_group", "mlp_channel"))

# Published totals (LLM-Pruner's repository and paper) and what is left of them.
PUBLISHED = [
    pytest.param(LLAMA_7B, 0.25, 4, 2, 6_738_415_616, 5_422_977_024, (8, 2752), id="7B 25%"),
    pytest.param(LLAMA_7B, 0.60, 3, 1, 6_738_415_616, 3_350_188_032, (19, 6605), id="7B 60%"),
    pytest.param(LLAMA_7B, 0.60, 3, 2, 6_738_415_616, 3_471_196_160, (19, 6605), id="7B 27 layers"),
    pytest.param(LLAMA_3_8B, 0.25, 4, 2, 8_030_261_248, 6_612_586_496, (2, 3584), id="Llama-3-8B"),
    pytest.param(TINYLLAMA, 0.25, 4, 4, 1_100_048_384, 945_907_712, (1, 1408), id="TinyLlama"),
    pytest.param(SMOLLM2, 0.34, 4, 4, 134_515_008, 108_144_576, (1, 523), id="SmolLM2-135M"),
]


def random_scores(config: dict[str, Any], rule: Rule, seed: int = 0) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)
    family, layers = family_of(config), config["num_hidden_layers"]
    if rule.kinds == ("block",):
        return {"block": [rng.random(layers)]}
    return {
        kind: [rng.random(family.kind(config, kind).count) for _ in range(layers)]
        for kind in rule.kinds
    }


@pytest.mark.parametrize(("config", "ratio", "first", "last", "before", "after", "each"), PUBLISHED)
def test_published_counts(
    config: dict[str, Any],
    ratio: float,
    first: int,
    last: int,
    before: int,
    after: int,
    each: tuple[int, int],
) -> None:
    family, target = family_of(config), Target("groups", ratio, first, last)
    assert local_counts(family, config, target, WIDTH) == dict(zip(WIDTH.kinds, each, strict=True))
    plan = select(random_scores(config, WIDTH), family, config, target, WIDTH, {})
    assert plan.parameters == (before, after)


@pytest.mark.parametrize(
    ("config", "blocks", "percent"),
    [(LLAMA_7B, n, p) for n, p in [(6, 18.02), (7, 21.02), (9, 27.03), (10, 30.03), (13, 39.04)]]
    + [(LLAMA_3_8B, 9, 24.4), (LLAMA_3_8B, 11, 29.9), (LLAMA_3_8B, 15, 40.7)],
)
def test_published_block_shares(config: dict[str, Any], blocks: int, percent: float) -> None:
    rule = Rule(("block",))
    target = Target("blocks", blocks)
    plan = select(random_scores(config, rule), family_of(config), config, target, rule, {})
    assert len(plan.removed_blocks) == blocks
    assert 100 * plan.removed_ratio == pytest.approx(percent, abs=0.05)
    size = {4096 * 11008: 202_383_360, 4096 * 14336: 218_112_000}
    assert family_of(config).block_parameters(config) == size[4096 * config["intermediate_size"]]


def test_group_ratio_is_the_written_decimal() -> None:
    config = tiny_config("llama-mha") | {"intermediate_size": 10}
    # 10 * (1 - 0.9) is 0.999... in binary floating point, which would drop all ten channels.
    assert group_ratio_counts(family_of(config), config, "mlp_channel", 0.9) == 9


def test_local_ranking_drops_the_lowest_of_every_layer() -> None:
    config = tiny_config("llama")
    scores = {
        "kv_group": [np.array(v, float) for v in ([3, 1, 2], [1, 2, 3], [2, 3, 1], [0, 0, 0])],
        "mlp_channel": [np.arange(40.0), -np.arange(40.0), np.arange(40.0), np.zeros(40)],
    }
    plan = select(scores, family_of(config), config, Target("groups", 0.34, 1, 0), WIDTH, {})
    assert plan.kept[0] == {"kv_group": (0, 1, 2), "mlp_channel": tuple(range(40))}
    # 40 - int(40 * 0.66) = 14 channels and 24 - int(24 * 0.66) = 9 // 8 = 1 group.
    assert plan.kept[1] == {"kv_group": (1, 2), "mlp_channel": tuple(range(26))}
    assert plan.kept[2] == {"kv_group": (0, 1), "mlp_channel": tuple(range(14, 40))}
    # Ties go by index.
    assert plan.kept[3] == {"kv_group": (1, 2), "mlp_channel": tuple(range(14, 40))}


def test_global_ranking_counts_every_unit_once() -> None:
    config = tiny_config("llama") | {"num_hidden_layers": 2, "intermediate_size": 7}
    # Twenty units; the four lowest are three channels of layer 0 and one group of layer 1.
    scores = {
        "kv_group": [np.array([9.0, 9, 9]), np.array([9.0, 0.2, 9])],
        "mlp_channel": [np.array([0.1, 8, 0.3, 8, 0.4, 8, 8]), np.full(7, 8.5)],
    }
    rule = Rule(("kv_group", "mlp_channel"), "global")
    plan = select(scores, family_of(config), config, Target("groups", 0.2), rule, {})
    assert plan.kept[0] == {"kv_group": (0, 1, 2), "mlp_channel": (1, 3, 5, 6)}
    assert plan.kept[1] == {"kv_group": (0, 2), "mlp_channel": tuple(range(7))}


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("config", [SMOLLM2, LLAMA_7B, TINYLLAMA], ids=["135M", "7B", "1.1B"])
def test_parameter_target_is_met(config: dict[str, Any], ratio: float, ranking: str) -> None:
    rule = Rule(("kv_group", "mlp_channel"), ranking)
    target = Target("parameters", ratio, 1, 1)
    plan = select(random_scores(config, rule), family_of(config), config, target, rule, {})
    # As near as the steps allow: a channel in every layer at once, or one kv group.
    family, step = family_of(config), {"local": "mlp_channel", "global": "kv_group"}[ranking]
    cost = family.kind(config, step).cost(family.layer_shapes(config))
    cost *= config["num_hidden_layers"] if ranking == "local" else 1
    assert abs(plan.removed_ratio - ratio) * plan.parameters[0] <= cost / 2
    assert plan.kept[0] == {k: tuple(range(n)) for k, n in plan.units.items()}


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_rounding_keeps_multiples(ranking: str) -> None:
    rule = Rule(("kv_group", "mlp_channel"), ranking, round_to=64)
    target = Target("parameters", 0.2, 4, 4)
    plan = select(random_scores(SMOLLM2, rule), family_of(SMOLLM2), SMOLLM2, target, rule, {})
    widths = {len(layer["mlp_channel"]) for layer in plan.kept if layer}
    assert all(width % 64 == 0 for width in widths)
    assert plan.removed_ratio == pytest.approx(0.2, abs=0.02)


def test_more_is_removed_from_a_superset() -> None:
    family = family_of(SMOLLM2)
    scores = random_scores(SMOLLM2, WIDTH)
    small, large = (
        select(scores, family, SMOLLM2, Target("groups", ratio, 1, 1), WIDTH, {})
        for ratio in (0.2, 0.5)
    )
    for a, b in zip(small.kept, large.kept, strict=True):
        assert a is not None
        assert b is not None
        assert all(set(b[kind]) <= set(a[kind]) for kind in a)


def test_shortgpt_takes_the_nearest_block_count() -> None:
    family = family_of(SMOLLM2)
    # 26.9 M of 134.5 M parameters over 3,540,096 a block = 7.6 blocks.
    assert block_count(family, SMOLLM2, Target("parameters", 0.2), Rule(("block",))) == 8
    rule = Rule(("block",))
    scores = {"block": [np.array([9, 1, 8, 2, *range(10, 36)], float)]}
    plan = select(scores, family, SMOLLM2, Target("blocks", 2), rule, {})
    assert plan.removed_blocks == (1, 3)


@pytest.mark.parametrize(
    ("target", "last"), [(("blocks", 3), 26), (("groups", 0.5), 14), (("parameters", 0.2), 21)]
)
def test_first_layers_keeps_the_first(target: tuple[str, float], last: int) -> None:
    family, method = family_of(SMOLLM2), create("first_layers", {})
    scores = method.scores(ScoringInputs(family, SMOLLM2, lambda name: pytest.fail(name), {}, 0))
    plan = select(scores, family, SMOLLM2, Target(*target), method.rule(), {})
    assert plan.kept_layers == tuple(range(last + 1))


@pytest.mark.parametrize(
    ("target", "rule", "message"),
    [
        (("parameters", 0.2, 14, 14), WIDTH, "at most"),
        (("parameters", 0.9, 0, 0), WIDTH, "at most"),
        (("parameters", 0.2, 20, 10), WIDTH, "cover all 30 layers"),
        (("groups", 0.99999, 0, 0), WIDTH, "at least one must stay"),
        (("blocks", 30, 0, 0), Rule(("block",)), "at least one must stay"),
        (("blocks", 3, 0, 0), WIDTH, "not blocks"),
    ],
)
def test_unreachable_targets_are_refused(
    target: tuple[str, float, int, int], rule: Rule, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_reachable(family_of(SMOLLM2), SMOLLM2, Target(*target), rule)


@pytest.mark.parametrize(
    "target", [("parameters", 1.5), ("parameters", -0.1), ("groups", 1.0), ("blocks", 1.5)]
)
def test_impossible_values_are_refused(target: tuple[str, float]) -> None:
    with pytest.raises(InputError):
        Target(*target)


def test_a_non_finite_score_names_its_layer() -> None:
    config = tiny_config("llama")
    scores = random_scores(config, WIDTH)
    scores["mlp_channel"][2][5] = np.nan
    with pytest.raises(NonFiniteError, match="layer 2, mlp_channel 5 is nan"):
        select(scores, family_of(config), config, Target("groups", 0.1), WIDTH, {})


def test_scores_of_another_model_are_refused() -> None:
    scores = random_scores(tiny_config("llama"), WIDTH)
    with pytest.raises(InputError, match="must be 30 arrays of 3 scores"):
        select(scores, family_of(SMOLLM2), SMOLLM2, Target("groups", 0.1), WIDTH, {})


@pytest.mark.parametrize(
    ("first", "last", "layers", "count", "left"),
    [
        (4, 2, (), 32, range(4, 30)),
        # An eighth and a sixteenth of 32 layers.
        (0.125, 0.0625, (), 32, range(4, 30)),
        # 3.0 of 30 layers, where 0.1 * 30 is a little more; 8.7 are 8; 29 of 100, not 28.99...
        (0.1, 0.29, (), 30, range(3, 22)),
        (0.29, 0, (), 100, range(29, 100)),
        (1, 0, (3, 5), 8, (1, 2, 4, 6, 7)),
    ],
)
def test_layers_are_protected_by_number_share_and_index(
    first: float, last: float, layers: tuple[int, ...], count: int, left: Any
) -> None:
    protected = Target("groups", 0.25, first, last, layers).protected(count)
    assert set(range(count)) - protected == set(left)


def test_only_unprotected_layers_lose_units() -> None:
    config = tiny_config("llama")
    family = family_of(config)
    count = family.dimensions(config).layers
    target = Target("groups", 0.5, 0, 0, (1,))
    units = family.kind(config, "mlp_channel").count
    scores = {"mlp_channel": [np.arange(units, dtype=float)] * count}
    plan = select(scores, family, config, target, Rule(("mlp_channel",)), {})
    widths = [len((layer or {})["mlp_channel"]) for layer in plan.kept]
    assert widths == [units if layer == 1 else units // 2 for layer in range(count)]
    assert plan.target["protect_layers"] == [1]
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert Target(**plan.target).protected(count) == {1}
    assert "protect_layers" not in Target("groups", 0.5, 1, 1).to_dict()


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_a_target_may_reach_one_kind_of_units_alone(ranking: str) -> None:
    family = family_of(SMOLLM2)
    target = Target("groups", 0.5, 1, 1, only="mlp_channel")
    rule = replace(WIDTH, ranking=ranking)
    plan = select(random_scores(SMOLLM2, WIDTH), family, SMOLLM2, target, rule, {})
    kept = [layer for layer in plan.kept if layer is not None]
    assert [len(layer["kv_group"]) for layer in kept] == [3] * 30
    widths = [len(layer["mlp_channel"]) for layer in kept]
    assert [widths[0], widths[-1]] == [1536, 1536]
    # Each channel is three vectors of 576: 28 layers lose 768 channels each.
    assert sum(widths[1:-1]) == 28 * 768
    if ranking == "local":
        assert widths[1:-1] == [768] * 28
    assert plan.parameters == (134_515_008, 134_515_008 - 28 * 768 * 3 * 576)
    assert Target(**plan.target) == target
    assert "only" not in Target("groups", 0.5).to_dict()


def test_a_parameter_target_is_met_by_the_one_kind() -> None:
    family = family_of(SMOLLM2)
    target = Target("parameters", 0.2, only="mlp_channel")
    plan = select(random_scores(SMOLLM2, WIDTH), family, SMOLLM2, target, WIDTH, {})
    assert all(len((layer or {})["kv_group"]) == 3 for layer in plan.kept)
    # 0.2 of 134,515,008 in 30 layers at 1,728 parameters a channel: 518.96 channels.
    assert all(len((layer or {})["mlp_channel"]) == 1536 - 519 for layer in plan.kept)


@pytest.mark.parametrize("kinds", [("kv_group", "mlp_channel"), ("block",)])
def test_a_kind_that_the_method_does_not_prune_is_refused(kinds: tuple[str, ...]) -> None:
    target = Target("groups", 0.2, only="query_slot")
    with pytest.raises(InputError, match=f"'query_slot' given.*allowed: {', '.join(kinds)}$"):
        check_reachable(family_of(SMOLLM2), SMOLLM2, target, Rule(kinds))
