"""Forward passes layer by layer: all windows go through a layer before the next one is touched.

So one layer's weights suffice at a time. ``Layers`` takes them from a model in memory,
``StreamedLayers`` from the files of a checkpoint, while the system brings the next layer's part of
them into its page cache.
Several streams of hidden states (other windows, or other weights) share one walk.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from prunelib.checkpoint import build_model, read_config, weight_files
from prunelib.device import resolve_device, resolve_dtype
from prunelib.errors import IntegrityError
from prunelib.families import family_of
from prunelib.provenance import artefact
from prunelib.statistics.batches import batches
from prunelib.statistics.gradients import LOGITS_BYTES, frozen, head_gradient
from prunelib.surgery import HEAD, zero_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

    from prunelib.families.base import Family
    from prunelib.plan import Plan
    from prunelib.statistics.inputs import PassInputs


# The types of floating point weights in safetensors files.
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Of a file announced at a time: of more, Linux brings in no more than it reads ahead at once.
ANNOUNCED_BYTES = 1 << 20


@dataclass(eq=False)
class Stream:
    """Hidden states of some windows on their way through the layers.

    Attributes:
        parts: batches of token ids, int64 [windows, length] each.
        states: per batch, what the next layer gets, [windows, length, hidden].
        arguments: per batch and layer, the other arguments of the layer's call.
    """

    parts: Sequence[torch.Tensor]
    states: list[torch.Tensor]
    arguments: Sequence[Sequence[Mapping[str, Any]]]

    def branch(self) -> Stream:
        """Return a stream that goes on from here by itself; nothing is copied."""
        return replace(self, states=list(self.states))

    @property
    def nbytes(self) -> int:
        """Size of the hidden states in bytes."""
        return sum(state.nbytes for state in self.states)


class _EnteredError(Exception):
    """The last layer was called."""


class Layers:
    """The decoder layers of a model in memory.

    Attributes:
        model: in eval mode; its weights are not changed.
        family: the model's family.
        modules: the layers.
        windows_passed: windows that went through a layer, summed over layers.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model = model
        self.family = family
        self.modules = family.layers(model)
        self.windows_passed = 0

    def sweep(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, layer) from ``start`` up to ``stop``, by default all that follow.

        A layer's weights are there until the next is asked for.
        """
        for index in range(len(self.modules))[start:stop]:
            yield index, self.modules[index]

    @contextmanager
    def _recording(self, calls: list[tuple[torch.Tensor, dict[str, Any]]]) -> Iterator[None]:
        """Let the layers record how they are called instead of computing."""
        last = len(self.modules) - 1
        own = [layer.__dict__.get("forward") for layer in self.modules]

        def recorder(index: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                calls.append((args[0] if args else kwargs.pop("hidden_states"), kwargs))
                if index == last:
                    raise _EnteredError
                # Some architectures take the first of what a layer returns.
                return (calls[0][0],)

            return forward

        for index, layer in enumerate(self.modules):
            layer.forward = recorder(index)
        try:
            yield
        finally:
            for layer, forward in zip(self.modules, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def begin(self, windows: torch.Tensor, batch_windows: int) -> Stream:
        """Return the stream of ``windows``, int64 [n, length], at the first layer."""
        stream = Stream(list(batches(windows, batch_windows)), [], [])
        arguments = []
        for part in stream.parts:
            calls: list[tuple[torch.Tensor, dict[str, Any]]] = []
            with torch.no_grad(), self._recording(calls), suppress(_EnteredError):
                self.model.base_model(input_ids=part.to(self.model.device), use_cache=False)
            stream.states.append(calls[0][0])
            arguments.append([kwargs for _, kwargs in calls])
        stream.arguments = arguments
        return stream

    def advance(self, index: int, layer: nn.Module, stream: Stream) -> None:
        """Take a stream through the layer ``index``."""
        with torch.no_grad():
            for number, state in enumerate(stream.states):
                output = layer(state, **stream.arguments[number][index])
                stream.states[number] = output[0] if isinstance(output, tuple) else output
                self.windows_passed += len(state)

    def loss(self, stream: Stream) -> float:
        """Return the mean next-token cross-entropy of a stream behind the last layer.

        Per token it is fp32, summed in fp64. Logits exist for one chunk of positions at a time.
        """
        norm, head = self.family.final_norm(self.model), self.model.get_output_embeddings()
        chunk = max(LOGITS_BYTES // (4 * head.weight.shape[0]), 1)
        total, count = 0.0, 0
        with torch.no_grad():
            for ids, state in zip(stream.parts, stream.states, strict=True):
                flat = state[:, :-1].reshape(-1, state.shape[-1])
                labels = ids[:, 1:].reshape(-1)
                for part, target in zip(flat.split(chunk), labels.split(chunk), strict=True):
                    logits = head(norm(part)).float()
                    losses = torch.nn.functional.cross_entropy(
                        logits, target.to(logits.device), reduction="none"
                    )
                    total += losses.sum(dtype=torch.float64).item()
                count += len(labels)
        return total / count

    def head_gradients(self, stream: Stream) -> tuple[list[torch.Tensor], float]:
        """Return the gradient of the mean loss behind the last layer, and the mean loss.

        Args:
            stream: behind the last layer.

        Returns:
            Per batch [windows, length, hidden], through the final norm and the head alone.
        """
        targets = sum(ids[:, 1:].numel() for ids in stream.parts)
        with frozen(self.model):
            pairs = [
                head_gradient(self.model, self.family, state, ids, targets)
                for ids, state in zip(stream.parts, stream.states, strict=True)
            ]
        return [gradient for gradient, _ in pairs], sum(loss for _, loss in pairs)


@dataclass(frozen=True)
class _Stored:
    """A tensor of a safetensors file: where its bytes are, and what they say."""

    path: Path
    start: int
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def announce(self) -> None:
        """Tell the system, where it can be told, that these bytes will be read soon."""
        if hasattr(os, "posix_fadvise"):
            with self.path.open("rb", buffering=0) as file:
                for start in range(0, self.size, ANNOUNCED_BYTES):
                    size = min(ANNOUNCED_BYTES, self.size - start)
                    os.posix_fadvise(
                        file.fileno(), self.start + start, size, os.POSIX_FADV_WILLNEED
                    )

    def map(self) -> torch.Tensor:
        """Return the tensor, mapped; the mapping goes with it, and no write reaches the file.

        Raises:
            IntegrityError: the file ends before the tensor.
        """
        if not self.size:
            return torch.empty(self.shape, dtype=self.dtype)
        into = self.start % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb", buffering=0) as file:
            try:
                pages = mmap.mmap(
                    file.fileno(),
                    into + self.size,
                    access=mmap.ACCESS_COPY,
                    offset=self.start - into,
                )
            except ValueError as error:
                raise IntegrityError(f"{self.path} ends before its tensors do") from error
        raw = torch.frombuffer(pages, dtype=torch.uint8, offset=into)
        if into % self.dtype.itemsize:
            # Nothing makes a writer align its tensors.
            raw = raw.clone()
        return raw.view(self.dtype).view(self.shape)


def _stored_in(path: Path) -> dict[str, _Stored]:
    """Return the tensors of a safetensors file by name: its header says where they are."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: _Stored(
            path,
            8 + size + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
            tuple(entry["shape"]),
            STORED_DTYPES[entry["dtype"]],
        )
        for name, entry in header.items()
        # Masks and positions of old checkpoints are no weights.
        if entry["dtype"] in STORED_DTYPES
    }


