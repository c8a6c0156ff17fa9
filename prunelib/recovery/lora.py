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
import fnmatch
import hashlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prunelib.errors import InputError, NonFiniteError, PrunelibError
from prunelib.families.base import VIRTUAL
from prunelib.recovery.adapters import TRAINED, shared_parameters
from prunelib.recovery.parallel import ALONE, Processes
from prunelib.recovery.state import TrainingState, jsonl, load_state, save_state

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from prunelib.families.base import Config
    from prunelib.recovery.data import Batch, Items, TrainingData

logger = logging.getLogger(__name__)

# What a recipe may name instead of a model family's own modules.
ROLES = ("attention", "mlp")
SCHEDULES = ("linear", "cosine")
_LOG_SECONDS = 10.0
# A state's name of a stream's tokens that are in no window yet.
_WAITING = "stream.waiting"


@dataclass(frozen=True)
class LoraRecipe:
    """Hyper-parameters of a LoRA recovery run; the defaults are LLM-Pruner's.

    Fixed and not configurable: AdamW, no biases trained. Gradients are accumulated over the
    ``batch / micro_batch`` passes of an optimiser step.

    Attributes:
        r: rank of the adapters.
        alpha: the adapters' output is scaled by ``alpha / r``.
        dropout: probability of dropping an input of an adapter.
        targets: names of the linear layers that get an adapter, or their roles (``ROLES``); may be
            empty where ``train`` is not.
        train: patterns (``*.gain``) of the names of parameters that are trained themselves, in
            fp32; the output layer's are refused.
        lr: peak learning rate.
        batch: windows (or examples) per optimiser step.
        micro_batch: windows per forward and backward pass.
        processes: data parallel processes, on GPUs one for each; ``batch`` is a multiple of
            ``micro_batch`` times it, and stays the batch of all together. Another number adds the
            gradients up in another order and draws other dropout masks.
        epochs: passes over the windows, where neither ``max_steps`` nor ``tokens`` is given.
        max_steps: optimiser steps.
        tokens: token budget of windows of plain text: the run ends with the first step that reaches
            it; at most one of ``max_steps`` and ``tokens`` is given.
        warmup_steps: the rate rises linearly over these (step 0 has rate 0, as in the Trainer).
        schedule: how the rate falls to 0 after the warm-up, linearly or along half a cosine.
        betas: AdamW's decay rates of the first and second moment.
        eps: AdamW's denominator term.
        weight_decay: AdamW's decoupled weight decay.
        clip_norm: the gradients' global L2 norm is clipped to it.
        length: tokens per window; longer examples are cut off (LLM-Pruner's cutoff length).
        save_every: optimiser steps between two saved states.
        eval_every: optimiser steps between two looks at the validation part; the best adapter by
            its loss is kept. None keeps the last adapter.
        kept_lora: whether a model whose layers share weights gets LoRA adapters, too, on the
            matrices that it has of its own. What is trained there in any case are the sharing
            layers' adapters and gains.

    Raises:
        InputError: a value is out of its range.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ROLES
    train: tuple[str, ...] = ()
    lr: float = 1e-4
    batch: int = 64
    micro_batch: int = 4
    processes: int = 1
    epochs: int = 2
    max_steps: int | None = None
    tokens: int | None = None
    warmup_steps: int = 100
    schedule: str = "linear"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    length: int = 256
    save_every: int = 50
    eval_every: int | None = None
    kept_lora: bool = False

    def __post_init__(self) -> None:
        for name in ("r", "alpha", "batch", "micro_batch", "processes", "epochs", "save_every"):
            _check(name, getattr(self, name), int, lambda value: value >= 1, "an integer >= 1")
        _check("length", self.length, int, lambda value: value >= 2, "an integer >= 2")
        _check("warmup_steps", self.warmup_steps, int, lambda value: value >= 0, "an integer >= 0")
        for name in ("max_steps", "tokens", "eval_every"):
            if (steps := getattr(self, name)) is not None:
                _check(name, steps, int, lambda value: value >= 1, "an integer >= 1 or null")
        for name in ("lr", "eps", "clip_norm"):
            _check(name, getattr(self, name), float, lambda value: value > 0, "a number > 0")
        decay = self.weight_decay
        _check("weight_decay", decay, float, lambda value: value >= 0, "a number >= 0")
        _check("dropout", self.dropout, float, lambda value: 0 <= value < 1, "a number in [0, 1)")
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"recovery recipe: schedule is {self.schedule!r}; allowed: {', '.join(SCHEDULES)}"
            )
        if self.max_steps is not None and self.tokens is not None:
            raise InputError(
                f"recovery recipe: max_steps is {self.max_steps} and tokens is {self.tokens}; "
                "allowed: one of them"
            )
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise InputError(f"recovery recipe: betas is {self.betas!r}; allowed: two numbers")
        for beta in self.betas:
            _check("betas", beta, float, lambda value: 0 <= value < 1, "numbers in [0, 1)")
        if not (_are_names(self.targets) and (self.targets or self.train)):
            raise InputError(
                f"recovery recipe: targets is {self.targets!r}; "
                f"allowed: different roles ({', '.join(ROLES)}) or names of linear layers"
            )
        if not _are_names(self.train):
            raise InputError(
                f"recovery recipe: train is {self.train!r}; allowed: different patterns of the "
                "names of parameters"
            )
        if not isinstance(self.kept_lora, bool):
            raise InputError(
                f"recovery recipe: kept_lora is {self.kept_lora!r}; allowed: true, false"
            )
        if self.batch % (self.micro_batch * self.processes):
            times = f" times processes {self.processes}" if self.processes > 1 else ""
            raise InputError(
                f"recovery recipe: batch {self.batch} is not a multiple of "
                f"micro_batch {self.micro_batch}{times}"
            )


def _are_names(value: Any) -> bool:
    """Whether this is a tuple of different texts."""
    return (
        isinstance(value, tuple)
        and all(isinstance(name, str) and name for name in value)
        and len(set(value)) == len(value)
    )


def _check(name: str, value: Any, kind: type, holds: Any, allowed: str) -> None:
    kinds = (int, float) if kind is float else (int,)
    whole = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not (whole and holds(value)):
        raise InputError(f"recovery recipe: {name} is {value!r}; allowed: {allowed}")


def parse_recipe(values: Mapping[str, Any]) -> LoraRecipe:
    """Return the recipe that a catalogue entry or a request describes.

    Raises:
        InputError: a key is unknown or a value is out of its range.
    """
    known = {field.name for field in fields(LoraRecipe)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(
            f"recovery recipe: unknown key {unknown[0]!r}; allowed: {', '.join(sorted(known))}"
        )
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    return LoraRecipe(**given)


def linear_targets(recipe: LoraRecipe, config: Config) -> tuple[str, ...]:
    """Return the names of the linear layers that get an adapter, roles resolved.

    Args:
        recipe: the recipe.
        config: config.json of the model, pruned or not.
    """
    if not set(ROLES) & set(recipe.targets):
        return recipe.targets
    from prunelib.checkpoint import family_of_config, unpruned_config

    # Every layer has the same modules, whatever their widths.
    plain = unpruned_config(dict(config))
    family = family_of_config(plain)
    names: list[str] = []
    for target in recipe.targets:
        names += family.linears(plain, target) if target in ROLES else (target,)
    return tuple(dict.fromkeys(names))


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


def steps_per_epoch(count: int, recipe: LoraRecipe) -> int:
    """Return the optimiser steps that read ``count`` items once; the last may be smaller."""
    return math.ceil(count / recipe.batch)


def total_steps(count: int | None, recipe: LoraRecipe) -> int:
    """Return the optimiser steps of a run over ``count`` items (windows, for a token budget).

    Args:
        count: None for a stream, which has no end that one could count on.
        recipe: the recipe.

    Raises:
        InputError: the recipe counts the epochs of a stream.
    """
    if recipe.max_steps is not None:
        return recipe.max_steps
    if count is None:
        if recipe.tokens is None:
            raise InputError(
                "recovery recipe: neither tokens nor max_steps is given, and a streamed text has "
                "no epochs; allowed: one of the two"
            )
        return math.ceil(recipe.tokens / (recipe.batch * recipe.length))
    if recipe.tokens is None:
        return recipe.epochs * steps_per_epoch(count, recipe)
    # The last step of an epoch is smaller.
    epochs, rest = divmod(math.ceil(recipe.tokens / recipe.length), count)
    return epochs * steps_per_epoch(count, recipe) + math.ceil(rest / recipe.batch)


def learning_rate(step: int, steps: int, recipe: LoraRecipe) -> float:
    """Return the rate of 0-based ``step`` out of ``steps``: linear warm-up, then down to 0."""
    if step < recipe.warmup_steps:
        return recipe.lr * step / recipe.warmup_steps
    left, span = max(0, steps - step), max(1, steps - recipe.warmup_steps)
    if recipe.schedule == "cosine":
        return recipe.lr * (1 - math.cos(math.pi * left / span)) / 2
    return recipe.lr * left / span


def batch_indices(step: int, count: int, recipe: LoraRecipe, seed: int) -> torch.Tensor:
    """Return the items of 0-based ``step``: int64 ``[at most batch]``.

    Every epoch is a permutation of all items drawn from (seed, epoch), so that the position in
    the data is a function of the step alone.
    """
    import torch

    epoch, position = divmod(step, steps_per_epoch(count, recipe))
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    order = torch.randperm(count, generator=generator)
    return order[position * recipe.batch : (position + 1) * recipe.batch]


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
        adapted = _with_adapters(model, recipe)
        for itself in own.values():
            itself.data = itself.data.float()
            itself.requires_grad_(True)
        if recipe.targets:
            fuse(adapted)
        trainable = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        _check_head(model)
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
            loss = _step(
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
                value = _validation_loss(model, validation, recipe, place, processes)
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


def own_parameters(model: PreTrainedModel, recipe: LoraRecipe) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained themselves, by their names in the plain model.

    That is what ``recipe.train`` names, and adapters and gains of layers that share weights.

    Raises:
        InputError: a pattern matches none, or the output layer, whose loss takes it as frozen.
    """
    found = shared_parameters(model)
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    named = dict(model.named_parameters())
    for pattern in recipe.train:
        names = fnmatch.filter(named, pattern)
        if not names:
            raise InputError(
                f"recovery recipe: train {pattern!r} matches no parameter of this "
                f"{model.config.model_type} model"
            )
        for name in names:
            if id(named[name]) in head:
                raise InputError(
                    f"recovery recipe: train {pattern!r} matches {name} of the output layer; "
                    "allowed: other parameters"
                )
            found[name] = named[name]
    return found


