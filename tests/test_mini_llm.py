"""MINI-LLM: the criterion by hand and by autograd, the estimate, its memory tricks, its options."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_statistics import two_layer_inputs, weights_hash

from prunelib.checkpoint import WeightReader, load_model, mask_model, read_config, weight_files
from prunelib.criteria.fms import fms_scores, gate_scores
from prunelib.criteria.fold import fold
from prunelib.errors import InputError, IntegrityError, NonFiniteError
from prunelib.families import family_of
from prunelib.families.base import UnitKind, UnitSlice
from prunelib.methods import create
from prunelib.methods.base import ScoringInputs
from prunelib.rules import Rule, Target
from prunelib.selection import select
from prunelib.statistics import (
    activations,
    fms_direct,
    fms_gradients,
    layerwise,
    perturbation,
    zeroth_order,
)
from prunelib.statistics.estimator import Estimator
from prunelib.statistics.fms import fms_sums, unit_parameters
from prunelib.statistics.inputs import PassInputs
from prunelib.statistics.layerwise import Layers, StreamedLayers, _Stored
from prunelib.statistics.perturbation import LowRank, Weights

WINDOWS = torch.randint(0, 97, (5, 16), generator=torch.Generator().manual_seed(5))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"perturbation": "low_rank", "rank": 2},
    {"perturbation": "gates", "epsilon": 0.01},
    {"scope": "layer", "perturbations": 2},
    {"sides": 1, "minibatch": 2, "fresh": True},
    {"distribution": "rademacher", "minibatch": 3},
]


def estimate(name: str, **options: Any) -> dict[str, torch.Tensor]:
    config, model = tiny_config(name), options.pop("model", None) or tiny_model(name)
    batch = options.pop("batch_windows", 5)
    settings = {"perturbations": 3, "seed": 0} | options
    return zeroth_order.collect(
        PassInputs(model, family_of(config), config, WINDOWS, batch), **settings
    )


def no_hooks(model: torch.nn.Module) -> bool:
    return not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


# --------------------------------------------------------------------------- by hand


def test_the_criterion_by_hand() -> None:
    # W [[1, -2], [3, 0.5]], g [[2, 1], [-1, 4]], ||X|| [3, 10]: |W g| ||X|| is
    # [[6, 20], [9, 20]]; of a bias of 2 and -1 with gradients 1 and 5 over 4 tokens [4, 10].
    weight, gradient = torch.tensor([[1.0, -2], [3, 0.5]]), torch.tensor([[2.0, 1], [-1, 4]])
    found = fms_sums("0.up.weight", weight * gradient, torch.tensor([3.0, 10.0]))
    assert found["0.up.weight.fms.rows"].tolist() == [26, 29]
    assert found["0.up.weight.fms.columns"].tolist() == [15, 40]
    bias = torch.tensor([2.0, -1]) * torch.tensor([1.0, 5])
    found |= fms_sums("0.up.bias", bias, torch.tensor(4.0).sqrt())
    found["0.down.weight.fms.columns"] = torch.tensor([100.0, 200.0])
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
    assert fms_scores(found, 0, kind, "sum").tolist() == [26 + 4 + 100, 29 + 10 + 200]
    assert fms_scores(found, 0, kind, "last").tolist() == [100, 200]
    derivative, norm = torch.tensor([-2.0, 3.0]), torch.tensor([5.0, 0.5])
    assert gate_scores(derivative, norm).tolist() == [10, 1.5]
    assert gate_scores(derivative, None).tolist() == [2, 3]


def test_noisy_wanda_by_hand() -> None:
    squares = {
        "0.self_attn.o_proj.sum_squares": torch.tensor([4.0, 9.0]),
        "0.mlp.down_proj.sum_squares": torch.tensor([1.0, 0.25]),
    }
    inputs, _ = two_layer_inputs({"activations": squares})
    asked: list[str] = []

    def ones(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.ones(2, 2)

    def scores(seed: int) -> dict[str, Any]:
        given = ScoringInputs(inputs.family, inputs.config, ones, inputs.statistics, seed)
        return create("wanda_noise", {}).scores(given)

    first, again, other = scores(0), scores(0), scores(1)
    # The weights are ones, so that what is left of a channel is norm x (|z_1| + |z_2|) / 2.
    noise = first["mlp_channel"][0] / [1, 0.5]
    assert (noise > 0).all()
    assert noise[0] != noise[1]
    assert (first["kv_group"][0] == again["kv_group"][0]).all()
    assert (first["kv_group"][0] != other["kv_group"][0]).all()
    assert set(asked) == {
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    }


# --------------------------------------------------------------------- true gradients


@pytest.mark.parametrize("name", TINY)
def test_true_sensitivity_equals_plain_autograd(name: str) -> None:
    config, model = tiny_config(name), tiny_model(name)
    family = family_of(config)
    layers = family.layers(model)
    before = weights_hash(model)
    found = fms_gradients.collect(PassInputs(model, family, config, WINDOWS, 2))
    assert weights_hash(model) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

    inputs: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, label=label: inputs.update({label: args[0].detach().flatten(0, -2)})
        )
        for label, module in layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    loss = model(WINDOWS, labels=WINDOWS).loss
    for handle in handles:
        handle.remove()
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    parameters = dict(layers.named_parameters())
    gradients = dict(
        zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)
    )
    expected = {}
    for label, weight in parameters.items():
        if label.partition(".")[2] not in unit_parameters(family, config):
            continue
        product = (weight * gradients[label]).detach().double()
        if weight.ndim == 2:
            norm = inputs[label.removesuffix(".weight")].double().square().sum(0).sqrt()
            fms = product.abs() * norm
        else:
            fms = (product.abs() * math.sqrt(WINDOWS.numel()))[:, None]
        expected |= {f"{label}.fms.rows": fms.sum(1), f"{label}.fms.columns": fms.sum(0)}
        for axis in ("rows", "columns"):
            # A bias of keys that nothing rotates has a gradient of rounding errors.
            difference = (found[f"{label}.fms.{axis}"] - expected[f"{label}.fms.{axis}"]).abs()
            assert difference.max() < 1e-5 * fms.sum() + 1e-7, label
    # Scores are the sums over all members, and gates the signed sums over the columns.
    scored = create("mini_llm_backprop", {}).scores(
        ScoringInputs(family, config, lambda key: pytest.fail(key), {"fms_gradients": found}, 0)
    )
    for kind, arrays in scored.items():
        unit = family.kind(config, kind)
        for layer, scores in enumerate(arrays):
            total = sum(
                fold(
                    expected[
                        f"{layer}.{part.parameter}.fms.{'columns' if part.axis else 'rows'}"
                    ].numpy(),
                    part.owner,
                    unit.count,
                )
                for part in unit.slices
            )
            assert scores == pytest.approx(total, rel=1e-4)
            (part,) = (part for part in unit.slices if part.axis == 1)
            label = f"{layer}.{part.parameter}"
            gate = fold(
                (parameters[label] * gradients[label]).sum(0).double().detach().numpy(),
                part.owner,
                unit.count,
            )
            scale = np.abs(gate).max()
            assert found[f"{layer}.{kind}.gate"].numpy() == pytest.approx(gate, abs=1e-4 * scale)


@pytest.mark.parametrize("name", ["llama", "bloom", "opt", "glm"])
def test_a_gate_s_derivative_is_that_of_a_factor_on_its_unit(name: str) -> None:
    """By autograd through the factors themselves, on every unit of a layer at once."""
    config, model = tiny_config(name), tiny_model(name)
    family = family_of(config)
    found = fms_gradients.collect(PassInputs(model, family, config, WINDOWS, 5))
    norms = activations.collect(PassInputs(model, family, config, WINDOWS, 5))
    for kind in ("kv_group", "mlp_channel"):
        unit = family.kind(config, kind)
        (part,) = (part for part in unit.slices if part.axis == 1)
        name_of = part.parameter.rpartition(".")[0]
        factors = torch.ones(unit.count, requires_grad=True)
        owner = torch.from_numpy(part.owner)
        module = family.layers(model)[1].get_submodule(name_of)
        hook = module.register_forward_pre_hook(
            lambda _, args, f=factors, o=owner: (args[0] * f[o], *args[1:])
        )
        loss = model(WINDOWS, labels=WINDOWS).loss
        hook.remove()
        (expected,) = torch.autograd.grad(loss, factors)
        scale = expected.abs().max().item()
        difference = (found[f"1.{kind}.gate"] - expected).abs().max().item()
        assert difference < 1e-4 * scale
        squares = norms[f"1.{name_of}.sum_squares"].numpy()
        assert found[f"1.{kind}.norm"].numpy() == pytest.approx(
            np.sqrt(fold(squares, part.owner, unit.count)), rel=1e-5
        )


@pytest.mark.parametrize("name", [name for name in TINY if name != "opt-post-norm"])
def test_residual_gradients_are_true_where_nothing_follows(name: str) -> None:
    """The last layer's down projection; and of earlier ones, once later layers add nothing."""
    config, model = tiny_config(name), tiny_model(name)
    family = family_of(config)
    kinds = {
        kind: next(part for part in family.kind(config, kind).slices if part.axis == 1).parameter
        for kind in ("kv_group", "mlp_channel")
    }

    def differences() -> dict[tuple[int, str], float]:
        true = fms_gradients.collect(PassInputs(model, family, config, WINDOWS, 5))
        found = fms_direct.collect(PassInputs(model, family, config, WINDOWS, 2))
        assert found["loss"].item() == pytest.approx(true["loss"].item(), rel=1e-6)
        worst = {}
        for layer in range(4):
            for kind, parameter in kinds.items():
                keys = (f"{layer}.{parameter}.fms.columns", f"{layer}.{kind}.gate")
                worst[layer, kind] = max(
                    ((found[key] - true[key]).abs().max() / true[key].abs().max()).item()
                    for key in keys
                )
                norm = f"{layer}.{kind}.norm"
                assert torch.allclose(found[norm], true[norm], rtol=1e-6)
        return worst

    before = differences()
    assert before[3, "mlp_channel"] < 1e-4
    assert min(before[3, "kv_group"], before[0, "mlp_channel"]) > 1e-2
    with torch.no_grad():
        for layer in family.layers(model)[1:]:
            for parameter in kinds.values():
                layer.get_parameter(parameter).zero_()
    assert differences()[0, "mlp_channel"] < 1e-4


