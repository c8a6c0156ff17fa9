"""Efficiency: parameters, MACs, prefill and decode latency, peak memory."""

from __future__ import annotations

import inspect
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from prunelib.errors import InputError
from prunelib.evaluation.perplexity import causal_lm, embedding_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Above this share of the machine's CPUs used by others, a latency is not comparable.
FOREIGN_SHARE = 0.05


@dataclass(frozen=True)
class EfficiencySettings:
    """What is measured: batch, tokens of the prompt, tokens decoded, and how often.

    ``batches`` are further batch sizes, whose latencies are measured after all else.
    """

    batch: int = 1
    length: int = 128
    new_tokens: int = 32
    warmup: int = 1
    repeats: int = 5
    batches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(type(batch) is not int or batch < 1 for batch in self.batches):
            raise InputError(f"efficiency batches are {self.batches!r}; allowed: at least 1 each")
        for name, least in (
            ("batch", 1),
            ("length", 1),
            ("new_tokens", 1),
            ("warmup", 0),
            ("repeats", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"efficiency {name} is {value!r}; allowed: at least {least}")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (all parameters, parameters outside embeddings and output head); tied ones once."""
    outside = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outside |= {id(p) for p in head.parameters()}
    parameters = list(model.parameters())
    return (
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if id(p) not in outside),
    )


def _last_logits_argument(model: PreTrainedModel) -> dict[str, int]:
    """Return the argument that limits the head to the last position, where the family has one."""
    known = "logits_to_keep" in inspect.signature(causal_lm(model).forward).parameters
    return {"logits_to_keep": 1} if known else {}


def count_macs(
    model: PreTrainedModel, batch: int, length: int, *, last_logits_only: bool = False
) -> int:
    """Count the multiply-accumulates of one forward pass, matrix products only.

    Attention is counted over the full square of positions (no credit for causality), and the head
    over all positions, or over the last one as generation does. A model on the meta device is
    counted without computing anything.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = causal_lm(model)
    device = embedding_table(model).device
    ids = torch.zeros((batch, length), dtype=torch.int64, device=device)
    arguments = _last_logits_argument(model) if last_logits_only else {}
    # Without a mask, transformers looks at the values of positions; meta tensors have none.
    mask = torch.ones_like(ids)
    # The fused attention of a CPU has no formula in the counter; plain products have.
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(input_ids=ids, attention_mask=mask, use_cache=False, **arguments)
    finally:
        model.set_attn_implementation(implementation)
    flops: int = counter.get_total_flops()
    return flops // 2


def _synchronise() -> None:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)


def _timed(run: Callable[[], None]) -> float:
    _synchronise()
    begin = time.perf_counter()
    run()
    _synchronise()
    return time.perf_counter() - begin


def _timing(seconds: list[float], tokens: int) -> dict[str, Any]:
    latency = statistics.median(seconds)
    return {
        "latency_s": latency,
        "tokens_per_s": tokens / latency,
        "repeats": len(seconds),
        "all": seconds,
    }


