"""Checkpoints: safetensors, config.json, tokenizer, plan.json. Never a pickle, never remote code.

A pruned checkpoint loads by ``AutoModelForCausalLM.from_pretrained``: without remote code where
all layers are equal, else with the modelling file that is saved beside the weights. A block whose
weights several layers use is stored once, with what those layers add. This library
itself builds every model from its own classes and does not execute a file found beside weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunelib.device import resolve_device, resolve_dtype
from prunelib.errors import InputError, IntegrityError
from prunelib.families import family_of
from prunelib.families.base import VIRTUAL, check_virtual
from prunelib.plan import FILE_NAME as PLAN_FILE
from prunelib.plan import Plan
from prunelib.provenance import artefact
from prunelib.surgery import HEAD, pad_tensors, prune_tensors, pruned_config, zero_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from prunelib.families.base import Family

SHARD_BYTES = 4 * 1024**3
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
TIED_NAMES = (HEAD,)


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint as data.

    Raises:
        InputError: the directory or its config.json is missing or not JSON.
    """
    path = directory / "config.json"
    if not directory.is_dir():
        raise InputError(f"model directory {directory} does not exist")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; not a checkpoint directory") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    return config


def family_of_config(config: dict[str, Any]) -> Family:
    """Return the family of a checkpoint's config, pruned or not."""
    return family_of(unpruned_config(config) | {"per_layer_config": None, VIRTUAL: None})


def unpruned_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config whose ``model_type`` names the family's unpruned architecture."""
    return config | {"model_type": str(config["model_type"]).removeprefix("pruned_")}


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, in order.

    Raises:
        InputError: there are none (weights in any other format are not read).
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if Path(name).name != name:
            raise IntegrityError(f"{index}: shard {name!r} points outside the directory")
        if not (directory / name).is_file():
            raise InputError(f"{directory}: {name} is missing; only safetensors weights are read")
    return [directory / name for name in names]


def read_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name in the whole model, tensor) of a checkpoint, reading one tensor at a time."""
    from safetensors import safe_open

    family = family_of_config(read_config(directory))
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield family.full_name(name), file.get_tensor(name)


class WeightReader:
    """Random access to single tensors of a checkpoint by name; nothing is kept in memory.

    An artefact's files are verified before the first tensor is read.
    """

    def __init__(self, directory: Path) -> None:
        self._paths = weight_files(directory)
        self._family = family_of_config(read_config(directory))

    @cached_property
    def _where(self) -> dict[str, tuple[Any, str]]:
        from safetensors import safe_open

        directory = self._paths[0].parent
        if (directory / artefact.RECORD).is_file():
            artefact.verify(directory, [path.name for path in self._paths])
        files = [safe_open(path, framework="pt") for path in self._paths]
        return {
            self._family.full_name(name): (file, name)
            for file in files
            for name in file.keys()  # noqa: SIM118
        }

    def __call__(self, name: str) -> torch.Tensor:
        """Return the tensor ``name``; raises InputError when the checkpoint does not have it."""
        if name not in self._where:
            raise InputError(f"the checkpoint has no tensor {name!r}")
        file, stored = self._where[name]
        tensor: torch.Tensor = file.get_tensor(stored)
        return tensor


class MaskedReader:
    """Reads the tensors of a checkpoint as they are with the units that a plan removes at zero."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self._read = WeightReader(directory)
        self._plan = plan
        self._config = read_config(directory)
        self._family = family_of(self._config)

    def __call__(self, name: str) -> torch.Tensor:
        """Return the tensor ``name``; raises InputError when the checkpoint does not have it."""
        named = [(name, self._read(name))]
        ((_, tensor),) = zero_tensors(named, self._family, self._config, self._plan)
        return tensor


def mask_model(model: PreTrainedModel, config: dict[str, Any], plan: Plan) -> None:
    """Set the units that ``plan`` removes to zero in place; widths stay.

    What is measured of the other units is then what the pruned model would give.

    Args:
        model: the unpruned model.
        config: its config.json.
        plan: a plan for it.
    """
    state = model.state_dict()
    for name, tensor in zero_tensors(state.items(), family_of(config), config, plan):
        if tensor is not state[name]:
            state[name].copy_(tensor)


def read_plan(directory: Path) -> Plan:
    """Return the plan of a pruned checkpoint, verified."""
    artefact.verify(directory, [PLAN_FILE])
    return Plan.load(directory)


