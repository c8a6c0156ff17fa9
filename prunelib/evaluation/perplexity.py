"""Perplexity over fixed windows, without ever holding the full logits.

The model's body runs once over each batch of windows. The head is then applied to blocks of the
vocabulary, for all target positions of the batch at once, with a running log-sum-exp: the head's
weights are read once per batch, and one small buffer takes the place of
``[batch, length, vocabulary]`` logits.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prunelib.errors import InputError, NonFiniteError
from prunelib.evaluation.precision import fp32_compute

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

MEMORY_SHARE = 8  # the logits buffers take at most 1/8 of the full logits
# Larger batches give a CPU no faster products and push activations out of its caches.
BATCH_TOKENS = {"cpu": 1024}
GPU_BATCH_TOKENS = 16384
PROBE_TOKENS = 8
LOG_SECONDS = 10.0


@dataclass(frozen=True)
class PerplexityResult:
    """What ``perplexity`` measured.

    ``perplexity`` = exp(``nll_sum`` / ``targets``), nats, accumulated in fp64. ``window_nll`` holds
    the mean NLL of every window in order. ``logits_bytes`` is the size of the logits buffers,
    ``full_logits_bytes`` what the logits of one whole batch would take in the compute dtype.
    """

    perplexity: float
    nll_mean: float
    nll_sum: float
    targets: int
    window_nll: tuple[float, ...]
    tokens: int
    seconds: float
    logits_bytes: int
    full_logits_bytes: int


def cut_windows(
    ids: Sequence[int] | npt.NDArray[np.int64], window: int, limit: int | None = None
) -> torch.Tensor:
    """Cut one token sequence into non-overlapping windows; the tail is dropped.

    Args:
        ids: tokens of the whole text.
        window: tokens per window, at least 2.
        limit: at most so many windows, spread evenly over the text (all when None): the first
            ones would all come from the first articles.

    Returns:
        int64 ``[n, window]``.

    Raises:
        InputError: the window is too short, the limit not positive, or the text shorter than one
            window.
    """
    if window < 2:
        raise InputError(f"window is {window}; a perplexity window needs at least 2 tokens")
    if limit is not None and limit < 1:
        raise InputError(f"windows is {limit}; allowed: at least 1, or null for all")
    count = len(ids) // window
    if count == 0:
        raise InputError(
            f"the evaluation text has {len(ids)} tokens, less than one window={window}"
        )
    windows = torch.tensor(ids[: count * window], dtype=torch.int64).view(count, window)
    taken = count if limit is None else min(count, limit)
    return windows[[number * count // taken for number in range(taken)]]


def causal_lm(model: Any) -> PreTrainedModel:
    """Return the transformers model itself, with the adapter's layers in place if it has one."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    inner: PreTrainedModel = model
    return inner


def embedding_table(model: PreTrainedModel) -> torch.Tensor:
    """Return the input embedding's weights, ``[vocabulary, hidden size]``; ids go to its device."""
    weight: Any = model.get_input_embeddings().weight
    table: torch.Tensor = weight
    return table


def _head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        kind = type(head).__name__
        raise InputError(
            f"{type(model).__name__}: the output head is a {kind}, perplexity needs a plain Linear "
            "(merge an adapter that changes the head first)"
        )
    return head


