"""LoRA recovery: low-rank adapters trained on text or instructions, with a resumable loop.

The default values are LLM-Pruner's (Ma et al. 2023, appendix B and its public training script),
which ran on the Trainer of transformers; what that left unsaid are the Trainer's defaults: AdamW
with betas (0.9, 0.999), eps 1e-8 and weight decay 0, linear decay to 0 after a linear warm-up,
gradients clipped to norm 1. With instructions and ``eval_every`` (`prunelib.recovery.data`) the run
is LLM-Pruner's, with four differences: the precision is bf16 or fp32 and not fp16; a step's loss is
the mean over its targets, not the mean of its micro-batches' means; padding stands on the right,
which changes no target's context; and the last step is validated, too.

On a CPU a run that was killed and resumed ends with the same bytes as an unbroken one: everything
that it depends on is either in the saved state (`prunelib.recovery.state`) or a function of the
seed and the step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunelib.errors import InputError, NonFiniteError, PrunelibError
from prunelib.recovery.adapters import TRAINED
from prunelib.recovery.parallel import ALONE, Processes
from prunelib.recovery.recipe import (
    LoraRecipe,
    learning_rate,
    total_steps,
)
from prunelib.recovery.state import TrainingState, jsonl, load_state, save_state
from prunelib.recovery.step import check_head, train_step, validation_loss
from prunelib.recovery.trainable import own_parameters, with_adapters

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from prunelib.recovery.data import Items, TrainingData

logger = logging.getLogger(__name__)

_LOG_SECONDS = 10.0
# A state's name of a stream's tokens that are in no window yet.
_WAITING = "stream.waiting"


@dataclass(frozen=True)
class RecoveryResult:
    """What a recovery run did.

    Attributes:
        steps: optimiser steps of the whole run.
        tokens: tokens read in the whole run, without padding.
        useful_share: share of tokens, not padding, in the positions computed.
        trainable_parameters: parameters of the adapters, and those trained themselves.
        first_loss: mean negative log-likelihood of the first step, in nats per token.
        last_loss: the same of the last step.
        resumed_from: steps that were taken over from a saved state (0: none).
        seconds: wall-clock time of the steps that this call ran.
        tokens_per_second: training throughput of this call (0 where it ran no step).
        best_step: the step whose adapter was written; None without validation.
        best_validation_loss: its mean negative log-likelihood on the validation part, in nats per
            target; None without validation.
    """

    steps: int
    tokens: int
    useful_share: float
    trainable_parameters: int
    first_loss: float
    last_loss: float
    resumed_from: int
    seconds: float
    tokens_per_second: float
    best_step: int | None = None
    best_validation_loss: float | None = None


def recover(
    model: PreTrainedModel,
    data: TrainingData | torch.Tensor,
    recipe: LoraRecipe,
    *,
    seed: int,
    state: Path,
    out: Path,
    device: str,
    dtype: str,
    base: str,
    validation: Items | None = None,
    processes: Processes = ALONE,
) -> RecoveryResult:
    """Train LoRA adapters of ``model`` on ``data`` and write them to ``out`` (Hu et al. 2021).

    Written: ``adapter_model.safetensors`` and ``adapter_config.json`` (peft's format),
    ``trained.safetensors`` where parameters are trained themselves (their new values; those of
    layers that share weights take the place of LoRA adapters),
    ``loss.jsonl`` (per optimiser step: step from 1, mean loss in nats per target, learning rate,
    tokens read and positions computed so far, which padding is part of, and the validation loss
    where it was taken) and ``meta.json``. With
    validation the adapter is the best one, the earliest of equals. The same inputs give the same
    bytes on a CPU, whether or not the run was interrupted.

    Args:
        model: the causal language model; it is changed in place (frozen, with adapters).
        data: what to train on; a tensor is packed windows, int64 ``[n, recipe.length]``.
        recipe: hyper-parameters.
        seed: seeds the adapters' initial values, dropout and the order of the data.
        state: directory of the resumable state; a fitting state found there is continued.
        out: directory that gets the adapter; made if it is missing.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` (`Processes.device` of several).
        dtype: ``float32`` or ``bfloat16``, of the frozen weights and on a GPU of the matrix
            products; adapters, moments and loss are always fp32. On a CPU bf16 weights are widened
            and everything is computed in fp32.
        base: the base checkpoint's path relative to the adapter's final directory.
        validation: what ``recipe.eval_every`` looks at.
        processes: of the run, ``recipe.processes`` of them, each of which calls this function with
            the same arguments; the main one reads a stream, saves and writes.

    Raises:
        InputError: data, targets, device, dtype or ``base`` do not fit.
        NonFiniteError: a loss or a gradient is NaN or infinite; the last state is kept.
    """
    import torch

    from prunelib.device import resolve_device, resolve_dtype
    from prunelib.recovery.data import Examples, PackedWindows, StreamedWindows
    from prunelib.recovery.fused import fuse

    if isinstance(data, torch.Tensor):
        data = PackedWindows(data)
    if (validation is None) != (recipe.eval_every is None):
        given = "no validation part" if validation is None else "a validation part"
        raise InputError(
            f"recovery recipe: eval_every is {recipe.eval_every!r} with {given}; "
            "allowed: both or neither"
        )
    if Path(base).is_absolute():
        raise InputError(f"recovery: base {base!r} is absolute; allowed: a relative path")
    if processes.count != recipe.processes:
        raise InputError(
            f"recovery recipe: processes is {recipe.processes}; the run has {processes.count}"
        )
    place, weights_dtype = resolve_device(device), resolve_dtype(dtype)
    parts = [data, *([validation] if validation is not None else [])]
    for part in parts:
        part.check(recipe.length, model.config.get_text_config().vocab_size)
    if recipe.tokens is not None and isinstance(data, Examples):
        raise InputError(
            f"recovery recipe: tokens is {recipe.tokens} with {data.kind}; allowed: null, "
            "since only windows of plain text have a fixed number of tokens"
        )
    steps = total_steps(data.count, recipe)
    streamed = data if isinstance(data, StreamedWindows) else None
    if recipe.warmup_steps >= steps:
        logger.warning(
            "warm-up of %d steps in a run of %d: the rate never reaches its peak",
            recipe.warmup_steps,
            steps,
        )
    gpus: Sequence[int] = ()
    if place.type == "cuda":
        gpus = range(torch.cuda.device_count()) if processes.count == 1 else [place.index]
    with torch.random.fork_rng(devices=gpus), _termination() as terminated:
        torch.manual_seed(seed)
        _place(model, place, weights_dtype)
        identity = _identity(model, parts, recipe, seed, place, dtype)
        own = own_parameters(model, recipe)
        adapted = with_adapters(model, recipe)
        for itself in own.values():
            itself.data = itself.data.float()
            itself.requires_grad_(True)
        if recipe.targets:
            fuse(adapted)
        trainable = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        check_head(model, place)
        optimiser = torch.optim.AdamW(
            trainable.values(),
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
        )
        if not processes.main:
            # Adapters are the same everywhere; dropout is not.
            torch.manual_seed(_mixed(seed, processes.rank))
        losses: list[Mapping[str, Any]] = []
        best: dict[str, torch.Tensor] = {}
        resumed = load_state(state, identity)
        if resumed is not None:
            best = _restore(resumed, trainable, optimiser, gpus, processes.rank)
            losses = list(resumed.losses)
            if streamed is not None:
                streamed.seek(resumed.place or {}, resumed.tensors[_WAITING])
            logger.info("resumed after step %d of %d from %s", resumed.step, steps, state)
        start, begun = len(losses), time.monotonic()
        if processes.total([start], place) != [start * processes.count]:
            raise PrunelibError(f"recovery: not all processes could read the state in {state}")
        last_log, saved = begun, start
        adapted.train()
        for step in range(start, steps):
            kept = f"state of step {saved} kept in {state}" if saved else "no state was saved yet"
            rate = learning_rate(step, steps, recipe)
            picked = _picked(data, step, recipe, seed, processes, place)
            batches = list(data.batches(picked, recipe.micro_batch))
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss = train_step(
                model, trainable, optimiser, batches, recipe, place, step + 1, kept, processes
            )
            before = losses[-1] if losses else {"tokens": 0, "positions": 0}
            row = {
                "step": step + 1,
                "loss": loss,
                "lr": rate,
                "tokens": before["tokens"] + sum(batch.tokens for batch in batches),
                "positions": before["positions"] + sum(batch.ids.numel() for batch in batches),
            }
            if validation is not None and _validates(step + 1, steps, recipe):
                value = validation_loss(model, validation, recipe, place, processes)
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"recovery: the validation loss is {value} at step {step + 1}; {kept}"
                    )
                logger.info("step %d of %d, validation loss %.4f", step + 1, steps, value)
                so_far = _best(losses)
                if so_far is None or value < so_far["validation_loss"]:
                    best = {name: p.detach().clone() for name, p in trainable.items()}
                row["validation_loss"] = value
            losses.append(row)
            ends = processes.total([len(terminated)], place)[0] > 0
            if (step + 1) % recipe.save_every == 0 or step + 1 == steps or ends:
                tensors = _generators(gpus, processes, place)
                tensors |= _tensors(trainable, optimiser, best)
                if streamed is not None:
                    tensors[_WAITING] = streamed.waiting
                read = streamed.place if streamed else None
                if processes.main:
                    save_state(state, TrainingState(step + 1, tensors, losses, read), identity)
                saved = step + 1
            if ends and step + 1 < steps:
                logger.warning("terminated; state of step %d of %d is saved", saved, steps)
                raise _Terminated
            late = time.monotonic() - last_log >= _LOG_SECONDS
            if processes.main and (late or step + 1 == steps):
                last_log = time.monotonic()
                _report(losses, start, steps, last_log - begun)
        seconds = time.monotonic() - begun
        result = _result(losses, start, seconds, sum(p.numel() for p in trainable.values()))
        with torch.no_grad():
            for name, parameter in best.items():
                trainable[name].copy_(parameter)
        if processes.main:
            _write(out, adapted, own, recipe, seed, losses, result, identity, base, data)
    return result


def _mixed(seed: int, rank: int) -> int:
    """Return the seed of another process's dropout."""
    digest = hashlib.sha256(f"{seed}:process {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _picked(
    data: TrainingData,
    step: int,
    recipe: LoraRecipe,
    seed: int,
    processes: Processes,
    device: torch.device,
) -> torch.Tensor:
    """Return what 0-based ``step`` reads; a stream is read by the main process alone."""
    import torch

    if data.count is not None:
        return data.pick(step, recipe, seed)
    if processes.main:
        windows = data.pick(step, recipe, seed)
    else:
        windows = torch.empty(recipe.batch, recipe.length, dtype=torch.int64)
    return processes.from_main(windows, device)


def _validates(step: int, steps: int, recipe: LoraRecipe) -> bool:
    """Whether the adapter after ``step`` (from 1) of ``steps`` is validated."""
    return recipe.eval_every is not None and (step % recipe.eval_every == 0 or step == steps)


def _best(losses: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the line of the lowest validation loss, the earliest of equals."""
    rows = [row for row in losses if "validation_loss" in row]
    return min(rows, key=lambda row: row["validation_loss"], default=None)


class _Terminated(BaseException):
    """SIGTERM arrived and the state is saved; `_termination` turns it back into the signal."""


@contextlib.contextmanager
def _termination() -> Iterator[list[int]]:
    """Hold SIGTERM back while training; the list yielded is no longer empty once it arrived.

    After the state is saved the signal is raised again for whoever handled it before, so that the
    process ends as it would have ended without this function.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    stopped = False
    try:
        yield received
    except _Terminated:
        stopped = True
    finally:
        signal.signal(signal.SIGTERM, previous)
        if received:
            os.kill(os.getpid(), signal.SIGTERM)
    if stopped:
        raise SystemExit(128 + signal.SIGTERM)


def _place(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Move the model and set its weights' dtype; buffers (rotary tables) keep their own."""
    import torch

    if not getattr(model, "hf_device_map", None):
        model.to(device)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        if device.type == "cpu":
            # bf16 products are 5 to 160 times slower than fp32 on a CPU without bf16 units.
            parameter.data = parameter.data.to(torch.float32)


def _identity(
    model: PreTrainedModel,
    parts: Sequence[TrainingData],
    recipe: LoraRecipe,
    seed: int,
    device: torch.device,
    dtype: str,
) -> dict[str, Any]:
    """Return all that a saved state must share with this run to be continued by it.

    The base model is identified by its shapes and 1,024 evenly spread values of each weight:
    enough to tell two prunings apart without hashing gigabytes.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy().tobytes())
    return {
        "recipe": asdict(recipe),
        "seed": seed,
        **dict(zip((parts[0].kind, "validation"), (part.sha256 for part in parts), strict=False)),
        "base": digest.hexdigest(),
        "device": device.type,
        "dtype": dtype,
        # The number of threads changes the order of sums on a CPU only.
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__.split("+")[0],
    }


def _generators(
    gpus: Sequence[int], processes: Processes, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the states of all random generators: of each process, and of each GPU."""
    import torch

    tensors = {}
    for rank, state in enumerate(processes.collect(torch.get_rng_state(), device)):
        tensors[f"rng.{rank}.cpu" if rank else "rng.cpu"] = state
    for index in gpus:
        states = processes.collect(torch.cuda.get_rng_state(index), device)
        for rank, state in enumerate(states):
            tensors[f"rng.cuda.{index if processes.count == 1 else rank}"] = state
    return tensors


def _tensors(
    trainable: Mapping[str, torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
    best: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the tensors of a state: parameters, moments, the best so far."""
    tensors = {}
    for name, parameter in trainable.items():
        tensors[f"parameter.{name}"] = parameter.detach().cpu()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = optimiser.state[parameter][key].detach().cpu()
    return tensors | {f"best.{name}": parameter.cpu() for name, parameter in best.items()}


def _restore(
    state: TrainingState,
    trainable: Mapping[str, torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
    gpus: Sequence[int],
    rank: int,
) -> dict[str, torch.Tensor]:
    """Set parameters, moments and generators; return the best parameters so far, if any."""
    import torch

    tensors = state.tensors
    moments = {}
    with torch.no_grad():
        for index, (name, parameter) in enumerate(trainable.items()):
            parameter.copy_(tensors[f"parameter.{name}"])
            moments[index] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": moments, "param_groups": groups})
    torch.set_rng_state(tensors[f"rng.{rank}.cpu" if rank else "rng.cpu"])
    for index in gpus:
        torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"], index)
    best = {name: f"best.{name}" for name in trainable}
    return {name: tensors[key] for name, key in best.items() if key in tensors}


def _report(losses: Sequence[Mapping[str, Any]], start: int, steps: int, seconds: float) -> None:
    done, last = len(losses) - start, losses[-1]
    before = losses[start - 1]["tokens"] if start else 0
    logger.info(
        "step %d of %d, loss %.4f, %.0f tokens/s, %.0f s left",
        last["step"],
        steps,
        last["loss"],
        (last["tokens"] - before) / max(seconds, 1e-9),
        seconds / done * (steps - last["step"]),
    )


def _result(
    losses: Sequence[Mapping[str, Any]], start: int, seconds: float, parameters: int
) -> RecoveryResult:
    tokens = losses[-1]["tokens"]
    ours = tokens - (losses[start - 1]["tokens"] if start else 0)
    best = _best(losses)
    return RecoveryResult(
        steps=len(losses),
        tokens=tokens,
        useful_share=tokens / losses[-1]["positions"],
        trainable_parameters=parameters,
        first_loss=losses[0]["loss"],
        last_loss=losses[-1]["loss"],
        resumed_from=start,
        seconds=seconds,
        tokens_per_second=ours / max(seconds, 1e-9),
        best_step=best["step"] if best else None,
        best_validation_loss=best["validation_loss"] if best else None,
    )


def _write(
    out: Path,
    adapted: Any,
    own: Mapping[str, torch.nn.Parameter],
    recipe: LoraRecipe,
    seed: int,
    losses: Sequence[Mapping[str, Any]],
    result: RecoveryResult,
    identity: Mapping[str, Any],
    base: str,
    data: TrainingData,
) -> None:
    from peft import PeftModel

    out.mkdir(parents=True, exist_ok=True)
    lora = isinstance(adapted, PeftModel)
    if lora:
        _write_adapter(out, adapted, base)
    trained = {}
    if own:
        _save_tensors(own, out / TRAINED)
        trained = {"trained": sorted(own)}
    validated = {}
    if result.best_step is not None:
        validated = {
            "best_step": result.best_step,
            "best_validation_loss": result.best_validation_loss,
            "validation_losses": [
                {"step": row["step"], "loss": row["validation_loss"]}
                for row in losses
                if "validation_loss" in row
            ],
            "validation_sha256": identity["validation"],
        }
    (out / "loss.jsonl").write_text(jsonl(losses), encoding="utf-8")
    _write_json(
        out / "meta.json",
        {
            "method": "lora" if lora else "trained",
            "recipe": asdict(recipe),
            "seed": seed,
            "dtype": identity["dtype"],
            "steps": result.steps,
            "tokens": result.tokens,
            "useful_share": result.useful_share,
            "trainable_parameters": result.trainable_parameters,
            "first_loss": result.first_loss,
            "last_loss": result.last_loss,
            **data.record(),
            **validated,
            **trained,
            "base": Path(base).name,
        },
    )


def _write_adapter(out: Path, adapted: Any, base: str) -> None:
    from peft import get_peft_model_state_dict

    # Not `save_pretrained`: it writes a model card and, unless told, asks the hub about embeddings.
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    _save_tensors(tensors, out / "adapter_model.safetensors")
    config = adapted.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    _write_json(out / "adapter_config.json", config)


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    # Sets have an order of their own in every process.
    text = json.dumps(value, indent=2, sort_keys=True, default=sorted)
    path.write_text(text + "\n", encoding="utf-8")
