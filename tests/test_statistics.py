"""Statistic passes and criteria against plain autograd, plain hooks and hand-computed numbers."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_config, tiny_model

from prunelib.criteria.fold import fold, sum_over_members
from prunelib.criteria.magnitude import magnitude
from prunelib.criteria.wanda import wanda_columns
from prunelib.errors import InputError, NonFiniteError
from prunelib.families import family_of
from prunelib.methods import create
from prunelib.methods.base import ScoringInputs
from prunelib.statistics import activations, gradients
from prunelib.statistics.inputs import PassInputs

WINDOWS = torch.randint(0, 97, (6, 16), generator=torch.Generator().manual_seed(3))


def weights_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_kept_bytes_are_a_fifth_of_the_weights_or_the_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama-tied")
    assert gradients.kept_bytes(model) == 671_088_640
    monkeypatch.setattr(gradients, "KEPT_BYTES", 1)
    # A tied head is the embedding's memory.
    assert gradients.kept_bytes(model) == model.num_parameters() * 4 // 5


@pytest.mark.parametrize(("batch", "kept_bytes"), [(6, 0), (6, 1 << 29), (2, 0), (4, 100_000)])
@pytest.mark.parametrize("name", TINY)
def test_gradients_equal_plain_autograd(
    name: str, batch: int, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "kept_bytes", lambda model: kept_bytes)
    monkeypatch.setattr(gradients, "LOGITS_BYTES", 97 * 4 * 7)
    config, model = tiny_config(name), tiny_model(name)
    layers = family_of(config).layers(model)
    before = weights_hash(model)
    found = gradients.collect(PassInputs(model, family_of(config), config, WINDOWS, batch))
    assert weights_hash(model) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

    loss = model(WINDOWS, labels=WINDOWS).loss
    expected = torch.autograd.grad(loss, list(layers.parameters()))
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    for (parameter_name, weight), gradient in zip(layers.named_parameters(), expected, strict=True):
        product = (weight * gradient).detach().double()
        product = product if product.ndim == 2 else product[:, None]
        for key, value in {
            "abs.rows": product.abs().sum(1),
            "abs.columns": product.abs().sum(0),
            "sum.rows": product.sum(1),
            "sum.columns": product.sum(0),
        }.items():
            scale = product.abs().sum().item()
            difference = (found[f"{parameter_name}.{key}"] - value).abs().max().item()
            # Where nothing rotates the keys their bias shifts all scores of a query alike: what is
            # left of its gradient is rounding.
            assert difference < 1e-5 * scale + 1e-8, (parameter_name, key)


@pytest.mark.parametrize("name", TINY)
def test_every_unit_gets_a_finite_sum_from_both_passes(name: str) -> None:
    config, model = tiny_config(name), tiny_model(name)
    family = family_of(config)
    found = {
        "gradients": gradients.collect(PassInputs(model, family, config, WINDOWS, 6)),
        "activations": activations.collect(PassInputs(model, family, config, WINDOWS, 6)),
    }
    state = model.state_dict()

    def weight(full_name: str) -> torch.Tensor:
        return state[full_name]

    inputs = ScoringInputs(family, config, weight, found, 0)
    sizes = {"kv_group": 0, "mlp_channel": 0}
    for method in ("llm_pruner", "wanda_sp", "magnitude"):
        scores = create(method, {}).scores(inputs)
        for kind in sizes:
            units = np.stack(scores[kind])
            assert units.shape == (
                family.dimensions(config).layers,
                family.kind(config, kind).count,
            )
            assert np.isfinite(units).all()
            assert (units > 0).any(axis=1).all(), "a whole layer got nothing"
    # Every position of every slice is counted once, in exactly one unit.
    layer = dict(family.layers(model)[0].named_parameters())
    for kind in family.units(config).values():
        for part in kind.slices:
            assert len(part.owner) == layer[part.parameter].shape[part.axis]
            assert set(part.owner.tolist()) == set(range(kind.count))


def _sums(found: dict[str, torch.Tensor], layer: int, module: str, axis: str) -> torch.Tensor:
    """The signed sums of w g over a linear map's rows (bias included) or columns."""
    total = found[f"{layer}.{module}.weight.sum.{axis}"].double()
    bias = found.get(f"{layer}.{module}.bias.sum.rows")
    return total + bias if axis == "rows" and bias is not None else total


