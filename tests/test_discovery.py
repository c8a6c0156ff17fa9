"""Discovery against groups that are known by hand, and against what families declare."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prunelib.discovery import (
    CHANNEL,
    HEAD,
    RESIDUAL,
    VOCABULARY,
    Dependencies,
    Slice,
    discover,
    trace,
)
from prunelib.errors import InputError
from prunelib.families import family_module, family_of

WIDE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
OPT: dict[str, Any] = {
    "hidden_size": 24,
    "ffn_dim": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 24,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDE),
    "llama with as many kv heads": ("llama", WIDE | {"num_key_value_heads": 6, "head_dim": 4}),
    "llama with biases": ("llama", WIDE | {"attention_bias": True, "mlp_bias": True}),
    "llama with a tied head": ("llama", WIDE | {"tie_word_embeddings": True}),
    "mistral": ("mistral", WIDE),
    "qwen2": ("qwen2", WIDE | {"head_dim": 4}),
    "qwen2 with windows": (
        "qwen2",
        WIDE
        | {"head_dim": 4, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", WIDE),
    "opt": ("opt", OPT),
    # As opt-350m: norms after the sums, an embedding narrower than the layers.
    "opt with norms behind": ("opt", OPT | {"do_layer_norm_before": False}),
    "opt with projections": ("opt", OPT | {"word_embed_proj_dim": 16}),
    "opt without biases": (
        "opt",
        OPT
        | {"enable_bias": False, "layer_norm_elementwise_affine": False}
        | {"tie_word_embeddings": False, "_remove_final_layer_norm": True},
    ),
    "bloom with its own head": (
        "bloom",
        {"hidden_size": 24, "n_layer": 2, "n_head": 3, "vocab_size": 50}
        | {"tie_word_embeddings": False},
    ),
    "bloom": ("bloom", {"hidden_size": 24, "n_layer": 2, "n_head": 3, "vocab_size": 50}),
    "glm": ("glm", WIDE | {"num_key_value_heads": 2, "pad_token_id": 0}),
    "glm without biases": (
        "glm",
        WIDE | {"pad_token_id": 0, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "gpt2": (
        "gpt2",
        {"n_embd": 24, "n_layer": 2, "n_head": 3, "vocab_size": 50, "n_positions": 32},
    ),
    "gpt_neox": (
        "gpt_neox",
        {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
        | {"num_attention_heads": 3, "vocab_size": 50},
    ),
    "mixtral": ("mixtral", WIDE | {"num_local_experts": 4}),
}


@cache
def make(name: str) -> PreTrainedModel:
    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, bos_token_id=1, eos_token_id=2, **options)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


@cache
def found_in(name: str) -> Dependencies:
    return discover(make(name))


def span(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


def places(found: Dependencies, parameter: str, axis: int, position: int) -> dict[str, Any]:
    """``parameter.axis`` -> positions of the group that a trigger leads to."""
    group = found.group(parameter, axis, position)
    return {f"{s.parameter}.{s.axis}": s.positions for s in group.slices}


# --------------------------------------------------------------------------- graphs by hand


class Branches(nn.Module):
    """Two inputs of a sum, a product, a norm, and a map that nothing joins to them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate = (nn.Linear(3, 4, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.c = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.a(x) + torch.relu(self.b(x))
        return self.c(self.norm(total * torch.sigmoid(self.gate(x))))


def test_sums_products_norms_and_biases_join_and_linear_maps_do_not() -> None:
    found = trace(Branches().eval(), {"x": torch.zeros(1, 2, 3)})
    expected = {
        "a.weight.0": (2,),
        "b.weight.0": (2,),
        "gate.weight.0": (2,),
        "norm.weight.0": (2,),
        "norm.bias.0": (2,),
        "c.weight.1": (2,),
    }
    for trigger in expected:
        parameter, axis = trigger.rsplit(".", 1)
        assert places(found, parameter, int(axis), 2) == expected
    # The output's rows go with their bias alone, the input's columns with each other.
    assert places(found, "c.weight", 0, 1) == {"c.weight.0": (1,), "c.bias.0": (1,)}
    assert found.untraced == ()


class PaperBlock(nn.Module):
    """The network of LLM-Pruner's figure 2: an embedding, attention, a gated MLP and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(6) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(6, 5, bias=False) for _ in range(2))
        self.down = nn.Linear(5, 6, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        h = self.norm1(x)
        q, k, v = (part(h).view(1, -1, 3, 2).transpose(1, 2) for part in (self.q, self.k, self.v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(heads.transpose(1, 2).reshape(1, -1, 6))
        h = self.norm2(x)
        x = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        logits: torch.Tensor = self.head(self.norm3(x))
        return logits


def test_the_three_group_types_of_the_paper() -> None:
    """Figure 2 (a) to (c), from every trigger of a group."""
    found = trace(PaperBlock().eval(), {"ids": torch.zeros(1, 4, dtype=torch.int64)})
    assert found.untraced == ()
    channel = {"gate.weight.0": (3,), "up.weight.0": (3,), "down.weight.1": (3,)}
    head = dict.fromkeys(("q.weight.0", "k.weight.0", "v.weight.0", "o.weight.1"), (2, 3))
    residual = dict.fromkeys(
        (
            "embed.weight.1", "norm1.weight.0", "q.weight.1", "k.weight.1", "v.weight.1",
            "o.weight.0", "norm2.weight.0", "gate.weight.1", "up.weight.1", "down.weight.0",
            "norm3.weight.0", "head.weight.1",
        ),
        (3,),
    )  # fmt: skip
    for expected, kind, count in ((channel, CHANNEL, 5), (head, HEAD, 3), (residual, RESIDUAL, 6)):
        assert len(found.of(kind)) == count
        for trigger, positions in expected.items():
            parameter, axis = trigger.rsplit(".", 1)
            for position in positions:
                assert places(found, parameter, int(axis), position) == expected
                assert found.group(parameter, int(axis), position).kind == kind


class Shared(nn.Module):
    """One vector for all heads, halves of a head swapped, kv heads shared by two."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q = nn.Linear(5, 16, bias=False)
        self.k, self.v = (nn.Linear(5, 8, bias=False) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(4))
        self.o = nn.Linear(16, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).view(1, -1, 4, 4).transpose(1, 2) * self.scale
        k, v = (part(x).view(1, -1, 2, 4).transpose(1, 2) for part in (self.k, self.v))
        first, second = q.chunk(2, -1)
        q = torch.cat((-second, first), -1)
        if self.fused:
            heads = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.o(heads.transpose(1, 2).reshape(1, -1, 16))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        weights = (q @ k.transpose(2, 3)).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(1, -1, 16))


@pytest.mark.parametrize("fused", [False, True])
def test_query_heads_of_one_kv_head_go_with_it_and_a_shared_vector_stays(fused: bool) -> None:
    found = trace(Shared(fused).eval(), {"x": torch.zeros(1, 3, 5)})
    expected = {
        "q.weight.0": span(8, 8),
        "k.weight.0": span(4, 4),
        "v.weight.0": span(4, 4),
        "o.weight.1": span(8, 8),
    }
    for parameter, axis, position in (
        ("q.weight", 0, 8),
        ("q.weight", 0, 15),
        ("k.weight", 0, 5),
        ("v.weight", 0, 7),
        ("o.weight", 1, 12),
    ):
        assert places(found, parameter, axis, position) == expected
    assert len(found.of(HEAD)) == 2
    with pytest.raises(InputError, match=r"scale, axis 0, position 0 is in no group"):
        found.group("scale", 0, 0)


class Sorted(nn.Module):
    """A sort cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 6)
        self.c, self.d = nn.Linear(6, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(torch.sort(self.a(x)).values)))


def test_what_cannot_be_followed_is_named_and_left_out() -> None:
    found = trace(Sorted().eval(), {"x": torch.zeros(1, 2, 3)})
    assert found.untraced == ("sort in the model",)
    with pytest.raises(InputError, match=r"a.weight, axis 0, position 1 .*not traced: sort in the"):
        found.group("a.weight", 0, 1)
    # Beyond it, all is known.
    assert places(found, "c.weight", 1, 5) == {
        "b.weight.0": (5,), "b.bias.0": (5,), "c.weight.1": (5,),
    }  # fmt: skip


class SortedSum(nn.Module):
    """The rows of ``a`` are added to its columns, in an order that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(4, 2)
        self.first = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        summed: torch.Tensor = self.c(self.b(x + self.a(x).sort(-1).values * 2))
        return summed


@pytest.mark.parametrize(
    "place", [("a.weight", 0), ("a.weight", 1), ("b.weight", 1), ("first.weight", 0)]
)
def test_what_meets_the_untraced_is_left_out_too(place: tuple[str, int]) -> None:
    found = trace(SortedSum().eval(), {"x": torch.zeros(1, 2, 3)})
    assert found.untraced == ("sort in the model",)
    with pytest.raises(InputError, match="not traced: sort in the"):
        found.group(*place, 1)
    # Behind the next matrix, all is known.
    assert places(found, "c.weight", 1, 3) == {
        "b.weight.0": (3,), "b.bias.0": (3,), "c.weight.1": (3,),
    }  # fmt: skip


class Scaled(nn.Module):
    """A matrix that is computed before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.a(x), self.b.weight * 2, self.b.bias)


def test_a_computed_matrix_is_not_followed() -> None:
    found = trace(Scaled().eval(), {"x": torch.zeros(1, 2, 3)})
    assert found.untraced == ("mul in the model",)
    for place in (("a.weight", 0), ("b.weight", 1)):
        with pytest.raises(InputError, match="not traced: mul in the"):
            found.group(*place, 1)


# ---------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_of_groups(name: str) -> None:
    model = make(name)
    options, found = CONFIGS[name][1], found_in(name)
    heads = options.get("num_key_value_heads") or options.get("num_attention_heads", 3)
    assert len(found.of(HEAD)) == 2 * heads
    assert len(found.of(VOCABULARY)) >= 50
    if name == "mixtral":
        assert any(what.startswith("topk in model.layers.0.mlp") for what in found.untraced)
        assert not found.of(CHANNEL)
        # The residual width runs through the experts.
        assert not found.of(RESIDUAL)
        return
    assert found.untraced == ()
    # Beside the stream, the embedding's own width where projections part them.
    embedding = options.get("word_embed_proj_dim", 24)
    assert len(found.of(RESIDUAL)) == 24 + (embedding if embedding != 24 else 0)
    assert len(found.of(CHANNEL)) == 2 * (
        options.get("intermediate_size") or options.get("ffn_dim", 96)
    )
    # Every position of every axis is in one group, but for vectors that all heads share.
    known = {(p.parameter, p.axis): 0 for group in found.groups for p in group.slices}
    for group in found.groups:
        for part in group.slices:
            known[part.parameter, part.axis] += len(part.positions)
    for parameter, tensor in model.named_parameters():
        if "q_norm" in parameter or "k_norm" in parameter:
            assert (parameter, 0) not in known
        else:
            assert [known[parameter, axis] for axis in range(tensor.ndim)] == list(tensor.shape)


def test_heads_of_models_without_an_adapter() -> None:
    """GPT-2 keeps its matrices as [in, out] and fuses q, k and v; GPT-NeoX fuses them per head."""
    layer = "transformer.h.1.attn."
    assert places(found_in("gpt2"), f"{layer}c_proj.weight", 0, 8) == {
        f"{layer}c_attn.weight.1": (*span(8, 8), *span(32, 8), *span(56, 8)),
        f"{layer}c_attn.bias.0": (*span(8, 8), *span(32, 8), *span(56, 8)),
        f"{layer}c_proj.weight.0": span(8, 8),
    }
    layer = "gpt_neox.layers.1.attention."
    assert places(found_in("gpt_neox"), f"{layer}dense.weight", 1, 8) == {
        f"{layer}query_key_value.weight.0": span(24, 24),
        f"{layer}query_key_value.bias.0": span(24, 24),
        f"{layer}dense.weight.1": span(8, 8),
    }


def test_a_residual_channel_runs_through_the_whole_model() -> None:
    found = places(found_in("llama with a tied head"), "model.norm.weight", 0, 7)
    layers = {
        "input_layernorm.weight.0", "post_attention_layernorm.weight.0",
        "self_attn.q_proj.weight.1", "self_attn.k_proj.weight.1", "self_attn.v_proj.weight.1",
        "self_attn.o_proj.weight.0", "mlp.gate_proj.weight.1", "mlp.up_proj.weight.1",
        "mlp.down_proj.weight.0",
    }  # fmt: skip
    assert found == dict.fromkeys(
        {f"model.layers.{i}.{part}" for i in range(2) for part in layers}
        | {"model.embed_tokens.weight.1", "model.norm.weight.0"},
        (7,),
    )


def test_a_model_that_cannot_be_exported_is_refused_in_one_line() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(InputError, match=r"^Branching cannot be traced by .*") as found:
        trace(Branching(), {"x": torch.zeros(2)})
    assert "\n" not in str(found.value)


def has_family(name: str) -> bool:
    try:
        return bool(family_module({"model_type": CONFIGS[name][0]}))
    except InputError:
        return False


@pytest.mark.parametrize("name", filter(has_family, CONFIGS))
def test_families_declare_what_discovery_finds(name: str) -> None:
    model = make(name)
    config = model.config.to_dict()
    family = family_of(config)
    found = found_in(name)
    for kind, expected in (("kv_group", HEAD), ("mlp_channel", CHANNEL)):
        declared = family.kind(config, kind)
        for layer in range(family.dimensions(config).layers):
            for unit in range(declared.count):
                slices = sorted(
                    (f"{family.layer_prefix}.{layer}.{part.parameter}", part.axis, tuple(
                        int(position) for position in (part.owner == unit).nonzero()[0]
                    ))
                    for part in declared.slices
                )  # fmt: skip
                parameter, axis, positions = slices[0]
                group = found.group(parameter, axis, positions[0])
                assert group.kind == expected
                assert [Slice(*part) for part in slices] == list(group.slices)


@pytest.mark.parametrize("name", filter(has_family, CONFIGS))
def test_families_declare_the_residual_channels_that_discovery_finds(name: str) -> None:
    config, found = make(name).config.to_dict(), found_in(name)
    family = family_of(config)
    declared = family.kind(config, RESIDUAL)
    stream = [
        group
        for group in found.of(RESIDUAL)
        if any(part.parameter.startswith(family.layer_prefix) for part in group.slices)
    ]
    assert declared.count == len(stream) == 24
    for unit in range(declared.count):
        slices = sorted(
            (part.parameter, part.axis, tuple((part.owner == unit).nonzero()[0].tolist()))
            for part in declared.slices
        )
        parameter, axis, positions = slices[0]
        group = found.group(parameter, axis, positions[0])
        assert group.kind == RESIDUAL
        assert [Slice(*part) for part in slices] == list(group.slices)
