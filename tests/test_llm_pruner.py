"""LLM-Pruner's importance: by hand, per-sample autograd, identities, options."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_config, tiny_model

from prunelib.criteria.fold import aggregate, fold, library_attribution, members
from prunelib.errors import InputError, NonFiniteError
from prunelib.families import family_of
from prunelib.families.base import UnitKind, UnitSlice
from prunelib.methods import create
from prunelib.methods.base import ScoringInputs
from prunelib.statistics import WITHIN, fisher, gradients
from prunelib.statistics.inputs import PassInputs

WINDOWS = torch.randint(0, 97, (5, 16), generator=torch.Generator().manual_seed(5))
CRITERIA = ("vector", "element1", "element2", "mixed")


# --------------------------------------------------------------------------- by hand

# One unit in two linear layers of a two-layer network: rows of W1 [2, 2] and columns of W2 [1, 2].
# Weights, and the gradients of two samples; their mean is g, their mean square F.
#            W1 row 0      W1 row 1      W2
#   w        1    2        -1   3        2    -4
#   g(x1)    0.5  -1       2    0        1    0.5
#   g(x2)    1.5  1        0    -2       -3   0.5
#   g        1    0        1    -1       -1   0.5
#   F        1.25 1        2    2        5    0.25
#   g w      1    0        -1   -3       -2   -2
#   w^2 F    1.25 4        2    18       20   4
#   g w - w^2 F / 2
#            0.375 -2      -2   -12      -12  -4
W1 = torch.tensor([[1.0, 2.0], [-1.0, 3.0]])
W2 = torch.tensor([[2.0, -4.0]])
G1 = torch.tensor([[[0.5, -1.0], [2.0, 0.0]], [[1.5, 1.0], [0.0, -2.0]]])
G2 = torch.tensor([[[1.0, 0.5]], [[-3.0, 0.5]]])
TWO_LAYERS = UnitKind(
    "mlp_channel",
    2,
    (
        UnitSlice("mlp.first.weight", 0, np.array([0, 1])),
        UnitSlice("mlp.second.weight", 1, np.array([0, 1])),
    ),
)
# Per criterion the two members of units 0 and 1.
MEMBERS = {
    "vector": ([1, 4], [2, 2]),
    "element1": ([1, 4], [2, 2]),
    "element2": ([5.25, 20], [20, 4]),
    "mixed": ([2.375, 14], [12, 4]),
}


class TwoLayers:
    """A family of one kind; all that scoring asks for."""

    def dimensions(self, config: Any) -> Any:
        return SimpleNamespace(layers=1)

    def kind(self, config: Any, name: str) -> UnitKind:
        assert name == "mlp_channel"
        return TWO_LAYERS


def two_layer_statistics() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, samples, weight in (("first", G1, W1), ("second", G2, W2)):
        sums = fisher.SquaredSums()
        for sample in range(2):
            sums.add(samples[sample].clone())
        found |= sums.reduce(f"0.mlp.{name}.weight", weight)
    return found


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    ("aggregation", "combine"),
    [
        ("sum", lambda a, b: a + b),
        ("mean", lambda a, b: (a + b) / 2),
        ("product", lambda a, b: a * b),
        ("max", max),
        ("last", lambda a, b: b),
    ],
)
def test_every_criterion_and_aggregation_by_hand(
    criterion: str, aggregation: str, combine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = create("llm_pruner", {"criterion": criterion, "aggregation": aggregation})
    monkeypatch.setattr(type(method), "kinds", ("mlp_channel",))
    found = two_layer_statistics()
    inputs: Any = ScoringInputs(
        TwoLayers(),  # type: ignore[arg-type]
        {"num_hidden_layers": 1},
        lambda name: pytest.fail("reads weights"),
        dict.fromkeys(method.statistics, found),
        0,
    )
    first, second = MEMBERS[criterion]
    expected = [combine(a, b) for a, b in zip(first, second, strict=True)]
    (scores,) = method.scores(inputs)["mlp_channel"]
    assert scores.tolist() == pytest.approx(expected, rel=1e-6)


def test_vector_takes_the_absolute_value_of_rows_not_of_members() -> None:
    # A head of two rows with sums 3 and -5: each row is a vector of its own.
    kind = UnitKind("kv_group", 1, (UnitSlice("a.weight", 0, np.array([0, 0])),))
    assert aggregate(kind, lambda part: np.array([3.0, -5.0]), "sum").tolist() == [8]


def test_members_are_folded_before_they_are_combined() -> None:
    # Two members of two positions each, one unit: (1 + 2) (3 + 4), not 1 x 3 + 2 x 4.
    owner = np.array([0, 0])
    kind = UnitKind(
        "kv_group", 1, (UnitSlice("a.weight", 0, owner), UnitSlice("b.weight", 1, owner))
    )
    values = {"a.weight": np.array([1.0, 2.0]), "b.weight": np.array([3.0, 4.0])}
    assert aggregate(kind, lambda part: values[part.parameter], "product").tolist() == [21]
    values = {"a.weight": np.array([1.0, 5.0]), "b.weight": np.array([4.0, 3.0])}
    # (1 + 5) against (4 + 3), not max(1, 4) + max(5, 3).
    assert aggregate(kind, lambda part: values[part.parameter], "max").tolist() == [7]


def test_a_bias_is_a_part_of_its_row() -> None:
    owner = np.array([0, 1])
    kind = UnitKind(
        "mlp_channel",
        2,
        (
            UnitSlice("up.weight", 0, owner),
            UnitSlice("up.bias", 0, owner),
            UnitSlice("down.weight", 1, owner),
        ),
    )
    values = {"up.weight": [4.0, 1.0], "up.bias": [-1.0, 0.0], "down.weight": [2.0, 3.0]}
    scored = {
        how: aggregate(kind, lambda part: np.array(values[part.parameter]), how).tolist()
        for how in ("sum", "mean", "product", "max", "last")
    }
    # Unit 0 has the row |4 - 1| = 3 and the column 2; a zero bias does not make a product zero.
    assert scored == {
        "sum": [5, 4],
        "mean": [2.5, 2],
        "product": [6, 3],
        "max": [3, 3],
        "last": [2, 3],
    }


# ----------------------------------------------------------------------- attribution


def test_library_attribution_by_hand() -> None:
    # Four query heads of width 1 on two kv heads.
    config = tiny_config("llama-mha") | {"num_key_value_heads": 2, "head_dim": 1}
    kind = family_of(config).kind(config, "kv_group")
    (columns,) = (part for part in kind.slices if part.axis == 1)
    (folded,) = (part for part in library_attribution(kind).slices if part.axis == 1)
    values = np.array([1.0, 10.0, 100.0, 1000.0])
    assert fold(values, columns.owner, 2).tolist() == [11, 1100]
    assert fold(values, folded.owner, 2).tolist() == [101, 1010]


def test_library_attribution_changes_kv_groups_alone() -> None:
    config, model = tiny_config("llama"), tiny_model("llama")
    passes = {
        "gradients": gradients.collect(PassInputs(model, family_of(config), config, WINDOWS, 5))
    }
    inputs = ScoringInputs(family_of(config), config, lambda name: pytest.fail(name), passes, 0)
    right = create("llm_pruner", {}).scores(inputs)
    library = create("llm_pruner", {"attribution": "library"}).scores(inputs)
    for layer in range(4):
        assert (right["mlp_channel"][layer] == library["mlp_channel"][layer]).all()
        # The same scores are spread over other groups.
        assert not np.allclose(right["kv_group"][layer], library["kv_group"][layer], rtol=1e-3)
        assert right["kv_group"][layer].sum() == pytest.approx(library["kv_group"][layer].sum())


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2"])
def test_only_the_owners_attribution_satisfies_the_value_output_identity(name: str) -> None:
    """Scaling a kv head's v up and its queries' o down changes nothing, so w g must balance.

    For every kv head the sum of w g over its v rows, with b g of the v bias, equals the sum of
    w g over the o columns of its query heads. Held in fp64.
    """
    config, model = tiny_config(name), tiny_model(name).double()
    family = family_of(config)
    loss = model(WINDOWS, labels=WINDOWS).loss
    loss.backward()
    kind = family.kind(config, "kv_group")

    def sums(layer: int, part: UnitSlice) -> Any:
        parameter = family.layers(model)[layer].get_parameter(part.parameter)
        product = (parameter * parameter.grad).detach()
        return (product.sum(1 - part.axis) if product.ndim == 2 else product).numpy()

    def balance(layer: int, kind: UnitKind, biases: bool) -> Any:
        value, output = np.zeros(kind.count), np.zeros(kind.count)
        for part in kind.slices:
            if "v_proj" in part.parameter and (biases or "weight" in part.parameter):
                value += fold(sums(layer, part), part.owner, kind.count)
            if "o_proj" in part.parameter:
                output += fold(sums(layer, part), part.owner, kind.count)
        return np.abs(value - output).max() / np.abs(output).max()

    for layer in range(4):
        assert balance(layer, kind, True) < 1e-6
        assert balance(layer, library_attribution(kind), True) > 1e-2
        if name != "llama":
            assert balance(layer, kind, False) > 1e-3

    # The fp32 statistics are those sums, biases included.
    found = gradients.collect(PassInputs(tiny_model(name), family, config, WINDOWS, 5))
    for layer in range(4):
        for part in kind.slices:
            axis = "columns" if part.axis else "rows"
            expected = sums(layer, part)
            difference = np.abs(
                found[f"{layer}.{part.parameter}.sum.{axis}"].double().numpy() - expected
            )
            assert difference.max() < 1e-4 * np.abs(expected).max(), (layer, part.parameter)


@pytest.mark.parametrize("name", TINY)
def test_members_are_declared_in_the_order_of_execution(name: str) -> None:
    config, model = tiny_config(name), tiny_model(name)
    family, executed = family_of(config), []
    modules = {module: path for path, module in family.layers(model)[0].named_modules()}
    for module in modules:
        module.register_forward_hook(lambda module, *rest: executed.append(modules[module]))
    with torch.inference_mode():
        model(WINDOWS)
    for kind in family.units(config).values():
        declared = [parts[0].parameter.rpartition(".")[0] for parts in members(kind)]
        assert declared == [path for path in executed if path in declared]
        outputs = {
            "bloom": ("mlp.dense_4h_to_h", "self_attention.dense"),
            "opt": ("fc2", "self_attn.out_proj"),
        }.get(config["model_type"], ("mlp.down_proj", "self_attn.o_proj"))
        assert declared[-1] == outputs[kind.name != "mlp_channel"]
        assert all(len({len(part.owner) for part in parts}) == 1 for parts in members(kind))


# ------------------------------------------------------------------------ second order


def per_sample_autograd(model: Any, windows: torch.Tensor) -> tuple[Any, Any, float]:
    """Mean gradient and mean squared gradient by parameter name, one backward per window."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    first = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
    second, losses = {name: torch.zeros_like(p) for name, p in first.items()}, []
    for window in windows.split(1):
        loss = model(window, labels=window).loss
        losses.append(loss.item())
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            first[name] += gradient / len(windows)
            second[name] += gradient**2 / len(windows)
    return first, second, float(np.mean(losses))


