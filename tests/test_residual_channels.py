"""Channels of the residual stream: surgery, counts, scores and refusals, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_config, tiny_model
from test_llm_pruner import CRITERIA, WINDOWS, hash_of, per_sample_autograd
from test_pruned_equals_masked import (
    FRESH,
    POST_NORM,
    Checkpoints,
    load_in_a_fresh_interpreter,
    masked,
    pruned,
    random_plan,
    relative_difference,
    with_cache,
)
from test_selection import LLAMA_7B, SMOLLM2
from torch import nn

from prunelib import checkpoint
from prunelib.errors import InputError, NonFiniteError
from prunelib.families import family_of
from prunelib.families.base import RESIDUAL
from prunelib.methods import create
from prunelib.methods.base import ScoringInputs
from prunelib.plan import Plan
from prunelib.rules import Rule, Target
from prunelib.selection import check_reachable, select
from prunelib.statistics import fisher, fisher_whole, gradients, gradients_whole
from prunelib.statistics.inputs import PassInputs
from prunelib.surgery import prune_tensors, pruned_config, remaining_parameters

CHANNEL = Rule((RESIDUAL,))

# ------------------------------------------------------------------------------------ surgery


def channel_plan(
    config: dict[str, Any], keep: int, *, seed: int = 3, others: str | None = None
) -> Plan:
    """A plan that keeps ``keep`` random residual channels; of the rest all, or a random part."""
    family = family_of(config)
    width = family.dimensions(config).hidden
    ids = np.random.default_rng(seed).choice(width, keep, replace=False)
    whole = {RESIDUAL: tuple(sorted(ids.tolist()))}
    kept: tuple[Any, ...] = tuple({} for _ in range(family.dimensions(config).layers))
    units: dict[str, int] = {}
    if others is not None:
        rest = random_plan(config, ("kv_group", "mlp_channel"), shape=others, seed=seed)
        kept, units = rest.kept, dict(rest.units)
    return Plan(
        family.name,
        config["model_type"],
        kept,
        units | {RESIDUAL: width},
        (family.parameters(config), remaining_parameters(family, config, kept, whole)),
        whole=whole,
    )


class OverKept(nn.Module):
    """A norm over some dimensions only, written out; nothing comes of the others."""

    def __init__(self, norm: Any, kept: tuple[int, ...]) -> None:
        super().__init__()
        self.norm, self.kept = norm, list(kept)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = x[..., self.kept]
        if "RMSNorm" in type(self.norm).__name__:
            scale = (part.square().mean(-1, keepdim=True) + self.norm.variance_epsilon).rsqrt()
        else:
            part = part - part.mean(-1, keepdim=True)
            scale = (part.square().mean(-1, keepdim=True) + self.norm.eps).rsqrt()
        part = part * scale
        if self.norm.weight is not None:
            part = part * self.norm.weight[self.kept]
        if getattr(self.norm, "bias", None) is not None:
            part = part + self.norm.bias[self.kept]
        out = torch.zeros_like(x)
        out[..., self.kept] = part
        return out


def reference(name: str, config: dict[str, Any], plan: Plan) -> Any:
    """The masked model; its norms of the residual stream are over the kept dimensions."""
    model, replaced = masked(name, config, plan), 0
    for module in list(model.modules()):
        for child, norm in list(module.named_children()):
            if type(norm).__name__.endswith("Norm") and child not in ("q_norm", "k_norm"):
                setattr(module, child, OverKept(norm, plan.whole[RESIDUAL]))
                replaced += 1
    assert replaced >= 2 * family_of(config).dimensions(config).layers
    return model


@pytest.mark.parametrize("others", [None, "per layer", "blocks"])
@pytest.mark.parametrize("keep", [24, 29])
@pytest.mark.parametrize("name", TINY)
def test_logits_equal(name: str, keep: int, others: str | None) -> None:
    if others == "blocks" and name in POST_NORM:
        pytest.skip("a block of zeros is not the identity there")
    config = tiny_model(name).config.to_dict()
    plan = channel_plan(config, keep, others=others)
    small, whole = pruned(name, config, plan), reference(name, config, plan)
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = whole(ids).logits
        assert relative_difference(small(ids).logits, expected) < 1e-5
        assert relative_difference(with_cache(small, ids), expected) < 1e-5
        padding = torch.ones_like(ids)
        padding[0, :4] = 0
        a = small(ids, attention_mask=padding).logits[0, 4:]
        b = whole(ids, attention_mask=padding).logits[0, 4:]
        assert relative_difference(a, b) < 1e-5
        assert relative_difference(expected, tiny_model(name)(ids).logits) > 1e-2
        # Norms over all dimensions would not do.
        assert relative_difference(masked(name, config, plan)(ids).logits, expected) > 1e-3
    assert sum(p.numel() for p in small.parameters()) == plan.parameters[1] < plan.parameters[0]
    size = family_of(config).dimensions(config)
    if others is None:
        attention = next(
            tensor for key, tensor in small.state_dict().items()
            if key.endswith(("o_proj.weight", "out_proj.weight", "self_attention.dense.weight"))
        )  # fmt: skip
        assert attention.shape == (keep, size.heads * size.head_dim)


def test_loads_in_a_fresh_interpreter(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Stock but for OPT and BLOOM, whose heads have no width of their own, and biased LLaMA."""
    remote, bits = {}, {}
    ids = torch.arange(3, 19).view(2, 8)
    for name in (*FRESH, "llama-tied", "bloom-8"):
        # 32 is what the layers of opt-post-norm project from: stock OPT would not project.
        for keep, others in ((31, None), (32, None), (31, "protected")):
            source, out = tiny_checkpoint(name), tmp_path / f"{name}-{keep}-{others}"
            config = checkpoint.read_config(source)
            checkpoint.prune_checkpoint(source, channel_plan(config, keep, others=others), out)
            found = checkpoint.read_config(out)
            assert found["hidden_size"] == keep
            own = name.startswith(("opt", "bloom")) or (name, keep) == ("llama-bias", 31)
            remote[str(out)] = "auto_map" in found
            assert remote[str(out)] == (own or others is not None)
            with torch.inference_mode():
                logits = checkpoint.load_model(out)(ids).logits
            bits[str(out)] = [logits.contiguous().view(torch.int32).tolist(), True, True]
            with pytest.raises(InputError, match="residual_channel units cannot be padded"):
                checkpoint.export_stock(out, config, tmp_path / "stock")
    assert load_in_a_fresh_interpreter(remote) == bits