def test_residual_gradients_score_output_columns_alone(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    directory = tiny_checkpoint("bloom")
    config = read_config(directory)
    family = family_of(config)
    model = load_model(directory)
    before = weights_hash(model)
    found = fms_direct.collect(PassInputs(model, family, config, WINDOWS, 5))
    assert weights_hash(model) == before
    assert all(p.requires_grad for p in model.parameters())
    streamed = fms_direct.collect(PassInputs(StreamedLayers(directory), family, config, WINDOWS, 5))
    assert all(torch.equal(streamed[key], value) for key, value in found.items())
    scores = create("mini_llm_direct", {}).scores(
        ScoringInputs(family, config, torch.zeros, {"fms_direct": found}, 0)
    )
    expected = found["1.mlp.dense_4h_to_h.weight.fms.columns"].tolist()
    assert scores["mlp_channel"][1].tolist() == pytest.approx(expected)
    with pytest.raises(InputError, match="aggregation 'sum' is not of these scores; allowed: last"):
        create("mini_llm_direct", {"aggregation": "sum"})


# ----------------------------------------------------------------------- the estimate


def directions(count: int, shape: tuple[int, ...], **settings: Any) -> torch.Tensor:
    """Whole directions through one parameter, [count, *shape], fp64."""
    made = LowRank if settings.get("perturbation") == "low_rank" else Weights
    config = tiny_config("llama")
    drawn = made(Estimator(**settings), settings.pop("seed", 0), family_of(config), config, {})
    out = torch.empty(count, math.prod(shape), dtype=torch.float64)
    for k in range(count):
        for part, numbers in drawn.chunks(k, "0.x", torch.Size(shape), "cpu"):
            out[k, part] = numbers.double()
    return out.view(count, *shape)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"distribution": "rademacher"},
        {"perturbation": "low_rank", "rank": 2},
        {"perturbation": "low_rank", "rank": 3, "distribution": "rademacher"},
    ],
)
def test_on_a_quadratic_the_mean_approaches_the_gradient_at_the_expected_rate(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perturbation, "CHUNK", 16)
    rng = torch.Generator().manual_seed(1)
    shape, count, epsilon = (6, 5), 8192, 1e-3
    half = torch.randn(30, 30, generator=rng, dtype=torch.float64) / 6
    matrix, linear = half @ half.T, torch.randn(30, generator=rng, dtype=torch.float64)
    at = torch.randn(30, generator=rng, dtype=torch.float64)

    def loss(point: torch.Tensor) -> torch.Tensor:
        return 0.5 * (point @ matrix * point).sum(-1) + point @ linear

    gradient = matrix @ at + linear
    z = directions(count, shape, **settings).view(count, 30)
    c = (loss(at + epsilon * z) - loss(at - epsilon * z)) / (2 * epsilon)
    estimates = c[:, None] * z
    errors = {
        n: (estimates.view(-1, n, 30).mean(1) - gradient).norm(dim=1).square().mean().sqrt().item()
        for n in (16, 64, 256, 1024)
    }
    for n in (16, 64, 256):
        assert errors[n] / errors[4 * n] == pytest.approx(2, rel=0.25)
    if not settings:
        # Of Gaussian directions the squared error is (d + 1) |g|^2 / n.
        assert errors[16] == pytest.approx(gradient.norm().item() * math.sqrt(31 / 16), rel=0.1)