@pytest.mark.parametrize("kept_bytes", [0, 1 << 29])
@pytest.mark.parametrize("name", ["llama", "llama-bias", "llama-tied", "qwen2", "qwen3"])
def test_fisher_equals_a_loop_over_samples(
    name: str, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "kept_bytes", lambda model: kept_bytes)
    config, model = tiny_config(name), tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = fisher.collect(PassInputs(model, family_of(config), config, WINDOWS, 3))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    first, second, loss = per_sample_autograd(model.double(), WINDOWS)
    assert found.pop("loss").item() == pytest.approx(loss, rel=1e-6)
    checked = 0
    for full, weight in model.named_parameters():
        if not full.startswith("model.layers."):
            continue
        product, square = weight.detach() * first[full], weight.detach() ** 2 * second[full]
        for key, values in {
            "sum": product,
            "abs": product.abs(),
            "fisher": square,
            "mixed": (product - square / 2).abs(),
        }.items():
            values = values if values.ndim == 2 else values[:, None]
            for axis, expected in (("rows", values.sum(1)), ("columns", values.sum(0))):
                difference = (
                    found.pop(f"{full.removeprefix('model.layers.')}.{key}.{axis}") - expected
                )
                scale = values.abs().sum().item()
                assert difference.abs().max().item() < 1e-5 * scale, (full, key, axis)
                checked += 1
    assert checked
    assert not found