@pytest.mark.parametrize("name", ["opt", "opt-bare"])
def test_a_relu_channel_s_rows_and_columns_agree(name: str) -> None:
    """Scaling a head's v rows or a channel's fc1 row up and its output columns down is nothing."""
    config, model = tiny_config(name), tiny_model(name)
    found = gradients.collect(PassInputs(model, family_of(config), config, WINDOWS, 6))
    kinds = family_of(config).units(config)
    for kind, inner, outer in (
        (kinds["kv_group"], "self_attn.v_proj", "self_attn.out_proj"),
        (kinds["mlp_channel"], "fc1", "fc2"),
    ):
        owners = {part.parameter: part.owner for part in kind.slices}
        for layer in range(4):
            sums = [
                fold(
                    _sums(found, layer, module, axis).numpy(),
                    owners[f"{module}.weight"],
                    kind.count,
                )
                for module, axis in ((inner, "rows"), (outer, "columns"))
            ]
            assert sums[0] == pytest.approx(sums[1], abs=2e-6 + 2e-4 * np.abs(sums[1]).max())
            assert np.abs(sums[0]).max() > 1e-4


@pytest.mark.parametrize("name", ["llama", "llama-mha", "llama-bias", "qwen2", "qwen3", "glm"])
def test_value_rows_and_output_columns_agree_per_kv_group(name: str) -> None:
    """An identity that needs no reference: scaling v up and o down changes nothing.

    For every kv head the sum of w g over its v rows equals the sum of w g over the o columns of
    its query heads, and no other assignment of query heads to kv heads satisfies it.
    """
    config, model = tiny_config(name), tiny_model(name)
    found = gradients.collect(PassInputs(model, family_of(config), config, WINDOWS, 6))
    groups, heads, width = config["num_key_value_heads"], config["num_attention_heads"], 8
    for layer in range(4):
        rows = found[f"{layer}.self_attn.v_proj.weight.sum.rows"]
        if f"{layer}.self_attn.v_proj.bias.sum.rows" in found:
            rows = rows + found[f"{layer}.self_attn.v_proj.bias.sum.rows"]
        columns = found[f"{layer}.self_attn.o_proj.weight.sum.columns"].double().numpy()
        value = rows.double().view(groups, width).sum(1).numpy()
        kind = family_of(config).kind(config, "kv_group")
        (part,) = (part for part in kind.slices if "o_proj" in part.parameter)
        right = fold(columns, part.owner, groups)
        assert right == pytest.approx(value, abs=2e-6 + 2e-4 * np.abs(value).max())
        if heads > groups > 1:
            wrong = fold(columns, np.arange(heads * width) // width % groups, groups)
            assert np.abs(wrong - value).max() > 20 * np.abs(right - value).max()


def test_activations_equal_plain_hooks() -> None:
    config, model = tiny_config("llama"), tiny_model("llama")
    found = activations.collect(PassInputs(model, family_of(config), config, WINDOWS, 4))
    captured = {}
    down = model.model.layers[2].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda m, args: captured.update(x=args[0]))
    with torch.inference_mode():
        out = model(WINDOWS, output_hidden_states=True)
    handle.remove()
    expected = captured["x"].double().square().sum((0, 1))
    assert torch.allclose(found["2.mlp.down_proj.sum_squares"], expected, rtol=1e-6)
    # The hidden states before the last one are block inputs; the last one has the final norm on it.
    states = [state.double() for state in out.hidden_states[:-1]]
    for block in range(3):
        cosine = torch.nn.functional.cosine_similarity(states[block], states[block + 1], dim=-1)
        expected_influence = 1 - cosine.mean().item()
        assert found["block_influence"][block].item() == pytest.approx(expected_influence, abs=1e-6)
    assert found["tokens"].item() == WINDOWS.numel()


def test_an_identity_block_has_no_influence() -> None:
    config, model = tiny_config("llama"), tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    found = activations.collect(PassInputs(model, family_of(config), config, WINDOWS, 6))[
        "block_influence"
    ]
    assert abs(found[1].item()) < 1e-6
    assert found.argmin().item() == 1


def test_a_non_finite_pass_names_the_layer() -> None:
    config, model = tiny_config("llama"), tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"2\.mlp\.down_proj"):
        activations.collect(PassInputs(model, family_of(config), config, WINDOWS, 6))
    with pytest.raises(NonFiniteError, match="loss is nan"):
        gradients.collect(PassInputs(model, family_of(config), config, WINDOWS, 6))


