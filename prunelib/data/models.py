"""Turn what a source holds into a plain checkpoint: config.json, safetensors, tokenizer.

No other file of the source reaches the artefact: no code, no pickle, no adapter that would be
loaded behind the user's back.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunelib.data.tokenizer import load_tokenizer
from prunelib.errors import InputError, IntegrityError

LOG = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
)
CONFIG_FILES = ("config.json", "generation_config.json")
WEIGHTS = ("safetensors", "bin")
INDEX = {
    "safetensors": "model.safetensors.index.json",
    "bin": "pytorch_model.bin.index.json",
}
_SINGLE = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}


def hub_patterns(weights: str = "safetensors") -> list[str]:
    """Return the names to fetch from a hub repository; never code, pickles only when asked."""
    check_weights(weights)
    shards = "model*.safetensors" if weights == "safetensors" else "pytorch_model*.bin"
    return [*CONFIG_FILES, *TOKENIZER_FILES, INDEX[weights], shards]


def check_weights(weights: str) -> None:
    """Refuse an unknown kind of weights.

    Raises:
        InputError: it is not one of ``WEIGHTS``.
    """
    if weights not in WEIGHTS:
        raise InputError(f"weights {weights!r} is unknown; allowed: {', '.join(WEIGHTS)}")


def make_checkpoint(path: Path, out: Path, *, weights: str = "safetensors") -> None:
    """Write the checkpoint held by ``path`` (a GGUF file or a checkpoint directory) into ``out``.

    Args:
        path: what ``fetch`` returned.
        out: an existing, empty directory.
        weights: ``bin`` converts pickled weights, with torch's restricted unpickler.

    Raises:
        InputError: the directory does not exist, has no usable weights, needs remote code, is
            quantised, or a file of it points outside.
        IntegrityError: a shard named by the index is missing.
    """
    check_weights(weights)
    if path.is_file() and path.suffix == ".gguf":
        convert_gguf(path, out)
    elif path.is_dir():
        copy_checkpoint(path, out, weights)
    else:
        what = "is not a GGUF file" if path.exists() else "does not exist"
        raise InputError(f"model directory {path} {what}")
    load_tokenizer(out)


def convert_gguf(path: Path, out: Path) -> None:
    """Dequantise a GGUF file to fp32 and save it as a plain checkpoint with its tokenizer.

    The values are exactly those that the quantised file stands for; tied weights stay tied.

    Raises:
        InputError: transformers cannot read the file, or the tokenizer does not survive saving.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path} cannot be read as GGUF: {_first_line(error)}") from error
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    # The loaded model refuses to be saved as long as it remembers that it was quantised.
    with torch.device("meta"):
        plain = type(loaded)(type(loaded.config)(**settings))
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)
    probe = "The capital of France is Paris.\n\n  1,234 = naïve — 你好\t<x>"
    if load_tokenizer(out)(probe).input_ids != tokenizer(probe).input_ids:
        raise InputError(f"{path}: its tokenizer changes when it is saved and loaded")