def layers_of(inputs: PassInputs) -> Layers:
    """Return the layers that a pass is given, or those of the model in memory."""
    model = inputs.model
    return model if isinstance(model, Layers) else Layers(model, inputs.family)


class StreamedLayers(Layers):
    """The decoder layers of a checkpoint whose weights are read when their turn comes.

    Of the layers, only the weights of the one at work are in memory; everything outside the layers
    stays there. Every tensor is a mapping of its own, which ends with its layer's turn: what is
    mapped counts as this process's memory. The next layer's part of the files is in the page cache
    by then, which the system takes back when it needs the memory.
    """

    def __init__(
        self,
        directory: Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        plan: Plan | None = None,
    ) -> None:
        """Read what is outside the layers; arguments as of ``checkpoint.load_model``.

        Args:
            directory: a checkpoint directory.
            device: where it computes; of several GPUs, the first.
            dtype: of the weights.
            plan: of units that count as zero, if any.

        Raises:
            InputError: not a checkpoint, unsupported architecture, device or dtype.
            IntegrityError: a file is not what its provenance says, or a weight is missing, of
                another shape or of a type that is not read.
        """
        from accelerate import init_empty_weights
        from safetensors import safe_open

        self._config, self._plan = read_config(directory), plan
        self._device, self._dtype = resolve_device(device), resolve_dtype(dtype)
        if (directory / artefact.RECORD).is_file():
            artefact.verify(directory)
        family = family_of(self._config)
        self._stored: dict[str, _Stored] = {}
        for path in weight_files(directory):
            # Opening it checks the header.
            with safe_open(path, framework="pt"):
                self._stored |= {
                    family.full_name(name): tensor for name, tensor in _stored_in(path).items()
                }
        with init_empty_weights(include_buffers=False):
            model = build_model(self._config, lambda cls, parsed: cls(parsed))
        super().__init__(model.eval(), family)
        own = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if not (family.dimensions(self._config).tied and name == HEAD)
        }
        for name, shape in own.items():
            stored = self._stored.get(name)
            if stored is None or stored.shape != shape:
                found = "missing" if stored is None else f"of shape {list(stored.shape)}"
                raise IntegrityError(f"{directory}: {name} {list(shape)} is {found}")
        outside = [name for name in own if not name.startswith(f"{family.layer_prefix}.")]
        _fill(model, self._read(outside))
        model.tie_weights()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))

    def _read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return tensors by full name, mapped, or copied to where and as what they compute."""
        # As load_model has it: rounded to bf16, computed with in fp32.
        kind = torch.float32 if self._device.type == "cpu" else self._dtype
        found = {
            name: self._stored[name].map().to(self._dtype).to(self._device, kind) for name in names
        }
        if self._plan is not None:
            return dict(zero_tensors(found.items(), self.family, self._config, self._plan))
        return found

    def _names(self, index: int) -> list[str]:
        """Return the full names of a layer's parameters, in their order."""
        prefix = f"{self.family.layer_prefix}.{index}."
        return [prefix + name for name, _ in self.modules[index].named_parameters()]

    def _announce(self, index: int) -> None:
        """Let the system begin to bring a layer's part of the files into its page cache.

        What cannot be read will say so when it is needed.
        """
        for name in self._names(index):
            self._stored[name].announce()

    def sweep(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, layer) from ``start`` up to ``stop``, by default all that follow.

        A layer's weights are there until the next is asked for.
        """
        wanted = range(len(self.modules))[start:stop]
        # Announcements wait where the disk has enough to do.
        with ThreadPoolExecutor(1) as pool:
            for index in wanted:
                layer, prefix = self.modules[index], f"{self.family.layer_prefix}.{index}."
                read = self._read(self._names(index))
                _fill(layer, {name.removeprefix(prefix): read.pop(name) for name in list(read)})
                if index != wanted[-1]:
                    pool.submit(self._announce, index + 1)
                try:
                    yield index, layer
                finally:
                    _fill(layer, {n: p.to("meta") for n, p in layer.named_parameters()})


def _fill(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors, by name relative to ``module``, in the place of its parameters."""
    from torch import nn

    for name, tensor in tensors.items():
        owner, _, own = name.rpartition(".")
        setattr(module.get_submodule(owner), own, nn.Parameter(tensor, requires_grad=False))