def write_tensors(tensors: Iterable[tuple[str, torch.Tensor]], out: Path) -> int:
    """Write tensors as one safetensors file, or as shards of at most 4 GiB with an index.

    Holds one shard in memory. Returns the number of elements written.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    current: dict[str, torch.Tensor] = {}
    size = elements = total = 0

    def flush() -> None:
        nonlocal current, size
        save_file(current, out / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(current))
        current, size = {}, 0

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if current and size + nbytes > SHARD_BYTES:
            flush()
        current[name] = tensor.contiguous()
        size += nbytes
        total += nbytes
        elements += tensor.numel()
    flush()
    if len(shards) == 1:
        (out / "shard-0.safetensors").rename(out / "model.safetensors")
        return elements
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (out / f"shard-{number}.safetensors").rename(out / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    return elements


def _write_config(config: dict[str, Any], out: Path) -> None:
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def _copy_companions(source: Path, out: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _save(
    source: Path,
    out: Path,
    config: dict[str, Any],
    stock: bool,
    family: Family,
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> int:
    out.mkdir(parents=True, exist_ok=True)
    _write_config(config, out)
    _copy_companions(source, out)
    if not stock:
        # Read and written, not copied: file modes of an installation do not matter here.
        modeling = Path(family.source_file(config))
        (out / modeling.name).write_text(modeling.read_text(encoding="utf-8"), encoding="utf-8")
    tied = family.dimensions(config).tied
    return write_tensors(((n, t) for n, t in tensors if not (tied and n in TIED_NAMES)), out)


def prune_checkpoint(
    source: Path, plan: Plan, out: Path, scores: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Write the checkpoint that ``plan`` leaves of the one in ``source``, tensor by tensor.

    Args:
        source: the unpruned checkpoint.
        plan: the decision.
        out: the new directory.
        scores: what the decision came from; of plans with emulated blocks, with their maps.

    Raises:
        InputError: the plan does not fit the model.
        IntegrityError: the written weights have another size than the plan says.
    """
    config = read_config(source)
    family = family_of(config)
    new, stock = pruned_config(family, config, plan)
    tensors = read_tensors(source)
    if plan.merged:
        from prunelib.merging import merge_tensors

        tensors = merge_tensors(tensors, family, config, plan, WeightReader(source))
    tensors = prune_tensors(tensors, family, config, plan)
    if plan.emulation is not None:
        from prunelib.emulation import emulated_tensors

        dtype = WeightReader(source)(family.embedding).dtype
        tensors = chain(tensors, emulated_tensors(family, plan, scores or {}, dtype))
    if plan.sharing is not None:
        from prunelib.replacement import shared_tensors

        tensors = chain(tensors, shared_tensors(family, config, plan, WeightReader(source)))
    elements = _save(source, out, new, stock, family, tensors)
    if elements != plan.parameters[1]:
        raise IntegrityError(
            f"{out}: {elements:,} parameters written, the plan says {plan.parameters[1]:,}"
        )
    plan.save(out)


def export_stock(pruned: Path, original_config: dict[str, Any], out: Path) -> None:
    """Pad a pruned checkpoint with zero units to the original widths.

    The result loads anywhere as the stock architecture, with the pruned model's logits; it is
    neither smaller nor faster than the original.
    """
    plan = Plan.load(pruned)
    family = family_of(original_config)
    tensors = pad_tensors(read_tensors(pruned), family, original_config, plan)
    _save(pruned, out, dict(original_config), True, family, tensors)


def save_like(model: PreTrainedModel, source: Path, out: Path) -> None:
    """Save a model's weights with the config, modelling file, tokenizer and plan of ``source``."""
    config = read_config(source)
    family = family_of_config(config)
    _save(source, out, config, "auto_map" not in config, family, model.state_dict().items())
    if (source / PLAN_FILE).is_file():
        shutil.copyfile(source / PLAN_FILE, out / PLAN_FILE)


def build_model(
    config: dict[str, Any], make: Callable[[type[PreTrainedModel], Any], PreTrainedModel]
) -> PreTrainedModel:
    """Build a model from a config with this library's or transformers' own classes.

    ``auto_map`` in the config is ignored: a file beside weights is never executed.

    Args:
        config: config.json as data.
        make: called with the model class and the config object; returns the model.

    Raises:
        InputError: the architecture is not supported, or the config is not valid.
    """
    from huggingface_hub.errors import StrictDataclassError

    family = family_of_config(config)
    if config.get(VIRTUAL) is not None:
        check_virtual(config)
    config_class, model_class = family.classes(config)
    data = {k: v for k, v in config.items() if k not in ("auto_map", "model_type")}
    per_layer = data.pop("per_layer_config", None)
    try:
        parsed = config_class.from_dict(data)
        if per_layer is not None:
            parsed.per_layer_config = per_layer
    except (StrictDataclassError, ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        raise InputError(
            f"config.json is not a valid {config_class.__name__}: {message}"
        ) from error
    return make(model_class, parsed)


def load_model(
    directory: Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> PreTrainedModel:
    """Load a checkpoint for scoring, recovery or evaluation, in eval mode.

    Files are checked against the sha256 in provenance.json when there is one. On a CPU, bf16
    weights are rounded to bf16 and computed with in fp32: bf16 products there are several times
    slower. With several GPUs the layers are spread over them.

    Args:
        directory: a checkpoint directory.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``float32`` or ``bfloat16``.

    Raises:
        InputError: not a checkpoint, unsupported architecture, device or dtype.
        IntegrityError: a file is not what its provenance says, or tensors do not fit.
    """
    import torch

    where, kind = resolve_device(device), resolve_dtype(dtype)
    config = read_config(directory)
    weight_files(directory)
    if (directory / artefact.RECORD).is_file():
        artefact.verify(directory)
    sharded = where.type == "cuda" and where.index is None and torch.cuda.device_count() > 1

    def make(model_class: type[PreTrainedModel], parsed: Any) -> PreTrainedModel:
        try:
            # With loading info the result is a pair, which the annotations do not say.
            loaded: Any = model_class.from_pretrained(
                directory,
                config=parsed,
                dtype=kind,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                device_map="auto" if sharded else None,
            )
        except RuntimeError as error:
            message = " ".join(str(error).split())
            raise IntegrityError(f"{directory}: tensors do not fit: {message}") from error
        model, report = loaded
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report.get(key):
                raise IntegrityError(f"{directory}: {key.replace('_', ' ')}: {report[key]}")
        result: PreTrainedModel = model
        return result

    model = build_model(config, make)
    if not sharded:
        model.to(where)  # type: ignore[arg-type]
    if where.type == "cpu":
        model.to(torch.float32)  # type: ignore[arg-type]
    model.eval()
    return model