def test_a_plan_records_residual_channels_once(tmp_path: Path) -> None:
    config = tiny_config("llama")
    plan = channel_plan(config, 29, others="protected")
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["kept"] == {RESIDUAL: list(plan.whole[RESIDUAL])}
    assert not any(RESIDUAL in layer["kept"] for layer in data["layers"])
    for change, message in (
        ({RESIDUAL: []}, "plan: residual_channel: no unit is kept"),
        ({RESIDUAL: [3, 3]}, "without repeats"),
        ({RESIDUAL: [48]}, r"0\.\.47"),
        ({"channel": [1]}, "unknown kind"),
    ):
        with pytest.raises(InputError, match=message):
            Plan.from_dict(data | {"kept": change})
    # A plan of layers alone does not mention them.
    assert "kept" not in random_plan(config, ("kv_group",), shape="uniform", seed=0).to_dict()
    wide = config | {"hidden_size": 56}
    with pytest.raises(InputError, match="plan is for units"):
        list(prune_tensors([], family_of(wide), wide, plan))


# ----------------------------------------------------------------------------------- selection


def scores_of(config: dict[str, Any], seed: int = 0) -> dict[str, list[Any]]:
    return {RESIDUAL: [np.random.default_rng(seed).random(config["hidden_size"])]}


@pytest.mark.parametrize(
    ("ratio", "width", "parameters"), [(0.2, 3276, 5_389_416_396), (0.5, 2048, 3_369_207_808)]
)
def test_published_counts(ratio: float, width: int, parameters: int) -> None:
    """LLM-Pruner's table 3: Channel 20 % has 5.39 B, 50 % 3.37 B; attention stays 4,096 wide."""
    config, family = LLAMA_7B, family_of(LLAMA_7B)
    target = Target("groups", ratio)
    plan = select(scores_of(config), family, config, target, CHANNEL, {})
    assert plan.parameters == (6_738_415_616, parameters)
    new, stock = pruned_config(family, config, plan)
    assert stock
    with torch.device("meta"):
        small = checkpoint.build_model(new, lambda cls, parsed: cls(parsed))
        whole = checkpoint.build_model(dict(config), lambda cls, parsed: cls(parsed))
    assert sum(parameter.numel() for parameter in small.parameters()) == parameters
    layer = small.model.layers[31]
    assert layer.self_attn.o_proj.weight.shape == (width, 4096)
    assert layer.mlp.down_proj.weight.shape == (width, 11008)
    tensors = prune_tensors(whole.state_dict().items(), family, config, plan)
    assert {key: tensor.shape for key, tensor in tensors} == {
        key: tensor.shape for key, tensor in small.state_dict().items()
    }


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("config", [SMOLLM2, LLAMA_7B], ids=["135M", "7B"])
def test_parameter_target_is_met(config: dict[str, Any], ratio: float) -> None:
    family, target = family_of(config), Target("parameters", ratio)
    plan = select(scores_of(config), family, config, target, CHANNEL, {})
    # All parameters of these models belong to one channel or another: the nearest width.
    width = round(config["hidden_size"] * (1 - ratio))
    assert len(plan.whole[RESIDUAL]) == width
    assert plan.removed_ratio == pytest.approx(1 - width / config["hidden_size"], rel=1e-9)
    rounded = Rule((RESIDUAL,), round_to=64)
    plan = select(scores_of(config), family, config, target, rounded, {})
    assert len(plan.whole[RESIDUAL]) == 64 * round(config["hidden_size"] * (1 - ratio) / 64)