def _logits_transform(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what the family does to its logits, as an in-place function.

    Known: Cohere's ``logit_scale``, Granite's ``logits_scaling`` (a divisor), Falcon-H1's
    ``lm_head_multiplier`` and the soft cap of Gemma and relatives, c * tanh(x / c).
    """
    config = config.get_text_config()
    factor = 1.0
    for name, power in (("logit_scale", 1), ("logits_scaling", -1), ("lm_head_multiplier", 1)):
        value = getattr(config, name, None)
        if value is not None:
            factor *= float(value) ** power
    cap = getattr(config, "final_logit_softcapping", None)
    cap = getattr(config, "logits_soft_cap", None) if cap is None else cap

    def transform(logits: torch.Tensor) -> torch.Tensor:
        if factor != 1.0:
            logits.mul_(factor)
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    return transform


class _ChunkedHead:
    """Target log-likelihoods of a head, block of vocabulary by block, in reused buffers."""

    def __init__(self, model: PreTrainedModel, rows: int, logits_chunk: int) -> None:
        head = _head(model)
        self.weight, self.bias = head.weight, head.bias
        self.device = self.weight.device
        self.vocabulary = self.weight.shape[0]
        self.transform = _logits_transform(model.config)
        on_cpu = self.device.type == "cpu"
        self.dtype = torch.float32 if on_cpu else self.weight.dtype
        # Half-precision products on a GPU need an fp32 copy beside them for the log-sum-exp.
        entry_bytes = 4 if self.dtype == torch.float32 else 4 + self.dtype.itemsize
        most = self.vocabulary * self.dtype.itemsize // (MEMORY_SHARE * entry_bytes)
        self.block = max(1, min(logits_chunk, most))
        self.buffer = torch.empty(rows * self.block, dtype=self.dtype, device=self.device)
        self.wide = (
            self.buffer
            if self.dtype == torch.float32
            else torch.empty_like(self.buffer, dtype=torch.float32)
        )
        self.bytes = rows * self.block * entry_bytes

    def _block_logits(self, hidden: torch.Tensor, start: int) -> torch.Tensor:
        """Return the fp32 logits of one vocabulary block, ``[rows, block]``, in the buffer."""
        weight = self.weight[start : start + self.block].to(self.dtype)
        size = hidden.shape[0] * weight.shape[0]
        raw = self.buffer[:size].view(hidden.shape[0], weight.shape[0])
        if self.bias is None:
            torch.mm(hidden, weight.t(), out=raw)
        else:
            bias = self.bias[start : start + self.block].to(self.dtype)
            torch.addmm(bias, hidden, weight.t(), out=raw)
        wide = self.wide[:size].view_as(raw)
        if wide.dtype != raw.dtype:
            wide.copy_(raw)
        return self.transform(wide)

    def nll(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return -log p(target) in fp64.

        Args:
            hidden: ``[rows, hidden size]``.
            targets: int64 ``[rows]``.
        """
        hidden = hidden.to(device=self.device, dtype=self.dtype)
        targets = targets.to(self.device).unsqueeze(1)
        rows = hidden.shape[0]
        running_max = torch.full((rows, 1), -math.inf, device=self.device)
        total = torch.zeros((rows, 1), dtype=torch.float64, device=self.device)
        chosen = torch.zeros((rows, 1), device=self.device)
        for start in range(0, self.vocabulary, self.block):
            logits = self._block_logits(hidden, start)
            column = targets - start
            inside = (column >= 0) & (column < logits.shape[1])
            value = logits.gather(1, column.clamp(0, logits.shape[1] - 1))
            chosen = torch.where(inside, value, chosen)
            maximum = torch.maximum(running_max, logits.amax(1, keepdim=True))
            total *= (running_max - maximum).double().exp()
            total += logits.sub_(maximum).exp_().sum(1, keepdim=True).double()
            running_max = maximum
        return (total.log() + running_max.double() - chosen.double()).squeeze(1)

    def probe(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return whole logits of a few rows, ``[rows, vocabulary]``, for the check below."""
        hidden = hidden.to(device=self.device, dtype=self.dtype)
        blocks = [
            self._block_logits(hidden, start).clone()
            for start in range(0, self.vocabulary, self.block)
        ]
        return torch.cat(blocks, dim=1)


@contextmanager
def _replayed(body: nn.Module, output: Any) -> Iterator[None]:
    """Let ``body`` return ``output`` inside the block instead of computing."""
    before = vars(body).get("forward")  # accelerate puts a forward on the instance
    vars(body)["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del vars(body)["forward"]
        if before is not None:
            vars(body)["forward"] = before


def _check_head(model: PreTrainedModel, head: _ChunkedHead, output: Any, ids: torch.Tensor) -> None:
    """Refuse a model whose own logits are not what body, head and known scalings give.

    A few positions that the body has already computed go through the model's own forward; whatever
    a family does to its logits that is not known here shows up as a difference.

    Args:
        model: the causal language model.
        head: what is checked.
        output: the body's output for a batch.
        ids: that batch, int64 ``[batch, length]``.
    """
    hidden = output[0][:1, :PROBE_TOKENS]
    # Families that reach into the body rather than call it compute these positions again.
    with _replayed(_body(model), type(output)(last_hidden_state=hidden)):
        logits = model(input_ids=ids[:1, :PROBE_TOKENS], use_cache=False).logits
    expected = logits[0].float().to(head.device)
    ours = head.probe(hidden[0])
    tolerance = 1e-3 if head.dtype == torch.float32 else 3e-2
    worst = (ours - expected).abs().max().item()
    scale = expected.abs().max().item()
    # NaN compares false both ways: it is reported as non-finite later, by window.
    if ours.shape != expected.shape or worst > tolerance * max(scale, 1e-6):
        raise InputError(
            f"{type(model).__name__} changes its logits in a way that the perplexity evaluator "
            f"does not know (difference {worst:.3g} at logits up to {scale:.3g})"
        )


def _check_windows(model: PreTrainedModel, windows: torch.Tensor) -> None:
    if windows.dtype != torch.int64 or windows.dim() != 2 or windows.shape[1] < 2:
        raise InputError(
            f"windows are {windows.dtype} {list(windows.shape)}; needed: int64 [n, length >= 2]"
        )
    if windows.shape[0] == 0:
        raise InputError("no perplexity windows were given; at least 1 is needed")
    rows = embedding_table(model).shape[0]
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= rows:
        raise InputError(
            f"token ids {low}..{high} do not fit the model's {rows} embeddings: another tokenizer?"
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and windows.shape[1] > longest:
        raise InputError(
            f"window is {windows.shape[1]} tokens; the model allows {longest} positions"
        )


def _body(model: PreTrainedModel) -> nn.Module:
    body: nn.Module = model.base_model
    if body is model:
        raise InputError(f"{type(model).__name__} has no body apart from its head")
    return body


def _finite_windows(nll: torch.Tensor, first: int) -> None:
    bad = (~torch.isfinite(nll)).nonzero()
    if bad.numel():
        raise NonFiniteError(f"the NLL of perplexity window {first + int(bad[0])} is not finite")


def perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    batch_tokens: int | None = None,
    logits_chunk: int = 2048,
) -> PerplexityResult:
    """Measure perplexity on fixed windows: the first token of each is context, the rest targets.

    Works for causal language models of transformers on a CPU, a GPU, or sharded over several GPUs
    (the head runs where its weights are). Half-precision weights on a CPU are computed in fp32.

    Args:
        model: in eval mode; an adapter's layers may be in place.
        windows: int64 ``[n, length]``.
        batch_tokens: tokens per batch of windows (at least one window is taken); None for the
            device's default.
        logits_chunk: vocabulary entries per block at most; it is lowered until the buffers take
            1/8 of a batch's full logits.

    Raises:
        InputError: windows that do not fit the model, or a model that changes its logits in an
            unknown way.
        NonFiniteError: the NLL of a window is not finite, or the perplexity overflows.
    """
    model = causal_lm(model)
    if model.training:
        raise InputError("the model is in training mode; perplexity needs model.eval()")
    _check_windows(model, windows)
    device = embedding_table(model).device
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(device.type, GPU_BATCH_TOKENS)
    if batch_tokens < 1 or logits_chunk < 1:
        raise InputError(
            f"batch_tokens={batch_tokens}, logits_chunk={logits_chunk}; allowed: at least 1"
        )
    count, length = windows.shape
    batch = min(count, max(1, batch_tokens // length))
    body = _body(model)
    takes_cache = "use_cache" in inspect.signature(body.forward).parameters
    arguments = {"use_cache": False} if takes_cache else {}
    window_nll: list[float] = []
    with torch.inference_mode(), fp32_compute(model):
        head = _ChunkedHead(model, batch * (length - 1), logits_chunk)
        begin = last_log = time.perf_counter()
        for first in range(0, count, batch):
            ids = windows[first : first + batch].to(device)
            output = body(input_ids=ids, **arguments)
            hidden = output[0]
            if first == 0:
                _check_head(model, head, output, ids)
            rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
            nll = head.nll(rows, ids[:, 1:].reshape(-1)).view(ids.shape[0], length - 1)
            means = nll.mean(1).cpu()
            _finite_windows(means, first)
            window_nll += means.tolist()
            now = time.perf_counter()
            if now - last_log > LOG_SECONDS:
                last_log = now
                rate = len(window_nll) / (now - begin)
                logger.info(
                    "perplexity: %d of %d windows, %.0f tokens/s, %.0f s left",
                    len(window_nll),
                    count,
                    rate * length,
                    (count - len(window_nll)) / rate,
                )
        seconds = time.perf_counter() - begin
    targets = count * (length - 1)
    nll_sum = math.fsum(window_nll) * (length - 1)
    mean = nll_sum / targets
    try:
        value = math.exp(mean)
    except OverflowError as error:
        raise NonFiniteError(f"a mean NLL of {mean:.4g} nats overflows the perplexity") from error
    return PerplexityResult(
        perplexity=value,
        nll_mean=mean,
        nll_sum=nll_sum,
        targets=targets,
        window_nll=tuple(window_nll),
        tokens=count * length,
        seconds=seconds,
        logits_bytes=head.bytes,
        full_logits_bytes=batch * length * head.vocabulary * head.dtype.itemsize,
    )