def test_a_fused_channel_s_up_row_and_down_column_agree() -> None:
    """Row i of the second half is the up row of channel i: scaling it scales the down column."""
    config, model = tiny_config("glm"), tiny_model("glm")
    found = gradients.collect(PassInputs(model, family_of(config), config, WINDOWS, 6))
    kind = family_of(config).kind(config, "mlp_channel")
    owners = {part.parameter: part.owner for part in kind.slices}
    for layer in range(4):
        fused = _sums(found, layer, "mlp.gate_up_proj", "rows").numpy()
        up = np.where(np.arange(80) >= 40, fused, 0)
        expected = _sums(found, layer, "mlp.down_proj", "columns").numpy()
        right = fold(up, owners["mlp.gate_up_proj.weight"], 40)
        assert right == pytest.approx(expected, abs=2e-6 + 2e-4 * np.abs(expected).max())
        wrong = fold(up, np.arange(80) // 2, 40)
        assert np.abs(wrong - expected).max() > 20 * np.abs(right - expected).max()


def test_a_fused_head_s_value_rows_and_output_columns_agree() -> None:
    """The values of head h are the last third of its rows; no other layout satisfies this."""
    config, model = tiny_config("bloom"), tiny_model("bloom")
    found = gradients.collect(PassInputs(model, family_of(config), config, WINDOWS, 6))
    kind = family_of(config).kind(config, "kv_group")
    owners = {part.parameter: part.owner for part in kind.slices}
    for layer in range(4):
        fused = _sums(found, layer, "self_attention.query_key_value", "rows").numpy()
        values = np.arange(3 * 48) % (3 * 8) >= 2 * 8
        owner = owners["self_attention.query_key_value.weight"]
        right = fold(np.where(values, fused, 0), owner, 6)
        columns = _sums(found, layer, "self_attention.dense", "columns").numpy()
        expected = fold(columns, owners["self_attention.dense.weight"], 6)
        assert right == pytest.approx(expected, abs=2e-6 + 2e-4 * np.abs(expected).max())
        wrong = fold(np.where(np.arange(3 * 48) >= 2 * 48, fused, 0), np.arange(3 * 48) // 8 % 6, 6)
        assert np.abs(wrong - expected).max() > 20 * np.abs(right - expected).max()


# ------------------------------------------------------------ criteria, by hand


def test_magnitude_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    assert magnitude(weight, 0, 1).tolist() == [3, 7]
    assert magnitude(weight, 0, 2).tolist() == [5, 25]
    assert magnitude(weight, 1, 1).tolist() == [4, 6]
    assert magnitude(weight, 1, 2).tolist() == [10, 20]
    assert magnitude(torch.tensor([2.0, -3.0]), 0, 2).tolist() == [4, 9]


def test_wanda_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    norm = torch.tensor([9.0, 16.0]).sqrt()
    assert wanda_columns(weight, norm).tolist() == [(1 + 3) / 2 * 3, (2 + 4) / 2 * 4]


def test_fold_assigns_contiguous_query_heads() -> None:
    # Four heads of width 1 on two kv heads: importance only in heads 0 and 1 is group 0's alone.
    config = tiny_config("llama-mha") | {"num_key_value_heads": 2, "head_dim": 1}
    kind = family_of(config).kind(config, "kv_group")
    (part,) = (part for part in kind.slices if "o_proj" in part.parameter)
    assert fold(np.array([5.0, 7.0, 0.0, 0.0]), part.owner, 2).tolist() == [12, 0]


def two_layer_inputs(statistics: dict[str, dict[str, torch.Tensor]]) -> tuple[Any, dict[str, Any]]:
    """One layer, hidden size 2, two heads of width 1 on one or two kv heads, two channels."""
    config = {
        "model_type": "llama",
        "hidden_size": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 1,
        "intermediate_size": 2,
        "num_hidden_layers": 1,
        "vocab_size": 3,
    }
    weights = {
        "self_attn.q_proj": [[1.0, 0.0], [0.0, 2.0]],
        "self_attn.k_proj": [[1.0, 1.0], [1.0, 0.0]],
        "self_attn.v_proj": [[0.0, 3.0], [1.0, 1.0]],
        "self_attn.o_proj": [[1.0, -1.0], [2.0, 0.0]],
        "mlp.gate_proj": [[1.0, -1.0], [0.0, 1.0]],
        "mlp.up_proj": [[2.0, 0.0], [1.0, 1.0]],
        "mlp.down_proj": [[1.0, 4.0], [-1.0, 0.0]],
    }
    inputs = ScoringInputs(
        family=family_of(config),
        config=config,
        weight=lambda name: torch.tensor(
            weights[name.removeprefix("model.layers.0.").removesuffix(".weight")]
        ),
        statistics=statistics,
        seed=0,
    )
    return inputs, weights


def test_magnitude_method_by_hand() -> None:
    inputs, _ = two_layer_inputs({})
    scores = create("magnitude", {"order": 2}).scores(inputs)
    # Head 0: q 1, k 2, v 9, o column 1+4; head 1: q 4, k 1, v 2, o column 1.
    assert scores["kv_group"][0].tolist() == [17, 8]
    # Channel 0: gate 2, up 4, down column 2; channel 1: gate 1, up 2, down column 16.
    assert scores["mlp_channel"][0].tolist() == [8, 19]
    scores = create("magnitude", {"order": 1}).scores(inputs)
    assert scores["kv_group"][0].tolist() == [1 + 2 + 3 + 3, 2 + 1 + 2 + 1]


def test_wanda_sp_method_by_hand() -> None:
    squares = {
        "0.self_attn.o_proj.sum_squares": torch.tensor([4.0, 9.0]),
        "0.mlp.down_proj.sum_squares": torch.tensor([1.0, 0.25]),
    }
    inputs, _ = two_layer_inputs({"activations": squares})
    scores = create("wanda_sp", {}).scores(inputs)
    assert scores["kv_group"][0].tolist() == [1.5 * 2, 0.5 * 3]
    assert scores["mlp_channel"][0].tolist() == [1.0 * 1, 2.0 * 0.5]


def test_llm_pruner_method_by_hand() -> None:
    products = {}
    for number, name in enumerate(
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    ):
        products[f"0.{name}.weight.abs.rows"] = torch.tensor([1.0 + number, 10.0 + number])
    products["0.self_attn.o_proj.weight.abs.columns"] = torch.tensor([100.0, 200.0])
    products["0.mlp.down_proj.weight.abs.columns"] = torch.tensor([300.0, 400.0])
    inputs, _ = two_layer_inputs({"gradients": products})
    scores = create("llm_pruner", {}).scores(inputs)
    assert scores["kv_group"][0].tolist() == [1 + 2 + 3 + 100, 10 + 11 + 12 + 200]
    assert scores["mlp_channel"][0].tolist() == [4 + 5 + 300, 13 + 14 + 400]


def test_random_depends_on_the_seed_alone() -> None:
    config = tiny_config("llama")

    def scores(seed: int) -> Any:
        inputs = ScoringInputs(family_of(config), config, torch.zeros, {}, seed)
        return create("random", {}).scores(inputs)

    a, b, other = scores(1), scores(1), scores(2)
    assert all((x == y).all() for x, y in zip(a["mlp_channel"], b["mlp_channel"], strict=True))
    assert (a["mlp_channel"][0] != other["mlp_channel"][0]).any()
    assert (a["mlp_channel"][0] != a["mlp_channel"][1]).any()


def test_sum_over_members_covers_every_slice() -> None:
    config = tiny_config("llama-bias")
    kind = family_of(config).kind(config, "mlp_channel")
    names = sorted(part.parameter for part in kind.slices)
    assert names == [
        "mlp.down_proj.weight",
        "mlp.gate_proj.bias",
        "mlp.gate_proj.weight",
        "mlp.up_proj.bias",
        "mlp.up_proj.weight",
    ]
    assert (sum_over_members(kind, lambda part: np.ones(len(part.owner))) == 5).all()


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "nothing",
            {},
            "method 'nothing' is unknown; known: deeper_look, first_layers, flexigpt",
        ),
        ("magnitude", {"order": 3}, "1 and 2 allowed"),
        ("magnitude", {"power": 2}, "unknown hyper-parameter power"),
        ("llm_pruner", {"criterion": "best"}, "allowed: vector, element1"),
        ("random", {"ranking": "sideways"}, "allowed: local, global"),
        ("random", {"round_to": 0}, "from 1"),
    ],
)
def test_bad_methods_are_refused(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create(name, parameters)