def copy_checkpoint(source: Path, out: Path, weights: str = "safetensors") -> None:
    """Link (or copy) a checkpoint directory's config, weights and tokenizer into ``out``.

    Weights are hard-linked where the file system allows it. Anything else in the directory is
    ignored. Raises as ``make_checkpoint``.
    """
    config = _native_config(source)
    names = _weight_files(source, weights)
    for name in names:
        _inside(source, name)
    _write_json(out / "config.json", config)
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if (source / name).exists():
            shutil.copyfile(_inside(source, name), out / name)
    tokenizer_config = out / "tokenizer_config.json"
    if tokenizer_config.exists():
        settings = _read_json(tokenizer_config)
        settings.pop("auto_map", None)
        _write_json(tokenizer_config, settings)
    if weights == "bin":
        _convert_pickles([_inside(source, name) for name in names], config, out)
        return
    for name in names:
        _link(_inside(source, name), out / name)
    if (source / INDEX[weights]).exists():
        shutil.copyfile(_inside(source, INDEX[weights]), out / INDEX[weights])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} has no {path.name}: it is not a checkpoint") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not JSON: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _native_config(source: Path) -> dict[str, Any]:
    """Return config.json without references to code; refuse what stock transformers cannot load."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    path = _inside(source, "config.json")
    config = _read_json(path)
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        needs = "needs remote code, which is never run" if "auto_map" in config else "is unknown"
        raise InputError(f"{source / 'config.json'}: model_type {model_type!r} {needs}")
    if config.pop("auto_map", None):
        LOG.warning("%s: auto_map dropped; transformers' own %s is used", path, model_type)
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method")
        raise InputError(
            f"{source / 'config.json'}: the weights are quantised ({method}); only float"
            " checkpoints can be pruned"
        )
    config.pop("_name_or_path", None)
    return config


def _link_root(directory: Path) -> Path:
    """Return the directory that links may point into.

    Itself; for a snapshot of the hub's cache the repository's folder, where the files lie.
    """
    resolved = directory.resolve()
    repository = resolved.parent.parent
    if resolved.parent.name == "snapshots" and (repository / "blobs").is_dir():
        return repository
    return resolved


def _inside(directory: Path, name: str) -> Path:
    """Return the file called ``name`` in a directory, links followed.

    Raises:
        InputError: the name is a path, or the file lies outside the directory.
    """
    if name != Path(name).name or name in ("", ".", ".."):
        raise InputError(f"{directory}: {name!r} is not a plain file name")
    path = (directory / name).resolve()
    if not path.is_relative_to(_link_root(directory)):
        raise InputError(f"{directory / name} is a link to {path}, outside its directory")
    return path


def _weight_files(source: Path, weights: str) -> list[str]:
    index = source / INDEX[weights]
    if index.exists():
        mapping = _read_json(_inside(source, index.name)).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise InputError(f"{index} has no weight_map")
        names = sorted({str(name) for name in mapping.values()})
        for name in names:
            if not name.endswith("." + weights):
                raise InputError(f"{index} names {name!r}, which is not a .{weights} file")
            if not _inside(source, name).is_file():
                raise IntegrityError(f"{source}: {name}, named by {index.name}, is missing")
        return names
    if (source / _SINGLE[weights]).exists():
        return [_SINGLE[weights]]
    if weights == "safetensors" and any(source.glob("*.bin")):
        raise InputError(
            f"{source} has pickled weights (.bin) only; say `weights: bin` in its catalogue entry"
            " to convert them once"
        )
    hint = "; for .bin weights say `weights: bin`" if weights == "safetensors" else ""
    raise InputError(f"{source} has no {_SINGLE[weights]} and no {index.name}{hint}")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _convert_pickles(paths: list[Path], config: Mapping[str, Any], out: Path) -> None:
    """Write pickled shards as safetensors, one file per shard, with an index if there are several.

    ``weights_only`` lets the unpickler build tensors and nothing else.
    """
    import pickle

    import torch
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total = 0
    for number, path in enumerate(paths, start=1):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise InputError(
                f"{path} is not a plain file of tensors: {_first_line(error)}"
            ) from error
        if not isinstance(state, dict) or not all(torch.is_tensor(t) for t in state.values()):
            raise InputError(f"{path} is not a plain file of tensors")
        name = _SINGLE["safetensors"]
        if len(paths) > 1:
            name = f"model-{number:05d}-of-{len(paths):05d}.safetensors"
        tensors = _unshared(state, bool(config.get("tie_word_embeddings")))
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        LOG.info("converted %s (%d of %d)", path.name, number, len(paths))
    if len(paths) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(out / INDEX["safetensors"], index)


def _unshared(state: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Return contiguous tensors that share no storage; a tied output head is left out."""
    seen: set[int] = set()
    tensors: dict[str, Any] = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen and tied and name == "lm_head.weight":
            continue
        tensors[name] = tensor.clone().contiguous() if storage in seen else tensor.contiguous()
        seen.add(storage)
    return tensors


def geometry_of(directory: Path) -> dict[str, Any]:
    """Return a checkpoint's config with the defaults of its class filled in; dtype as a string."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # validation errors of several libraries
        raise InputError(f"{directory}/config.json is refused: {_first_line(error)}") from error
    fields: dict[str, Any] = config.to_dict()
    fields["dtype"] = str(fields.get("dtype") or "float32").removeprefix("torch.")
    if fields.get("head_dim") is None and fields.get("num_attention_heads"):
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    return fields


def check_geometry(geometry: Mapping[str, Any], fetched: Mapping[str, Any], name: str) -> None:
    """Compare the catalogue's geometry with the fetched one.

    Raises:
        InputError: they differ; the message names the fields and both values.
    """
    wrong = [
        f"{key} is {fetched.get(key)!r}, the catalogue says {value!r}"
        for key, value in geometry.items()
        if fetched.get(key) != value
    ]
    if wrong:
        raise InputError(f"model {name}: the fetched config.json disagrees: {'; '.join(wrong)}")


def count_parameters(directory: Path) -> int:
    """Return the number of parameters of a checkpoint, tied weights once, without loading it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())