def _prefill(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    return model(input_ids=ids, use_cache=True, **_last_logits_argument(model))


def _decode_seconds(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> float:
    """Time greedy decoding of ``new_tokens`` tokens after a prompt that is already in the cache."""
    filled = _prefill(model, prompt)
    cache, token = filled.past_key_values, filled.logits[:, -1:].argmax(-1)

    def run() -> None:
        nonlocal cache, token
        for _ in range(new_tokens):
            output = model(input_ids=token.to(prompt.device), past_key_values=cache, use_cache=True)
            cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)

    return _timed(run)


def measure_latency(
    model: PreTrainedModel, settings: EfficiencySettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure prefill and decode with a key-value cache, in seconds of wall time.

    Prefill is one pass over the prompt that fills the cache and gives the logits of the last
    position; decode is a plain greedy loop of one token per sequence and step. Repeats of the two
    alternate, so that a disturbance falls on both.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = embedding_table(model).shape[0]
    device = embedding_table(model).device
    ids = torch.randint(vocabulary, (settings.batch, settings.length), generator=generator)
    ids = ids.to(device)
    prefill: list[float] = []
    decode: list[float] = []
    with torch.inference_mode():
        for repeat in range(settings.warmup + settings.repeats):
            first = _timed(lambda: _prefill(model, ids))
            second = _decode_seconds(model, ids, settings.new_tokens)
            if repeat >= settings.warmup:
                prefill.append(first)
                decode.append(second)
    return (
        {"batch": settings.batch, "length": settings.length}
        | _timing(prefill, settings.batch * settings.length),
        {
            "batch": settings.batch,
            "prompt": settings.length,
            "new_tokens": settings.new_tokens,
        }
        | _timing(decode, settings.batch * settings.new_tokens),
    )


class PeakMemory:
    """Peak memory between ``__enter__`` and ``__exit__``; the result is in ``report``.

    On a GPU: bytes that torch's allocator held at most, summed over GPUs (kind
    ``cuda_max_allocated``). On a CPU: the highest resident size of the whole process, interpreter
    and weights included (``vmhwm``), or since the process began where the kernel does not let the
    mark be reset (``vmhwm_since_start``); ``growth_bytes`` is what the block added to the resident
    size at its start.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.report: dict[str, Any] = {}

    def __enter__(self) -> PeakMemory:
        if self.on_gpu:
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
            return self
        self.kind = "vmhwm"
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self.kind = "vmhwm_since_start"
        self.before = psutil.Process().memory_info().rss
        return self

    def __exit__(self, *exception: object) -> None:
        if self.on_gpu:
            peaks = map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))
            self.report = {"peak_bytes": sum(peaks), "kind": "cuda_max_allocated"}
            return
        peak = _high_water_mark()
        self.report = {
            "peak_bytes": peak,
            "kind": self.kind,
            "growth_bytes": max(0, peak - self.before),
        }


def _high_water_mark() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if match is None:
        raise InputError("/proc/self/status has no VmHWM: peak memory needs a Linux kernel")
    return int(match[1]) * 1024


class ForeignLoad:
    """How many CPUs other processes used between ``__enter__`` and ``__exit__``."""

    def __enter__(self) -> ForeignLoad:
        self.load_average = os.getloadavg()
        self._begin = self._read()
        return self

    @staticmethod
    def _read() -> tuple[float, float, float]:
        system, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = system.idle + getattr(system, "iowait", 0.0)
        # The kernel counts guests' time twice: in user and in guest.
        guests = getattr(system, "guest", 0.0) + getattr(system, "guest_nice", 0.0)
        return time.perf_counter(), sum(system) - idle - guests, own.user + own.system

    def __exit__(self, *exception: object) -> None:
        seconds, busy, own = (
            end - begin for begin, end in zip(self._begin, self._read(), strict=True)
        )
        self.foreign_cpus = max(0.0, (busy - own) / seconds)
        self.comparable = self.foreign_cpus <= FOREIGN_SHARE * (os.cpu_count() or 1)


def measure_efficiency(
    model: PreTrainedModel, settings: EfficiencySettings, *, dtype: torch.dtype
) -> dict[str, Any]:
    """Measure a model's size, work, speed and memory.

    Args:
        model: in eval mode, as it is deployed (adapter in place or merged).
        settings: shapes and repeats.
        dtype: of the stored weights, for ``bytes``; a CPU may compute in fp32 all the same.

    Returns:
        The figures of the efficiency artefact without hardware: ``parameters``,
        ``non_embedding_parameters``, ``bytes``, ``macs`` (``macs`` with the head at all positions,
        ``macs_last_logits`` the work that the prefill latency stands for), ``prefill``, ``decode``,
        ``memory``, ``compute_dtype``, ``conditions`` and ``comparable`` (False when other processes
        kept more than 5 % of the CPUs busy meanwhile); ``batches``, ``prefill`` and ``decode`` of
        every further batch size, where there are any. Memory and MACs are those of ``batch``.
    """
    total, inner = count_parameters(causal_lm(model))
    device = embedding_table(model).device
    with ForeignLoad() as load, PeakMemory(device) as memory:
        prefill, decode = measure_latency(model, settings)
    more: list[dict[str, Any]] = []
    comparable, foreign = load.comparable, load.foreign_cpus
    for batch in settings.batches:
        with ForeignLoad() as again:
            timings = measure_latency(model, replace(settings, batch=batch))
        more.append(dict(zip(("prefill", "decode"), timings, strict=True)))
        comparable = comparable and again.comparable
        foreign = max(foreign, again.foreign_cpus)
    shape = {"batch": settings.batch, "length": settings.length}
    return {
        "parameters": total,
        "non_embedding_parameters": inner,
        "bytes": total * dtype.itemsize,
        "macs": shape
        | {
            "macs": count_macs(model, settings.batch, settings.length),
            "macs_last_logits": count_macs(
                model, settings.batch, settings.length, last_logits_only=True
            ),
        },
        "prefill": prefill,
        "decode": decode,
        "memory": memory.report,
        "compute_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "conditions": {
            "load_average_before": list(load.load_average),
            "foreign_cpus": foreign,
        },
        "comparable": comparable,
    } | ({"batches": more} if more else {})
