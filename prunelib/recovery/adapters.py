"""Putting what recovery stored on a model, trusting nothing in its directory.

That is a LoRA adapter, new values of parameters that were trained themselves, or both. Only tensors
in safetensors and a handful of numbers from ``adapter_config.json`` are used: the base model that
the config names is ignored, pickled weights are refused, and no code is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunelib.errors import InputError, IntegrityError, NonFiniteError
from prunelib.provenance import artefact

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TRAINED = "trained.safetensors"

# What the config may say freely: the shape of the adapter, and labels that change no number.
_READ = ("r", "lora_alpha", "lora_dropout", "target_modules")
_LABELS = (
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)


def load_recovered(
    checkpoint: Path, adapter: Path | None, *, device: str = "cpu", dtype: str = "float32"
) -> PreTrainedModel:
    """Load a checkpoint with its recovery adapter, where there is one, in eval mode.

    Files are checked against their provenance.

    Raises:
        InputError: not a checkpoint or not an adapter of it.
        IntegrityError: a file is not what its provenance says.
    """
    from prunelib.checkpoint import load_model

    model = load_model(checkpoint, device=device, dtype=dtype)
    if adapter is None:
        return model
    if (adapter / artefact.RECORD).is_file():
        artefact.verify(adapter)
    recovered: PreTrainedModel = attach(model, adapter).eval()
    return recovered


def attach(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Return ``model`` with the adapter in ``adapter`` active, in eval mode.

    The model is changed in place: its target layers become peft layers.

    Args:
        model: the adapter's base model, loaded from its own checkpoint.
        adapter: directory with ``adapter_config.json`` and ``adapter_model.safetensors``, with
            ``trained.safetensors``, or with all of them.

    Raises:
        InputError: the directory holds no plain LoRA adapter, or holds pickled weights.
        IntegrityError: the tensors cannot be read or do not fit the model.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    adapted = _load(model, adapter)
    attached: PreTrainedModel = model if adapted is None else adapted.get_base_model()
    attached.eval()
    return attached


def merge(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Return ``model`` with the adapter added into its weights (W + alpha / r * B A).

    Args:
        model: the adapter's base model; changed in place.
        adapter: the adapter's directory.

    Raises:
        InputError, IntegrityError, NonFiniteError: as in `attach`.
    """
    adapted = _load(model, adapter)
    merged: PreTrainedModel = model if adapted is None else adapted.merge_and_unload()
    for name, parameter in merged.named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteError(f"{adapter}: merging gives non-finite values in {name}")
    merged.eval()
    return merged


def shared_parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Return what recovery trains of layers that share weights, by name in the model.

    The factors of their adapters and their gains; norms and biases stay as they are.
    """
    from prunelib.families.modeling_shared import SharedLinear

    found: dict[str, torch.nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, SharedLinear):
            own = {"A": module.A, "B": module.B, "gain": module.gain}
            found |= {f"{name}.{key}": value for key, value in own.items() if value is not None}
    return found


def _load(model: PreTrainedModel, adapter: Path) -> Any:
    """Return the peft model, or None where there are only parameters that were trained."""
    from peft import get_peft_model, set_peft_model_state_dict

    if (adapter / "adapter_model.bin").exists():
        raise InputError(
            f"{adapter}: adapter_model.bin is a pickle and is refused; allowed: {WEIGHTS}"
        )
    shared = shared_parameters(model)
    if shared and not (adapter / TRAINED).is_file():
        raise IntegrityError(f"{adapter}: {TRAINED} is missing")
    if (adapter / TRAINED).is_file():
        _set_trained(model, adapter / TRAINED, shared)
        if not (adapter / WEIGHTS).exists() and not (adapter / CONFIG).exists():
            return None
    if not (adapter / WEIGHTS).is_file():
        raise IntegrityError(f"{adapter}: {WEIGHTS} is missing")
    config = _config(adapter / CONFIG)
    tensors = _tensors(adapter / WEIGHTS)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _check_shapes(found, _expected(model, config), adapter / WEIGHTS)
    adapted = get_peft_model(model, config)
    set_peft_model_state_dict(adapted, tensors)
    return adapted


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return a file's tensors, all finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise IntegrityError(f"{path}: not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFiniteError(f"{path}: {name} holds NaN or infinity")
    return tensors


def _set_trained(model: PreTrainedModel, path: Path, needed: Iterable[str]) -> None:
    """Give the parameters in ``path`` their trained values, in the model's own precision.

    Args:
        model: the model.
        path: the file.
        needed: names that must be in it.
    """
    import torch

    tensors, parameters = _tensors(path), dict(model.named_parameters())
    names = {*(name for name in tensors if name in parameters), *needed}
    expected = {name: tuple(parameters[name].shape) for name in names}
    _check_shapes({name: tuple(t.shape) for name, t in tensors.items()}, expected, path)
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _config(path: Path) -> LoraConfig:
    """Return peft's config built from the few fields that are read; refuse all that go further."""
    from peft import LoraConfig

    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise IntegrityError(f"{path.parent}: {path.name} is missing") from error
    except ValueError as error:
        raise IntegrityError(f"{path}: not JSON: {error}") from error
    if not isinstance(stored, dict) or stored.get("peft_type") != "LORA":
        raise InputError(f"{path}: not the config of a LoRA adapter")
    # Through JSON, as the stored one went.
    plain = json.loads(json.dumps(LoraConfig().to_dict(), default=sorted))
    for key, value in stored.items():
        if key in _READ or key in _LABELS:
            continue
        # A field that this version of peft does not know must be off.
        if value != plain[key] if key in plain else value:
            raise InputError(f"{path}: {key} = {value!r} is not supported; allowed: plain LoRA")
    rank, alpha, targets = (stored.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if type(rank) is not int or type(alpha) is not int or rank < 1:
        raise InputError(f"{path}: r {rank!r}, lora_alpha {alpha!r}; allowed: integers, r >= 1")
    # A string would be a regular expression run over every module's name.
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise InputError(f"{path}: target_modules is {targets!r}; allowed: a list of names")
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        inference_mode=True,
        task_type="CAUSAL_LM",
    )


def _expected(model: PreTrainedModel, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Return the tensors that the adapter of this model must have: name -> shape."""
    import torch

    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        # As peft matches them: a whole name, or how it ends.
        ends = tuple(f".{target}" for target in (config.target_modules or ()))
        if isinstance(module, torch.nn.Linear) and f".{name}".endswith(ends):
            prefix = f"base_model.model.{name}"
            shapes[f"{prefix}.lora_A.weight"] = (config.r, module.in_features)
            shapes[f"{prefix}.lora_B.weight"] = (module.out_features, config.r)
    return shapes


def _check_shapes(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], path: Path
) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise IntegrityError(
                f"{path}: does not fit the model: tensor {name} is "
                f"{_shape(found.get(name))}, the model needs {_shape(expected.get(name))}"
            )
    if not found:
        raise IntegrityError(f"{path}: holds no tensors")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