def _with_adapters(model: PreTrainedModel, recipe: LoraRecipe) -> Any:
    """Return the peft model: base frozen, adapters in fp32 with B = 0, so that it is unchanged.

    Without targets it is the model itself, frozen; also where layers share weights, whose own
    adapters are trained, unless the recipe wants both.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from prunelib.checkpoint import family_of_config

    if not recipe.targets or (shared_parameters(model) and not recipe.kept_lora):
        return model.requires_grad_(False)
    layers = family_of_config(model.config.to_dict()).layers(model)
    linears = {
        name.rpartition(".")[2]
        for name, module in layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    targets = linear_targets(recipe, model.config.to_dict())
    missing = [target for target in targets if target not in linears]
    if missing:
        raise InputError(
            f"recovery recipe: target {missing[0]!r} matches no linear layer of this "
            f"{model.config.model_type} model; allowed: {', '.join(sorted(linears))}"
        )
    if VIRTUAL in model.config.to_dict():
        # Some layers have modules of these names that are no linear layers.
        targets = tuple(
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets
        )
    config = LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _hidden_states(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the decoder's last hidden states, ``[batch, length, hidden_size]``."""
    place = cast("torch.Tensor", model.get_input_embeddings().weight).device
    given = {} if mask is None else {"attention_mask": mask.to(place)}
    hidden: torch.Tensor = model.base_model(input_ids=ids.to(place), use_cache=False, **given)[0]
    return hidden


