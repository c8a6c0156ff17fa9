"""Hyper-parameters of a recovery, and what follows from them: steps, rates, order of items."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from prunelib.errors import InputError

if TYPE_CHECKING:
    import torch

    from prunelib.families.base import Config

# What a recipe may name instead of a model family's own modules.
ROLES = ("attention", "mlp")
SCHEDULES = ("linear", "cosine")


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