def test_low_rank_directions_are_of_that_rank_and_isotropic() -> None:
    z = directions(4000, (6, 5), perturbation="low_rank", rank=2)
    assert (torch.linalg.matrix_rank(z[:50], rtol=1e-5) == 2).all()
    flat = z.view(4000, 30)
    assert torch.allclose(flat.T @ flat / 4000, torch.eye(30, dtype=torch.float64), atol=0.25)
    assert flat.square().mean().item() == pytest.approx(1, abs=0.05)


def stored(name: str, count: int, **options: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The estimate as one would write it at first: every direction is kept, weights are set.

    Returns the mean gradient by ``<layer>.<parameter>`` and the loss differences.
    """
    config, model = tiny_config(name), tiny_model(name)
    family = family_of(config)
    settings = Estimator(perturbations=count, **options)
    made = LowRank if settings.perturbation == "low_rank" else Weights
    drawn = made(settings, 0, family, config, {})
    layers = Layers(model, family)
    parameters = {
        f"{index}.{own}": layer.get_parameter(own)
        for index, layer in enumerate(layers.modules)
        for own in unit_parameters(family, config)
    }
    before = {key: value.detach().clone() for key, value in parameters.items()}
    mean = {key: torch.zeros_like(value) for key, value in before.items()}
    differences = []
    for k in range(count):
        z = {}
        for key, value in before.items():
            flat = torch.empty(value.numel())
            for part, numbers in drawn.chunks(k, key, value.shape, "cpu"):
                flat[part] = numbers
            z[key] = flat.view_as(value)
        losses = []
        for step in (settings.epsilon, -settings.epsilon):
            for key, value in parameters.items():
                value.data = z[key].mul(step).add(before[key])
            stream = layers.begin(WINDOWS, 5)
            for index, layer in layers.sweep():
                layers.advance(index, layer, stream)
            losses.append(layers.loss(stream))
        differences.append((losses[0] - losses[1]) / (2 * settings.epsilon))
        for key in mean:
            mean[key].add_(z[key], alpha=differences[-1] / count)
    return mean, differences


@pytest.mark.parametrize("perturbed", ["weights", "low_rank"])
@pytest.mark.parametrize("name", ["llama-bias", "llama-tied", "bloom", "opt", "glm"])
def test_regenerated_directions_give_what_stored_ones_do(
    name: str, perturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in chunks that end within parameters, layer by layer."""
    monkeypatch.setattr(perturbation, "CHUNK", 1000)
    found = estimate(name, perturbation=perturbed, perturbations=3)
    config, model = tiny_config(name), tiny_model(name)
    mean, differences = stored(name, 3, perturbation=perturbed)
    assert found["coefficients"].tolist() == [differences] * 4
    family = family_of(config)
    norms, _ = zeroth_order.input_norms(Layers(model, family), config, WINDOWS, 5, "test")
    layers = family.layers(model)
    for key, gradient in mean.items():
        weight = layers.get_parameter(key).detach()
        for label, value in fms_sums(key, gradient.mul_(weight), norms[key]).items():
            assert torch.equal(found[label], value), label


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-tied", "bloom", "opt"])
def test_weights_are_those_of_before(
    name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    model = tiny_model(name).to(dtype)
    places = {key: value.data_ptr() for key, value in model.named_parameters()}
    bits = {key: value.view(torch.uint8).clone() for key, value in model.state_dict().items()}
    # What half precision rounds away is no derivative: a longer step.
    found = estimate(name, model=model, **({"epsilon": 0.03} | options))
    assert all(value.isfinite().all() for value in found.values())
    assert found["coefficients"].abs().min() > 0
    for key, value in model.state_dict().items():
        assert torch.equal(value.view(torch.uint8), bits[key]), key
    assert {key: value.data_ptr() for key, value in model.named_parameters()} == places
    assert no_hooks(model)


def test_weights_and_hooks_are_restored_when_a_pass_fails() -> None:
    model = tiny_model("llama")
    before = weights_hash(model)
    down = model.model.layers[2].mlp.down_proj

    def fail(*_: Any) -> None:
        raise RuntimeError("as a lost device would")

    layers = Layers(model, family_of(tiny_config("llama")))
    drawn = Weights(Estimator(), 0, layers.family, tiny_config("llama"), {})
    stream = layers.begin(WINDOWS, 5)
    # Its own hooks run first: the matrix has been moved when this one fails.
    drawing = drawn.moved(2, layers.modules[2], 0, 0.1)
    drawing.__enter__()
    handle = down.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError) as caught:
        layers.advance(2, layers.modules[2], stream)
    assert weights_hash(model) != before
    assert not drawing.__exit__(RuntimeError, caught.value, None)
    handle.remove()
    assert weights_hash(model) == before
    assert no_hooks(model)
    assert "forward" not in vars(model.model.layers[0])


@pytest.mark.parametrize("name", TINY)
def test_a_walk_layer_by_layer_is_a_forward_pass(name: str) -> None:
    config, model = tiny_config(name), tiny_model(name)
    layers = Layers(model, family_of(config))
    stream = layers.begin(WINDOWS, 2)
    for index, layer in layers.sweep():
        layers.advance(index, layer, stream)
    with torch.no_grad():
        expected = model(WINDOWS, labels=WINDOWS).loss.item()
    assert layers.loss(stream) == pytest.approx(expected, rel=1e-6)
    assert layers.windows_passed == 4 * 5


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("name", ["llama", "bloom", "glm"])
def test_coefficients_are_derivatives_along_the_directions(name: str, scope: str) -> None:
    """By autograd, of all layers together or of each by itself; where no ReLU has a kink."""
    found = estimate(name, scope=scope, perturbations=2, epsilon=3e-4)["coefficients"]
    config, model = tiny_config(name), tiny_model(name)
    family = family_of(config)
    drawn = Weights(Estimator(), 0, family, config, {})
    loss = model(WINDOWS, labels=WINDOWS).loss
    by_layer = torch.zeros(4, 2, dtype=torch.float64)
    for index, layer in enumerate(family.layers(model)):
        for own in unit_parameters(family, config):
            weight = layer.get_parameter(own)
            (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
            for k in range(2):
                for part, z in drawn.chunks(k, f"{index}.{own}", weight.shape, "cpu"):
                    by_layer[index, k] += (gradient.reshape(-1)[part] * z).sum().item()
    expected = by_layer if scope == "layer" else by_layer.sum(0).expand(4, 2)
    assert torch.allclose(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize(
    "options",
    [
        {"sides": 1, "epsilon": 1e-4},
        {"minibatch": 2},
        {"minibatch": 2, "fresh": True},
        {"minibatch": 2, "fresh": True, "sides": 1, "epsilon": 1e-4},
    ],
)
def test_coefficients_are_derivatives_of_the_direction_s_own_loss(options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"epsilon": 3e-4, "perturbations": 4} | options
    found = estimate("llama", **settings)["coefficients"][0]
    config, model = tiny_config("llama"), tiny_model("llama")
    family = family_of(config)
    drawn, layers = Weights(Estimator(), 0, family, config, {}), family.layers(model)
    owned = [
        (f"{index}.{own}", layer.get_parameter(own))
        for index, layer in enumerate(layers)
        for own in unit_parameters(family, config)
    ]
    expected = []
    for k, windows in enumerate(zeroth_order._minibatches(Estimator(**settings), WINDOWS, 0)):
        assert len(windows) == options.get("minibatch", 5)
        loss = model(windows, labels=windows).loss
        gradients = torch.autograd.grad(loss, [weight for _, weight in owned])
        expected.append(
            sum(
                (gradient.reshape(-1)[part] * z).sum().item()
                for (key, weight), gradient in zip(owned, gradients, strict=True)
                for part, z in drawn.chunks(k, key, weight.shape, "cpu")
            )
        )
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert torch.allclose(found, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


def test_gates_approach_their_true_derivatives() -> None:
    config, model = tiny_config("llama"), tiny_model("llama")
    true = fms_gradients.collect(PassInputs(model, family_of(config), config, WINDOWS, 5))
    errors = []
    for count in (100, 400):
        found = estimate("llama", perturbation="gates", perturbations=count)
        keys = [key for key in found if key.endswith(".gate")]
        assert len(keys) == 8
        difference = torch.cat([found[key] - true[key] for key in keys])
        errors.append(difference.norm() / torch.cat([true[key] for key in keys]).norm())
        for key in found:
            if key.endswith(".norm"):
                assert torch.equal(found[key], true[key])
    # 172 gates, Gaussian directions: sqrt(173 / n).
    assert errors[0].item() == pytest.approx(math.sqrt(173 / 100), rel=0.3)
    assert errors[1].item() == pytest.approx(math.sqrt(173 / 400), rel=0.3)


def test_with_one_shared_direction_the_loss_cancels() -> None:
    """The ranking is that of |W| |z| ||X||, whatever the text: Wanda times noise."""
    config, model = tiny_config("llama"), tiny_model("llama")
    family = family_of(config)
    found = estimate("llama", perturbations=1)
    (factor,) = set(found["coefficients"].abs().flatten().tolist())
    norms, _ = zeroth_order.input_norms(Layers(model, family), config, WINDOWS, 5, "test")
    drawn = Weights(Estimator(), 0, family, config, {})
    noisy: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(family.layers(model)):
        for own in unit_parameters(family, config):
            key, weight = f"{index}.{own}", layer.get_parameter(own).detach()
            z = drawn.gradient(key, weight.shape, "cpu", [(0, 1.0)])
            noisy |= fms_sums(key, weight * z, norms[key])
    method = create("mini_llm", {"perturbations": 1})

    def scores(tensors: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
        given: Any = {"zeroth_order": tensors}
        return method.scores(ScoringInputs(family, config, torch.zeros, given, 0))

    estimated, control = scores(found), scores(noisy)
    for kind in estimated:
        for a, b in zip(estimated[kind], control[kind], strict=True):
            assert a / factor == pytest.approx(b, rel=1e-4)
            assert (a.argsort() == b.argsort()).all()
    # A loss difference of each layer's own makes no difference within a layer either.
    by_layer = scores(estimate("llama", perturbations=1, scope="layer"))
    for a, b in zip(by_layer["mlp_channel"], control["mlp_channel"], strict=True):
        assert (a.argsort() == b.argsort()).all()


def test_losses_side_by_side_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    together = estimate("llama", minibatch=2, fresh=True)
    monkeypatch.setattr(zeroth_order, "STREAM_BYTES", 1)
    alone = estimate("llama", minibatch=2, fresh=True)
    assert all(torch.equal(alone[key], value) for key, value in together.items())


def test_layers_that_are_spread_over_devices_are_entered_through_their_wrappers() -> None:
    """As accelerate leaves them: every layer's ``forward`` moves its arguments first."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_model("llama")
    for layer in model.model.layers:
        add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True))
    wrappers = [layer.forward for layer in model.model.layers]
    here, there = estimate("llama"), estimate("llama", model=model)
    assert all(torch.equal(there[key], value) for key, value in here.items())
    assert [layer.forward for layer in model.model.layers] == wrappers


def test_cost_is_counted_in_forward_passes() -> None:
    def passes(**options: Any) -> float:
        return estimate("llama", **options)["forward_passes"].item()

    assert passes(perturbations=3) == 1 + 6
    assert passes(perturbations=3, sides=1) == 1 + 3 + 1
    assert passes(perturbations=3, minibatch=2, fresh=True) == pytest.approx(1 + 6 * 2 / 5)
    assert passes(perturbations=3, minibatch=2, sides=1) == pytest.approx(1 + (3 + 1) * 2 / 5)
    # Behind layer l of 4 there are 4 - l to go: 2.5 passes a side; and the unchanged model again.
    assert passes(perturbations=3, scope="layer") == 1 + 6 * 2.5 + 1
    # Of one estimate, whatever the same layers were used for before.
    layers = Layers(tiny_model("llama"), family_of(tiny_config("llama")))
    assert [passes(model=layers, perturbations=2) for _ in range(2)] == [5, 5]


def test_seeds_and_minibatches_make_a_difference() -> None:
    def first(**options: Any) -> list[float]:
        found: list[float] = estimate("llama", **options)["coefficients"][0].tolist()
        return found

    assert first() == first()
    variants = [
        {},
        {"seed": 1},
        {"minibatch": 2},
        {"minibatch": 2, "fresh": True},
        {"distribution": "rademacher"},
        {"sides": 1},
    ]
    assert len({tuple(first(**options)) for options in variants}) == len(variants)
    # A shared minibatch is that of the first direction.
    assert first(minibatch=2)[0] == first(minibatch=2, fresh=True)[0]
    assert first(batch_windows=2) == pytest.approx(first(), rel=0.02)


# ------------------------------------------------------------------------- streamed layers


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2-sliding", "bloom", "opt", "glm"])
def test_streamed_layers_give_the_same_bits(
    name: str, options: dict[str, Any], tiny_checkpoint: Callable[[str], Path]
) -> None:
    directory = tiny_checkpoint(name)
    options = dict(options) | {"batch_windows": 3}
    here = estimate(name, model=load_model(directory), **options)
    streamed = StreamedLayers(directory)
    there = estimate(name, model=streamed, **options)
    assert here.keys() == there.keys()
    assert all(torch.equal(there[key], value) for key, value in here.items())
    # Nothing of the layers stays.
    assert all(p.is_meta for p in streamed.modules.parameters())


def test_streamed_layers_read_bf16_and_masked_units_as_loading_does(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    directory = tiny_checkpoint("llama")
    config = read_config(directory)
    family, rule = family_of(config), Rule(("kv_group", "mlp_channel"))
    rng = np.random.default_rng(0)
    scores = {k: [rng.random(family.kind(config, k).count)] * 4 for k in rule.kinds}
    plan = select(scores, family, config, Target("groups", 0.34), rule, {})
    model = load_model(directory, dtype="bfloat16")
    mask_model(model, config, plan)
    here = estimate("llama", model=model)
    there = estimate("llama", model=StreamedLayers(directory, dtype="bfloat16", plan=plan))
    assert all(torch.equal(there[key], value) for key, value in here.items())
    plain = estimate("llama", model=StreamedLayers(directory))
    assert plain["loss"] != here["loss"]


def test_one_block_is_in_memory_and_the_next_read_ahead(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = StreamedLayers(tiny_checkpoint("llama"))
    read: list[list[str]] = []
    ahead: list[int] = []
    plain, announce = streamed._read, streamed._announce
    monkeypatch.setattr(streamed, "_read", lambda names: read.append(names) or plain(names))
    monkeypatch.setattr(streamed, "_announce", lambda i: (ahead.append(i), announce(i)))
    for index, layer in streamed.sweep(1):
        there = [not all(p.is_meta for p in layer.parameters()) for layer in streamed.modules]
        assert there == [i == index for i in range(4)]
        # Nothing is read before its turn.
        assert [names[0].split(".")[2] for names in read] == [str(i) for i in range(1, index + 1)]
    assert ahead == [2, 3]
    assert all(p.is_meta for p in streamed.modules.parameters())


@pytest.mark.parametrize("size", [7, 1 << 20])
def test_the_bytes_of_one_layer_are_announced(
    size: int, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "ANNOUNCED_BYTES", size)
    streamed = StreamedLayers(tiny_checkpoint("llama"))
    (path,) = weight_files(tiny_checkpoint("llama"))
    announced: dict[int, bytes] = {}

    def advise(descriptor: int, start: int, count: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        assert 0 < count <= size
        announced[start] = os.pread(descriptor, count, start)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    streamed._announce(2)
    tensors = {n: t for n, t in load_file(path).items() if n.startswith("model.layers.2.")}
    places = sorted(tensors, key=lambda name: streamed._stored[name].start)
    ordered = [tensors[name].numpy().tobytes() for name in places]
    assert b"".join(announced[start] for start in sorted(announced)) == b"".join(ordered)
    read = streamed._read(tensors)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    # Elsewhere there is no such call.
    monkeypatch.delattr(os, "posix_fadvise")
    streamed._announce(2)


def test_a_file_that_ends_early_is_named(tiny_checkpoint: Callable[[str], Path]) -> None:
    streamed = StreamedLayers(tiny_checkpoint("llama"))
    stored = streamed._stored[streamed._names(3)[-1]]
    with pytest.raises(IntegrityError, match=r"model\.safetensors ends before its tensors do"):
        replace(stored, start=stored.path.stat().st_size - 2).map()


@pytest.mark.parametrize("header", [8, 9, 4095, 4096])
def test_a_tensor_is_mapped_from_wherever_it_lies(header: int, tmp_path: Path) -> None:
    path = tmp_path / "tensors"
    values = np.arange(3000, dtype=np.float32)
    path.write_bytes(b"." * header + values.tobytes() + b"after")
    stored = _Stored(path, header, values.nbytes, (30, 100), torch.float32)
    mapped = stored.map()
    assert torch.equal(mapped, torch.from_numpy(values).view(30, 100))
    assert mapped.data_ptr() % 4 == 0
    mapped.zero_()
    assert path.read_bytes()[header:-5] == values.tobytes()
    assert replace(stored, size=0, shape=(0, 7)).map().shape == (0, 7)


@pytest.mark.parametrize(
    ("shape", "found"), [(None, "missing"), ((48, 31), r"of shape \[48, 31\]")]
)
def test_a_missing_or_misshapen_weight_is_named(
    shape: tuple[int, int] | None,
    found: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    directory = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "copy")
    (path,) = weight_files(directory)
    tensors = load_file(path)
    name = "model.layers.2.mlp.up_proj.weight"
    size = list(tensors.pop(name).shape)
    if shape:
        tensors[name] = torch.zeros(shape)
    save_file(tensors, path)
    with pytest.raises(IntegrityError, match=f"{name} {re.escape(str(size))} is {found}"):
        StreamedLayers(directory)


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("mini_llm", {"perturbation": "heads"}, "'heads' is unknown; allowed: weights, low_rank"),
        ("mini_llm", {"distribution": "cauchy"}, "allowed: gaussian, rademacher"),
        ("mini_llm", {"scope": "unit"}, "scope 'unit' is unknown; allowed: model, layer"),
        ("mini_llm", {"sides": 3}, "sides 3 is unknown; allowed: 1, 2"),
        ("mini_llm", {"perturbations": 0}, "perturbations 0 given; a whole number from 1"),
        ("mini_llm", {"perturbations": 1.5}, "perturbations 1.5 given"),
        ("mini_llm", {"minibatch": -1}, "minibatch -1 given; a whole number from 0"),
        ("mini_llm", {"epsilon": 0}, "epsilon 0 given; between 0 and 1"),
        ("mini_llm", {"fresh": True}, "fresh needs a minibatch"),
        ("mini_llm", {"rank": 4}, "rank 4 given; it is of perturbation low_rank alone"),
        (
            "mini_llm",
            {"perturbation": "gates", "aggregation": "max"},
            "aggregation 'max' is not of these scores; allowed: sum",
        ),
        ("mini_llm", {"activation": False}, "activation False is not of these scores"),
        ("mini_llm", {"aggregation": "median"}, "aggregation 'median'"),
        ("mini_llm", {"strategy": "channel"}, "not of this method; allowed: block"),
        ("mini_llm_backprop", {"scored": "heads"}, "allowed: weights, gates"),
        ("mini_llm_backprop", {"epsilon": 0.1}, "unknown hyper-parameter epsilon"),
    ],
)
def test_bad_parameters_are_refused(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        create(name, parameters)
    assert "\n" not in str(caught.value)


def test_a_minibatch_larger_than_the_calibration_set_is_refused() -> None:
    with pytest.raises(InputError, match="minibatch 6 given; at most the 5 calibration windows"):
        estimate("llama", minibatch=6)


def test_non_finite_passes_say_where() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"zeroth_order: input of layer 2\.mlp\.down_proj"):
        estimate("llama", model=model)
    config = tiny_config("llama")
    with pytest.raises(NonFiniteError, match=r"fms_gradients: input of layer 2\.mlp\.down_proj"):
        fms_gradients.collect(PassInputs(model, family_of(config), config, WINDOWS, 5))


def test_noisy_wanda_reads_a_checkpoint(tiny_checkpoint: Callable[[str], Path]) -> None:
    directory = tiny_checkpoint("llama")
    config = read_config(directory)
    family = family_of(config)
    felt = activations.collect(PassInputs(load_model(directory), family, config, WINDOWS, 5))
    given = ScoringInputs(family, config, WeightReader(directory), {"activations": felt}, 3)
    for scores in create("wanda_noise", {}).scores(given).values():
        assert all((array > 0).all() for array in scores)