def _autocast(model: PreTrainedModel, device: torch.device) -> Any:
    """Keep fp32 adapters and bf16 base weights in one precision on a GPU."""
    import torch

    weights = cast("torch.Tensor", model.get_input_embeddings().weight)
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.bfloat16, enabled=weights.dtype == torch.bfloat16)


def _check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are more than its output layer (soft caps, scales)."""
    import torch

    inputs = cast("torch.Tensor", model.get_input_embeddings().weight)
    ids = torch.arange(min(8, len(inputs)), device=inputs.device)[None]
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        head = model.get_output_embeddings()
        ours = head(_hidden_states(model, ids).to(head.weight.device))
    # A NaN is not this check's business: the first loss will name it.
    if not torch.allclose(ours, logits.to(ours.device), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise InputError(
            f"recovery: a {model.config.model_type} model changes its logits after the output "
            "layer; this is not supported"
        )


def _step(
    model: PreTrainedModel,
    trainable: Mapping[str, torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
    batches: Sequence[Batch],
    recipe: LoraRecipe,
    device: torch.device,
    number: int,
    kept: str,
    processes: Processes = ALONE,
) -> float:
    """Do one optimiser step over ``batches``; return its mean loss in nats per target.

    Each process goes through its share of the batches; loss and gradients are those of all.
    """
    import torch

    from prunelib.recovery.loss import frozen_head_loss

    head = model.get_output_embeddings()
    targets = sum(batch.targets for batch in batches)
    total = 0.0
    optimiser.zero_grad(set_to_none=True)
    for batch in processes.share(batches):
        with _autocast(model, device):
            hidden, wanted = batch.predictions(_hidden_states(model, batch.ids, batch.mask))
            loss = frozen_head_loss(hidden, head, wanted) / targets
        total += float(loss.detach())
        if not math.isfinite(total):
            break
        loss.backward()
    # All processes come here, whatever their losses, and then agree on what to do.
    (total,) = processes.total([total], device)
    if not math.isfinite(total):
        raise NonFiniteError(f"recovery: the loss is {total} at step {number}; {kept}")
    if processes.count > 1:
        for parameter in trainable.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        processes.add(p.grad for p in trainable.values() if p.grad is not None)
    norm = float(torch.nn.utils.clip_grad_norm_(trainable.values(), recipe.clip_norm))
    if not math.isfinite(norm):
        bad = next(
            (n for n, p in trainable.items() if p.grad is not None and not p.grad.isfinite().all()),
            "(the norm overflows)",
        )
        raise NonFiniteError(
            f"recovery: the gradient of {bad} is not finite at step {number}; {kept}"
        )
    optimiser.step()
    return total


def _validation_loss(
    model: PreTrainedModel,
    data: Items,
    recipe: LoraRecipe,
    device: torch.device,
    processes: Processes,
) -> float:
    """Return the mean negative log-likelihood of the validation part, in nats per target."""
    import torch

    from prunelib.recovery.loss import head_loss

    head = model.get_output_embeddings()
    total, targets = 0.0, 0
    model.eval()
    with torch.no_grad(), _autocast(model, device):
        parts = torch.arange(len(data)).split(recipe.micro_batch)
        for batch in (b for part in processes.share(parts) for b in data.batches(part, len(part))):
            hidden, wanted = batch.predictions(_hidden_states(model, batch.ids, batch.mask))
            total += head_loss(hidden, head, wanted)
            targets += batch.targets
    model.train()
    total, count = processes.total([total, targets], device)
    return total / count


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
