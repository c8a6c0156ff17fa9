"""The checks that need a GPU: the same results there as on the CPU, within fp32 rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model

from prunelib.checkpoint import load_model
from prunelib.evaluation.perplexity import perplexity
from prunelib.families import family_of
from prunelib.recovery.lora import parse_recipe, recover
from prunelib.statistics import activations, fisher, gradients

pytestmark = pytest.mark.gpu
WINDOWS = torch.randint(0, 97, (6, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible here")


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2", "qwen3", "opt", "bloom", "glm"])
def test_statistics_agree(name: str) -> None:
    config = tiny_config(name)
    for module in (activations, gradients, fisher):
        here = module.collect(tiny_model(name), family_of(config), config, WINDOWS, 6)
        there = module.collect(tiny_model(name).cuda(), family_of(config), config, WINDOWS, 6)
        for key, value in here.items():
            scale = value.abs().max().item() + 1e-6
            assert (there[key] - value).abs().max().item() < 1e-3 * scale, key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_perplexity_agrees(dtype: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    here = perplexity(load_model(tiny_checkpoint("llama"), dtype=dtype), WINDOWS).perplexity
    model = load_model(tiny_checkpoint("llama"), device="cuda:0", dtype=dtype)
    there = perplexity(model, WINDOWS).perplexity
    assert there == pytest.approx(here, rel=1e-4 if dtype == "float32" else 3e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recovery_lowers_the_loss(
    dtype: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = parse_recipe(
        {"batch": 4, "max_steps": 20, "warmup_steps": 0, "length": 16, "lr": 0.02}
    )
    out = tmp_path / "out"
    out.mkdir()
    result = recover(
        load_model(tiny_checkpoint("llama"), device="cuda:0", dtype=dtype),
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