def test_the_lowest_channels_go() -> None:
    config = tiny_config("llama")
    scores = {RESIDUAL: [np.array([5.0, 1.0, 1.0, *range(2, 47)])]}
    plan = select(scores, family_of(config), config, Target("groups", 0.05), CHANNEL, {})
    # 48 - int(48 * 0.95) = 3: the two ones and, by value, the two.
    assert sorted(set(range(48)) - set(plan.whole[RESIDUAL])) == [1, 2, 3]
    assert plan.kept == ({},) * 4
    scores[RESIDUAL][0][7] = np.nan
    with pytest.raises(NonFiniteError, match="scores: residual_channel 7 is nan"):
        select(scores, family_of(config), config, Target("groups", 0.05), CHANNEL, {})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (("groups", 0.2, 4, 2), "residual_channel units run through all layers; allowed: no"),
        (("parameters", 0.2, 0, 1), "residual_channel units run through all layers"),
        (("blocks", 3, 0, 0), "prunes residual_channel, not blocks"),
        (("groups", 0.999, 0, 0), "all 576 residual_channel units of the model"),
        (("parameters", 0.999, 0, 0), "at most"),
    ],
)
def test_unreachable_targets_are_refused(target: tuple[str, float, int, int], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_reachable(family_of(SMOLLM2), SMOLLM2, Target(*target), CHANNEL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("wanda_sp", {}, "strategy 'channel' is not of this method; allowed: block"),
        ("shortgpt", {}, "strategy 'channel' is not of this method; allowed: block"),
        ("random", {"heads": "query_slot"}, "neither ranking nor heads"),
        ("magnitude", {"ranking": "global"}, "neither ranking nor heads"),
        ("llm_pruner", {"aggregation": "product"}, "'product' is not of strategy channel"),
        ("random", {"strategy": "layer"}, "allowed: block, channel"),
    ],
)
def test_methods_refuse_what_they_do_not_do(
    method: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        create(method, {"strategy": "channel"} | parameters)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------- scores

# The axis of a parameter that is the residual stream, by the name of its module alone.
INPUTS = {
    "embed_tokens", "embed_positions", "word_embeddings", "lm_head", "project_out",
    "q_proj", "k_proj", "v_proj", "query_key_value",
    "gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h",
}  # fmt: skip
OUTPUTS = {"project_in", "o_proj", "out_proj", "dense", "down_proj", "fc2", "dense_4h_to_h"}


def stream_axis(name: str, narrow: bool) -> int | None:
    module, kind = name.split(".")[-2:]
    if module in ("q_norm", "k_norm") or (narrow and module in ("embed_tokens", "lm_head")):
        return None
    if module in INPUTS:
        return 1 if kind == "weight" else None
    assert module in OUTPUTS or "norm" in module or module == "ln_f", name
    return 0


def by_autograd(name: str, criterion: str) -> Any:
    """Importance of every residual channel from whole-model gradients of single samples, fp64."""
    model = tiny_model(name).double()
    first, second, _ = per_sample_autograd(model, WINDOWS)
    narrow = name == "opt-post-norm"
    members: dict[str, Any] = {}
    for full, weight in model.named_parameters():
        axis = stream_axis(full, narrow)
        if axis is None:
            continue
        weight = weight.detach()
        values = weight * first[full]
        square = weight**2 * second[full]
        values = {
            "vector": values,
            "element1": values.abs(),
            "element2": square,
            "mixed": (values - square / 2).abs(),
        }[criterion]
        module = full.rpartition(".")[0]
        if "embed" in full or "norm" in full or "ln_f" in full:
            # No linear maps: the paper takes them element by element.
            values = values.abs()
        # A bias is a part of its row, and its sign counts there.
        members[module] = members.get(module, 0) + (
            values if values.ndim == 1 else values.sum(1 - axis)
        )
    return sum(value.abs() for value in members.values()).numpy()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", TINY)
def test_scores_equal_plain_autograd_over_the_whole_model(name: str, criterion: str) -> None:
    config, model = tiny_config(name), tiny_model(name)
    family = family_of(config)
    method = create("llm_pruner", {"criterion": criterion, "strategy": "channel"})
    module = {"gradients_whole": gradients_whole, "fisher_whole": fisher_whole}
    (statistic,) = method.statistics
    before = hash_of(model)
    found = module[statistic].collect(PassInputs(model, family, config, WINDOWS, 2))
    assert hash_of(model) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    inputs = ScoringInputs(family, config, lambda key: pytest.fail(key), {statistic: found}, 0)
    (scores,) = method.scores(inputs)[RESIDUAL]
    assert scores == pytest.approx(by_autograd(name, criterion), rel=2e-4)


@pytest.mark.parametrize("name", ["llama", "opt", "bloom"])
def test_statistics_of_layers_are_those_of_the_pass_over_layers(name: str) -> None:
    config, model = tiny_config(name), tiny_model(name)
    for plain, whole in ((gradients, gradients_whole), (fisher, fisher_whole)):
        a, b = (
            m.collect(PassInputs(model, family_of(config), config, WINDOWS, 2))
            for m in (plain, whole)
        )
        assert all(torch.equal(value, b[key]) for key, value in a.items())
        outside = {key.rsplit(".", 2)[0] for key in b.keys() - a.keys()}
        assert outside == set(family_of(config).outer_shapes(config))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_the_embedding_s_gradient_is_that_of_both_its_uses(name: str) -> None:
    """Of a token that never occurs only the head sees the row, and only if it shares it."""
    model = tiny_model(name)
    config = tiny_config(name)
    windows = WINDOWS % 50
    found = gradients_whole.collect(PassInputs(model, family_of(config), config, windows, 5))
    rows = found["model.embed_tokens.weight.abs.rows"]
    assert (rows[60:] > 0).all() == (name == "llama-tied")
    assert (rows[windows.unique()] > 0).all()


def test_a_parameter_without_finite_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = tiny_config("llama"), tiny_model("llama")
    embedding = model.model.embed_tokens
    monkeypatch.setattr(
        embedding, "forward", lambda ids: (embedding.weight * 0).abs().sqrt()[ids] + 0.1
    )
    with pytest.raises(NonFiniteError, match=r"gradients_whole: model\.embed_tokens\.weight is"):
        gradients_whole.collect(PassInputs(model, family_of(config), config, WINDOWS, 5))


def test_magnitude_by_hand() -> None:
    """One layer, two channels, one head: every weight that a channel owns, squared."""
    config = {
        "model_type": "llama",
        "hidden_size": 2,
        "num_attention_heads": 1,
        "head_dim": 1,
        "intermediate_size": 1,
        "num_hidden_layers": 1,
        "vocab_size": 3,
    }
    weights = {
        "model.embed_tokens": [[1.0, 0.0], [2.0, 1.0], [0.0, -1.0]],
        "model.layers.0.input_layernorm": [1.0, 2.0],
        "model.layers.0.self_attn.q_proj": [[1.0, -2.0]],
        "model.layers.0.self_attn.k_proj": [[0.0, 3.0]],
        "model.layers.0.self_attn.v_proj": [[1.0, 1.0]],
        "model.layers.0.self_attn.o_proj": [[2.0], [-1.0]],
        "model.layers.0.post_attention_layernorm": [3.0, 1.0],
        "model.layers.0.mlp.gate_proj": [[1.0, 0.0]],
        "model.layers.0.mlp.up_proj": [[0.0, 1.0]],
        "model.layers.0.mlp.down_proj": [[1.0], [4.0]],
        "model.norm": [-1.0, 2.0],
        "lm_head": [[1.0, 1.0], [0.0, 2.0], [3.0, 0.0]],
    }
    read = []

    def weight(name: str) -> torch.Tensor:
        read.append(name.removesuffix(".weight"))
        return torch.tensor(weights[read[-1]])

    for order, expected in (
        (2, [5 + 1 + 1 + 0 + 1 + 4 + 9 + 1 + 0 + 1 + 1 + 10,
             2 + 4 + 4 + 9 + 1 + 1 + 1 + 0 + 1 + 16 + 4 + 5]),
        (1, [3 + 1 + 1 + 0 + 1 + 2 + 3 + 1 + 0 + 1 + 1 + 4,
             2 + 2 + 2 + 3 + 1 + 1 + 1 + 0 + 1 + 4 + 2 + 3]),
    ):  # fmt: skip
        inputs = ScoringInputs(family_of(config), config, weight, {}, 0)
        method = create("magnitude", {"order": order, "strategy": "channel"})
        (scores,) = method.scores(inputs)[RESIDUAL]
        assert scores.tolist() == expected
    # In the order of execution, all once.
    assert read == list(weights) * 2


def test_random_is_one_stream_for_the_model() -> None:
    config = tiny_config("bloom")
    inputs = ScoringInputs(family_of(config), config, torch.zeros, {}, 5)
    method = create("random", {"strategy": "channel"})
    (a,), (b,) = method.scores(inputs)[RESIDUAL], method.scores(inputs)[RESIDUAL]
    assert a.shape == (48,)
    assert (a == b).all()