@pytest.mark.parametrize(("less", "more"), [(a, b) for a, all_ in WITHIN.items() for b in all_])
def test_a_pass_holds_what_those_within_it_do(less: str, more: str) -> None:
    config, model = tiny_config("llama-tied"), tiny_model("llama-tied")
    arguments: Any = (model, family_of(config), config, WINDOWS, 5)
    part, whole = (
        importlib.import_module(f"prunelib.statistics.{name}").collect(PassInputs(*arguments))
        for name in (less, more)
    )
    assert part
    for name, value in part.items():
        # A signed sum is as exact as its terms are large.
        scale = whole[name.replace(".sum.", ".abs.")].abs().max().item()
        assert (value - whole[name]).abs().max().item() < 2e-4 * scale, name


def test_a_linear_map_that_is_called_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = tiny_config("llama"), tiny_model("llama")
    mlp = model.model.layers[0].mlp

    def twice(states: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = mlp.down_proj(states)
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(product)) * mlp.up_proj(product))

    monkeypatch.setattr(
        mlp, "forward", lambda x: twice(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    )
    with pytest.raises(InputError, match=r"Linear\(.*\) more than once; allowed"):
        gradients.collect(PassInputs(model, family_of(config), config, WINDOWS, 5))


def test_the_sum_over_batches_is_in_fp32() -> None:
    # 256 + 1 is 256 in bf16.
    sums = gradients.Sums()
    for value in (256.0, 1.0, 1.0):
        sums.add(torch.full((1, 1), value, dtype=torch.bfloat16))
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    assert sums.reduce("w", weight)["w.sum.rows"].tolist() == [258]
    squared = fisher.SquaredSums()
    for value in (16.0, 1.0, 1.0, 0.0):
        squared.add(torch.full((1, 1), value, dtype=torch.bfloat16))
    found = squared.reduce("w", weight)
    # g = 18 / 4, F = (256 + 1 + 1) / 4.
    assert found["w.fisher.rows"].tolist() == [64.5]
    assert found["w.mixed.rows"].tolist() == [32.25 - 4.5]
    assert found["w.abs.rows"].tolist() == [4.5]


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_first_order_does_not_depend_on_the_batch(batch: int) -> None:
    config, model = tiny_config("qwen2"), tiny_model("qwen2")
    whole = gradients.collect(PassInputs(model, family_of(config), config, WINDOWS, 5))
    split = gradients.collect(PassInputs(model, family_of(config), config, WINDOWS, batch))
    assert whole.keys() == split.keys()
    for name, value in whole.items():
        scale = whole[name.replace(".sum.", ".abs.")].abs().max().item()
        assert (split[name] - value).abs().max().item() < 2e-4 * scale, name


def hash_of(model: Any) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("module", [gradients, fisher])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_bit_identical_after_scoring(module: Any, dtype: torch.dtype) -> None:
    config, model = tiny_config("qwen3"), tiny_model("qwen3").to(dtype)
    before = hash_of(model)
    found = module.collect(PassInputs(model, family_of(config), config, WINDOWS, 2))
    assert hash_of(model) == before
    assert {value.dtype for key, value in found.items() if key != "loss"} == {torch.float32}


@pytest.mark.parametrize("module", [gradients, fisher])
def test_a_non_finite_loss_or_gradient_names_the_layer(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, name = tiny_config("llama"), module.__name__.rpartition(".")[2]
    arguments: Any = (family_of(config), config, WINDOWS, 2)
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"{name}: .* nan; layer 2 is the first"):
        module.collect(PassInputs(model, *arguments))
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    with pytest.raises(NonFiniteError, match=rf"{name}: .*; all layers' outputs are finite"):
        module.collect(PassInputs(model, *arguments))

    # A finite loss whose gradient is not: the square root of zero.
    model = tiny_model("llama")
    down = model.model.layers[1].mlp.down_proj
    monkeypatch.setattr(
        down, "forward", lambda x: torch.nn.functional.linear(x, (down.weight * 0).abs().sqrt())
    )
    with pytest.raises(NonFiniteError, match=rf"{name}: layer 1, mlp.down_proj.weight is not"):
        module.collect(PassInputs(model, *arguments))


# ----------------------------------------------------------------- options and passes


@pytest.mark.parametrize(
    ("criterion", "passes"),
    [
        ("vector", ("gradients",)),
        ("element1", ("gradients",)),
        ("element2", ("fisher",)),
        ("mixed", ("fisher",)),
    ],
)
def test_a_criterion_asks_for_its_pass_alone(criterion: str, passes: tuple[str, ...]) -> None:
    assert create("llm_pruner", {"criterion": criterion}).statistics == passes


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"criterion": "hessian"}, "allowed: vector, element1, element2, mixed"),
        ({"aggregation": "first"}, "allowed: sum, mean, product, max, last"),
        ({"attribution": "mod"}, "allowed: owner, library"),
    ],
)
def test_unknown_options_are_refused(parameters: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create("llm_pruner", parameters)
