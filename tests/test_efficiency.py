from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prunelib.errors import InputError
from prunelib.evaluation.efficiency import (
    EfficiencySettings,
    ForeignLoad,
    count_macs,
    count_parameters,
    measure_efficiency,
)

LAYERS, HIDDEN, HEADS, GROUPS, HEAD_DIM, MLP, VOCABULARY = 3, 32, 4, 2, 8, 24, 101
# Weights of one layer: q and o, k and v, three of the MLP.
LINEARS = 2 * HIDDEN * HEADS * HEAD_DIM + 2 * HIDDEN * GROUPS * HEAD_DIM + 3 * HIDDEN * MLP


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**(config | changes))).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_by_hand(tied: bool) -> None:
    inner = LAYERS * (LINEARS + 2 * HIDDEN) + HIDDEN
    tables = VOCABULARY * HIDDEN * (1 if tied else 2)
    assert count_parameters(llama(tie_word_embeddings=tied)) == (inner + tables, inner)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_macs_by_hand(attention: str, device: str) -> None:
    model = llama(attn_implementation=attention).to(device)
    batch, length = 2, 16
    tokens = batch * length
    scores_and_values = 2 * batch * HEADS * length**2 * HEAD_DIM
    body = LAYERS * (tokens * LINEARS + scores_and_values)
    head = HIDDEN * VOCABULARY
    assert count_macs(model, batch, length) == body + tokens * head
    assert count_macs(model, batch, length, last_logits_only=True) == body + batch * head
    assert model.config._attn_implementation == attention


def test_macs_of_an_adapter_count_its_products() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["o_proj"]))
    extra = 16 * LAYERS * 2 * (HEADS * HEAD_DIM + HIDDEN)
    assert count_macs(adapted, 1, 16) == count_macs(llama(), 1, 16) + extra


def test_measured_figures_hang_together() -> None:
    calls: list[tuple[int, int]] = []
    model = llama()
    model.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    settings = EfficiencySettings(batch=2, length=16, new_tokens=3, warmup=1, repeats=2)
    figures = measure_efficiency(model, settings, dtype=torch.bfloat16)
    # Per repeat: a prefill, then a prompt and three steps of one token; two counted passes.
    assert calls == [(2, 16), (2, 16), (2, 1), (2, 1), (2, 1)] * 3 + [(2, 16)] * 2
    prefill, decode = figures["prefill"], figures["decode"]
    for part, tokens in ((prefill, 32), (decode, 6)):
        assert part["repeats"] == len(part["all"]) == 2
        assert part["latency_s"] == pytest.approx(sum(part["all"]) / 2)
        assert part["tokens_per_s"] == pytest.approx(tokens / part["latency_s"])
    assert (decode["prompt"], decode["new_tokens"]) == (16, 3)
    assert figures["bytes"] == 2 * figures["parameters"]
    assert figures["compute_dtype"] == "float32"
    assert figures["memory"]["kind"] in ("vmhwm", "vmhwm_since_start")
    assert isinstance(figures["comparable"], bool)
    json.dumps(figures)


def test_further_batch_sizes_are_measured_behind_the_first() -> None:
    calls: list[tuple[int, int]] = []
    model = llama()
    model.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    settings = EfficiencySettings(1, 4, new_tokens=1, warmup=0, repeats=1, batches=(2, 3))
    figures = measure_efficiency(model, settings, dtype=torch.float32)
    sizes = [(n, tokens) for n in (1, 2, 3) for tokens in (4, 4, 1)]
    assert calls == [*sizes, (1, 4), (1, 4)]
    for batch, timings in zip((2, 3), figures["batches"], strict=True):
        prefill, decode = timings["prefill"], timings["decode"]
        assert prefill["batch"] == decode["batch"] == batch
        assert prefill["tokens_per_s"] == pytest.approx(4 * batch / prefill["latency_s"])
        assert decode["tokens_per_s"] == pytest.approx(batch / decode["latency_s"])
    assert (figures["prefill"]["batch"], figures["macs"]["batch"]) == (1, 1)
    with pytest.raises(InputError, match="batches"):
        EfficiencySettings(batches=(2, 0))


def test_peak_memory_sees_a_block_that_is_gone() -> None:
    # In a process of its own: where much has been freed before, the block takes no new memory.
    code = """
import torch
from prunelib.evaluation.efficiency import PeakMemory
with PeakMemory(torch.device("cpu")) as memory:
    block = torch.ones(16 * 1024**2)
    del block
print(memory.report["kind"], memory.report.get("growth_bytes"))
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    kind, growth = run.stdout.split()
    if kind != "vmhwm":
        pytest.skip("the kernel does not let the high-water mark be reset")
    assert 60 * 1024**2 < int(growth) < 100 * 1024**2


def test_foreign_load_sees_another_process_and_not_our_own() -> None:
    def busy(other: bool) -> float:
        code = "import time\nend = time.time() + 30\nwhile time.time() < end: pass"
        process = subprocess.Popen([sys.executable, "-c", code]) if other else None
        try:
            with ForeignLoad() as load:
                total = sum(i * i for i in range(6_000_000))
            assert total
        finally:
            if process:
                process.kill()
                process.wait()
        return load.foreign_cpus

    assert busy(other=True) > 0.3
    # Other work on the test machine may come and go: only an idle machine can show a low figure.
    if os.getloadavg()[0] < 0.5:
        assert busy(other=False) < 0.5


@pytest.mark.parametrize("field", ["batch", "length", "new_tokens", "repeats", "warmup"])
def test_impossible_settings_are_refused(field: str) -> None:
    with pytest.raises(InputError, match=field):
        EfficiencySettings(**{field: -1})


def test_step_writes_metrics(tmp_path: Path) -> None:
    from prunelib.provenance.step import StepRequest
    from workflow_scripts.efficiency import main

    model = llama()
    model.save_pretrained(tmp_path / "model")
    params = {
        "batch": 1,
        "length": 8,
        "new_tokens": 2,
        "warmup": 0,
        "repeats": 1,
        "hardware_class": "laptop",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
    }
    out = tmp_path / "out"
    out.mkdir()
    inputs = {"checkpoint": tmp_path / "model"}
    request = StepRequest("efficiency", "k", params, inputs, out, (), ())
    main(request, out)
    figures = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert figures["hardware_class"] == "laptop"
    assert figures["parameters"] == count_parameters(model)[0]
    assert figures["hardware"]["threads"] == 1
    assert "batches" not in figures
    main(StepRequest("efficiency", "k", params | {"batches": [2]}, inputs, out, (), ()), out)
    figures = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert [one["decode"]["batch"] for one in figures["batches"]] == [2]
    del params["hardware_class"]
    with pytest.raises(InputError, match="hardware_class is missing"):
        main(request, out)
