from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from prunelib.errors import InputError, NonFiniteError
from prunelib.evaluation import perplexity as module
from prunelib.evaluation.perplexity import cut_windows, perplexity
from prunelib.evaluation.precision import fp32_compute

VOCABULARY = 101
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SHAPE | changes))).eval()


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(VOCABULARY, (7, 12), generator=torch.Generator().manual_seed(1))


def naive(model: Any, windows: torch.Tensor) -> list[float]:
    """Mean NLL per window from full fp64 logits, one target at a time."""
    model = model.double()
    with torch.no_grad():
        logits = model(windows).logits
    means = []
    for row, ids in zip(logits, windows.tolist(), strict=True):
        log_p = row - torch.log(torch.exp(row - row.max()).sum(-1, keepdim=True)) - row.max()
        means.append(-sum(float(log_p[i, ids[i + 1]]) for i in range(len(ids) - 1)) / 11)
    return means


def opt() -> Any:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            init_std=0.3,
            pad_token_id=0,
        )
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(),
    "tied": lambda: llama(tie_word_embeddings=True),
    "opt, projected": opt,
    "soft cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0)
    ),
    "logit scale": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)),
    "logits divided": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch_tokens", "chunk"), [(1, 5), (36, 2048)])
def test_equals_a_naive_fp64_computation(
    family: str, batch_tokens: int, chunk: int, windows: torch.Tensor
) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    result = perplexity(model, windows, batch_tokens=batch_tokens, logits_chunk=chunk)
    expected = naive(model, windows)
    assert result.window_nll == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(sum(expected) / 7), rel=1e-6)
    assert (result.targets, result.tokens) == (77, 84)
    assert result.nll_sum == pytest.approx(11 * sum(expected), rel=1e-6)


def test_soft_cap_and_scales_change_the_number(windows: torch.Tensor) -> None:
    # Guards the test above: the transforms must matter on these models.
    for family, name in (("soft cap", "final_logit_softcapping"), ("logit scale", "logit_scale")):
        torch.manual_seed(0)
        model = FAMILIES[family]().eval()
        before = perplexity(model, windows).nll_mean
        setattr(model.config, name, 1.0)
        if hasattr(model, name):
            setattr(model, name, 1.0)
        assert abs(perplexity(model, windows).nll_mean - before) > 1e-2


def test_a_uniform_model_has_the_vocabulary_as_perplexity(windows: torch.Tensor) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = perplexity(model, windows)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-13)
    assert result.window_nll == pytest.approx([math.log(VOCABULARY)] * 7, rel=1e-14)


def test_large_logits_do_not_overflow(windows: torch.Tensor) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    result = perplexity(model, windows)
    assert result.window_nll == pytest.approx(naive(model, windows), rel=1e-5)
    assert result.nll_mean > 100  # exp() of these logits overflows fp32


def test_logits_buffers_are_an_eighth_at_most(
    windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0
    original = torch.mm

    def watched(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, out.untyped_storage().nbytes())
        return original(left, right, out=out)

    monkeypatch.setattr(module.torch, "mm", watched)
    result = perplexity(llama(), windows, batch_tokens=36)
    assert result.full_logits_bytes == 3 * 12 * VOCABULARY * 4
    assert largest == result.logits_bytes
    assert 0 < largest <= result.full_logits_bytes / 8


def test_bf16_weights_on_a_cpu_are_computed_in_fp32(windows: torch.Tensor) -> None:
    model = llama().to(torch.bfloat16)
    parameters = dict(model.named_parameters())
    copies = {name: parameter.clone() for name, parameter in parameters.items()}
    result = perplexity(model, windows)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, copies[name])
    # Equal to fp32 arithmetic on the rounded weights: bf16 activations would be 1e-2 off.
    assert result.window_nll == pytest.approx(perplexity(model.float(), windows).window_nll, 1e-6)


def test_fp32_compute_gives_parameters_back_after_an_error() -> None:
    model = llama().to(torch.bfloat16)
    parameters = dict(model.named_parameters())
    with pytest.raises(IndexError), fp32_compute(model):
        model(torch.tensor([[VOCABULARY]]))
    with pytest.raises(RuntimeError), fp32_compute(model):
        model.model.layers[0].mlp(torch.zeros(1, 5))
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_adapter_is_evaluated(windows: torch.Tensor) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(llama(), config).eval()
    result = perplexity(adapted, windows)
    assert result.window_nll == pytest.approx(naive(adapted, windows), rel=1e-6)
    assert abs(result.nll_mean - perplexity(llama(), windows).nll_mean) > 1e-4


def test_unknown_logits_are_refused(windows: torch.Tensor) -> None:
    class Odd(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.01
            return output

    torch.manual_seed(0)
    with pytest.raises(InputError, match="Odd changes its logits"):
        perplexity(Odd(LlamaConfig(**SHAPE)).eval(), windows)


def test_non_finite_names_the_window(windows: torch.Tensor) -> None:
    model = llama()
    windows[windows == 50] = 51
    windows[4, 3] = 50
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = math.nan
    with pytest.raises(NonFiniteError, match="window 4 is not finite"):
        perplexity(model, windows, batch_tokens=36)


def test_overflowing_perplexity_is_an_error(windows: torch.Tensor) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    with pytest.raises(NonFiniteError, match="overflows"):
        perplexity(model, windows)


def test_bad_input_is_refused(windows: torch.Tensor) -> None:
    model = llama()
    for bad, message in (
        (windows.float(), "int64"),
        (windows[:, :1], "length >= 2"),
        (windows[:0], "at least 1"),
        (windows + VOCABULARY, "another tokenizer"),
        (windows.repeat(1, 6), "allows 64 positions"),
    ):
        with pytest.raises(InputError, match=message):
            perplexity(model, bad)
    with pytest.raises(InputError, match="batch_tokens=0"):
        perplexity(model, windows, batch_tokens=0)
    with pytest.raises(InputError, match="training mode"):
        perplexity(model.train(), windows)


def test_windows_do_not_overlap_and_the_tail_is_dropped() -> None:
    assert cut_windows(range(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_windows(range(11), 4, 1).tolist() == [[0, 1, 2, 3]]
    # A limit takes windows from the whole text.
    assert cut_windows(range(18), 4, 2).tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    for ids, window, limit in ((range(3), 4, None), (range(9), 1, None), (range(9), 4, 0)):
        with pytest.raises(InputError):
            cut_windows(ids, window, limit)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_agrees_with_cpu(dtype: torch.dtype, windows: torch.Tensor) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    model = llama().to(dtype)
    expected = perplexity(model, windows).window_nll
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert perplexity(model.cuda(), windows).window_nll == pytest.approx(expected, rel=tolerance)
