"""The checks that need a GPU: the same results there as on the CPU, within fp32 rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from test_flexigpt import plan_of

from prunelib import checkpoint
from prunelib.checkpoint import load_model
from prunelib.evaluation.perplexity import perplexity
from prunelib.families import family_of
from prunelib.recovery.lora import recover
from prunelib.recovery.recipe import parse_recipe
from prunelib.statistics import (
    activations,
    fisher,
    fms_direct,
    fms_gradients,
    gradients,
    zeroth_order,
)
from prunelib.statistics.inputs import PassInputs

pytestmark = pytest.mark.gpu
WINDOWS = torch.randint(0, 97, (6, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible here")


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2", "qwen3", "opt", "bloom", "glm"])
def test_statistics_agree(name: str) -> None:
    config = tiny_config(name)
    for module in (activations, gradients, fisher, fms_gradients, fms_direct):
        here = module.collect(PassInputs(tiny_model(name), family_of(config), config, WINDOWS, 6))
        there = module.collect(
            PassInputs(tiny_model(name).cuda(), family_of(config), config, WINDOWS, 6)
        )
        for key, value in here.items():
            scale = value.abs().max().item() + 1e-6
            assert (there[key] - value).abs().max().item() < 1e-3 * scale, key


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_gates_are_moved_alike(name: str) -> None:
    """Their directions are the same on every device."""
    config = tiny_config(name)
    family, options = family_of(config), {"seed": 0, "perturbation": "gates", "epsilon": 0.01}
    here, there = (
        zeroth_order.collect(PassInputs(model, family, config, WINDOWS, 6), **options)
        for model in (tiny_model(name), tiny_model(name).cuda())
    )
    for key in ("coefficients", "1.mlp_channel.gate", "2.kv_group.norm"):
        scale = here[key].abs().max().item()
        assert (there[key] - here[key]).abs().max().item() < 1e-2 * scale, key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("perturbation", ["weights", "low_rank"])
def test_streamed_layers_give_the_same_bits(
    dtype: str, perturbation: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    directory = tiny_checkpoint("llama")
    config = tiny_config("llama")
    options = {"seed": 0, "perturbations": 3, "perturbation": perturbation, "epsilon": 0.03}
    model = load_model(directory, device="cuda:0", dtype=dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    here, there = (
        zeroth_order.collect(PassInputs(source, family_of(config), config, WINDOWS, 6), **options)
        for source in (
            model,
            zeroth_order.StreamedLayers(directory, device="cuda:0", dtype=dtype),
        )
    )
    assert all(torch.equal(there[key], value) for key, value in here.items())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_perplexity_agrees(dtype: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    here = perplexity(load_model(tiny_checkpoint("llama"), dtype=dtype), WINDOWS).perplexity
    model = load_model(tiny_checkpoint("llama"), device="cuda:0", dtype=dtype)
    there = perplexity(model, WINDOWS).perplexity
    assert there == pytest.approx(here, rel=1e-4 if dtype == "float32" else 3e-2)


@pytest.mark.parametrize("method", ["plain", "shared"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recovery_lowers_the_loss(
    dtype: str, method: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = parse_recipe(
        {"batch": 4, "max_steps": 20, "warmup_steps": 0, "length": 16, "lr": 0.02}
    )
    source = tiny_checkpoint("llama")
    if method == "shared":
        plan = plan_of(tiny_config("llama"), {1: 3})
        checkpoint.prune_checkpoint(source, plan, tmp_path / "shared")
        source = tmp_path / "shared"
    out = tmp_path / "out"
    out.mkdir()
    result = recover(
        load_model(source, device="cuda:0", dtype=dtype),
        WINDOWS.repeat(4, 1),
        recipe,
        seed=0,
        state=tmp_path / "state",
        out=out,
        device="cuda:0",
        dtype=dtype,
        base="../base",
    )
    assert result.last_loss < result.first_loss


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs are visible here")
def test_layers_spread_over_two_gpus_give_the_same_perplexity(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    here = perplexity(load_model(tiny_checkpoint("llama")), WINDOWS).perplexity
    model = load_model(tiny_checkpoint("llama"), device="cuda")
    assert perplexity(model, WINDOWS).perplexity == pytest.approx(here, rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs are visible here")
def test_layers_spread_over_two_gpus_give_the_same_statistics(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    """Gates' directions are the same on every device; weights' are not."""
    config = tiny_config("llama")
    family, gates = family_of(config), {"seed": 0, "perturbation": "gates", "epsilon": 0.01}
    here, there = (
        load_model(tiny_checkpoint("llama")),
        load_model(tiny_checkpoint("llama"), device="cuda"),
    )
    assert len({parameter.device for parameter in there.parameters()}) == 2
    for module, options, tolerance in (
        (fms_gradients, {}, 1e-3),
        (fms_direct, {}, 1e-3),
        (zeroth_order, gates, 1e-2),
    ):
        expected, found = (
            module.collect(PassInputs(model, family, config, WINDOWS, 6), **options)
            for model in (here, there)
        )
        for key, value in expected.items():
            scale = value.abs().max().item() + 1e-6
            assert (found[key] - value).abs().max().item() < tolerance * scale, key
