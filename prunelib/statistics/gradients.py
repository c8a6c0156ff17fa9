"""One backward pass: first-order products of weights and gradients, reduced layer by layer.

For every parameter of every decoder layer, with ``g`` the gradient of the mean next-token loss
over all calibration windows (LLM-Pruner, arXiv 2305.11627, section 3.2):

* ``<layer>.<parameter>.abs.rows`` [rows] and ``.abs.columns`` [columns]: ``sum_k |g_k w_k|`` over
  the other axis (element-wise first order);
* ``<layer>.<parameter>.sum.rows`` and ``.sum.columns``: ``sum_k g_k w_k`` (vector-wise; the
  absolute value is the criterion's).

The absolute value comes after the sum over windows, so gradients of a whole layer must exist at
once, but only of one layer: the forward pass keeps each layer's input, the backward pass goes
through the layers from the last to the first, recomputes a layer, reduces its gradients and frees
them. The layers nearest the loss need no recomputation: their graph is kept as far as the
activations fit into ``GRAPH_BYTES``. The head is applied in chunks of positions.

``sweep`` is that walk; what is kept of a layer's gradients is the caller's ``Sums``, so that
second order (``prunelib.statistics.fisher``) shares everything else. On request it goes on to the
parameters outside the layers (``prunelib.statistics.gradients_whole``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from prunelib.errors import NonFiniteError
from prunelib.statistics.batches import batches, progress

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from prunelib.families.base import Config, Family

logger = logging.getLogger(__name__)

# Kept between the forward and the backward pass; more is faster, by a quarter at the most.
GRAPH_BYTES = 256 * 1024**2
LOGITS_BYTES = 64 * 1024**2


def rows_and_columns(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return ``<name>.rows`` [rows] and ``<name>.columns`` [columns], sums over the other axis.

    Args:
        name: what the sums are called.
        values: [rows, columns], or [rows] as one column.
    """
    if values.ndim == 1:
        values = values.unsqueeze(1)
    return {f"{name}.rows": values.sum(1).cpu(), f"{name}.columns": values.sum(0).cpu()}


class Sums:
    """The sum over batches of the gradients of one layer's parameters, and what is kept of it.

    Over several batches it is in fp32, whatever the type of the weights.

    Attributes:
        first: per parameter of the layer the summed gradient, shaped as the parameter.
    """

    def __init__(self) -> None:
        self.first: list[torch.Tensor] = []

    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add one batch's gradients, which may be overwritten later."""
        if self.first:
            self.first = [total.float() for total in self.first]
            torch._foreach_add_(self.first, list(gradients))
        else:
            self.first = list(gradients)

    def reduce(self, number: int, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the statistics of parameter ``number``; overwrites its sums.

        Args:
            number: index into the sums.
            name: ``<layer>.<parameter>``.
            weight: the parameter.
        """
        product = self.first[number].float().mul_(weight.detach())
        reduced = rows_and_columns(f"{name}.sum", product)
        return reduced | rows_and_columns(f"{name}.abs", product.abs_())


class _LayerRecorder:
    """Hooks that keep every layer's input and, for the last layers, its graph.

    Attributes:
        inputs: per layer, the hidden states [batch, length, hidden] as a leaf.
        arguments: per layer, the other keyword arguments of its call.
        outputs: per layer whose graph is kept, the output.
    """

    def __init__(self, layers: nn.ModuleList, graph_bytes: int) -> None:
        self.inputs: list[torch.Tensor] = []
        self.arguments: list[dict[str, Any]] = []
        self.outputs: dict[int, torch.Tensor] = {}
        self.last: torch.Tensor | None = None
        self._count = len(layers)
        self._graph_bytes = graph_bytes
        self._first_kept = len(layers)
        self._saved: dict[int, int] = {}
        self._counting: Any = None
        self._parameters = {p.data_ptr() for p in layers.parameters()}
        self._hooks: list[Any] = []
        for index, layer in enumerate(layers):
            self._hooks.append(
                layer.register_forward_pre_hook(self._before(index), with_kwargs=True)
            )
            self._hooks.append(layer.register_forward_hook(self._after(index)))

    def _count_saved(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def _before(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            leaf = hidden.detach().requires_grad_()
            self.inputs.append(leaf)
            self.arguments.append(kwargs)
            # The first layer is run once with its graph, to learn how much one layer keeps.
            torch.set_grad_enabled(index == 0 or index >= self._first_kept)
            if index == 0:
                self._counting = torch.autograd.graph.saved_tensors_hooks(
                    self._count_saved, lambda tensor: tensor
                )
                self._counting.__enter__()
            return (leaf,), kwargs

        return hook

    def _after(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if index == 0:
                self._counting.__exit__(None, None, None)
                size = max(sum(self._saved.values()), 1)
                self._first_kept = self._count - self._graph_bytes // size
            if index >= max(self._first_kept, 1):
                self.outputs[index] = output
            if index == self._count - 1:
                self.last = output.detach()
                torch.set_grad_enabled(False)

        return hook

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _head_shares(
    model: PreTrainedModel, family: Family, hidden: torch.Tensor, ids: torch.Tensor, targets: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield (positions, their hidden states as a leaf [positions, hidden], share of the loss []).

    The loss is the next-token cross-entropy summed over this batch and divided by ``targets``,
    the number of targets of all batches. Logits exist for one chunk of positions at a time.
    """
    norm, head = family.final_norm(model), model.get_output_embeddings()
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    labels = ids[:, 1:].reshape(-1).to(hidden.device)
    chunk = max(LOGITS_BYTES // (4 * head.weight.shape[0]), 1)
    for start in range(0, len(flat), chunk):
        part = slice(start, start + chunk)
        leaf = flat[part].detach().requires_grad_()
        with torch.enable_grad():
            logits = head(norm(leaf)).float()
            share = (
                torch.nn.functional.cross_entropy(
                    logits, labels[part].to(logits.device), reduction="sum"
                )
                / targets
            )
        yield part, leaf, share


def head_gradient(
    model: PreTrainedModel, family: Family, hidden: torch.Tensor, ids: torch.Tensor, targets: int
) -> tuple[torch.Tensor, float]:
    """Return d loss / d hidden [batch, length, hidden] and this batch's share of the loss."""
    gradient = torch.zeros_like(hidden[:, :-1].reshape(-1, hidden.shape[-1]))
    loss = 0.0
    for part, leaf, share in _head_shares(model, family, hidden, ids, targets):
        (gradient[part],) = torch.autograd.grad(share, leaf)
        loss += share.item()
    full = torch.zeros_like(hidden)
    full[:, :-1] = gradient.view(hidden.shape[0], hidden.shape[1] - 1, -1)
    return full, loss


class _ReachedError(Exception):
    """The input of the first layer is there."""


def _first_input(model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor) -> torch.Tensor:
    """Return the input of the first layer [batch, length, hidden] with its graph."""
    found: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _ReachedError

    hook = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.enable_grad(), suppress(_ReachedError):
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        hook.remove()
    return found[0]


def _outer(
    model: PreTrainedModel,
    family: Family,
    parts: Sequence[torch.Tensor],
    targets: int,
    last: Sequence[torch.Tensor],
    first: Sequence[torch.Tensor],
    total: Sums,
    what: str,
) -> dict[str, torch.Tensor]:
    """Reduce the gradients of the parameters outside the layers, by full name.

    The head is applied once more, so that the gradient of a tied embedding, to which both of its
    uses add, is that of one batch before ``total`` takes it.

    Args:
        model: with all parameters frozen.
        family: the model's family.
        parts: batches of token ids.
        targets: as in ``sweep``.
        last: per batch, the last layer's output.
        first: per batch, the gradient of the first layer's input.
        total: takes in the gradients.
        what: the pass, for messages.

    Raises:
        NonFiniteError: names the parameter.
    """
    names, parameters = zip(
        *(
            (name, parameter)
            for name, parameter in model.named_parameters()
            if not name.startswith(f"{family.layer_prefix}.")
        ),
        strict=True,
    )
    for parameter in parameters:
        parameter.requires_grad_(True)
    for ids, output, upstream in zip(parts, last, first, strict=True):
        gradients = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]

        def add(found: Sequence[torch.Tensor | None], to: Sequence[torch.Tensor]) -> None:
            for gradient, more in zip(to, found, strict=True):
                if more is not None:
                    gradient.add_(more)

        for _, _, share in _head_shares(model, family, output, ids, targets):
            add(torch.autograd.grad(share, parameters, allow_unused=True), gradients)
        reached = _first_input(model, family.layers(model), ids)
        add(torch.autograd.grad(reached, parameters, upstream, allow_unused=True), gradients)
        total.add(gradients)
    statistics: dict[str, torch.Tensor] = {}
    for number, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        reduced = total.reduce(number, name, parameter)
        if not all(value.isfinite().all() for value in reduced.values()):
            raise NonFiniteError(f"{what}: {name} is not finite")
        statistics |= reduced
    return statistics


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Freeze all parameters but those of the decoder layers handled inside, then restore."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    enabled = torch.is_grad_enabled()
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(enabled)
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def _require_finite(loss: float, recorder: _LayerRecorder, what: str) -> None:
    """Raise NonFiniteError if a batch's loss is not finite; name the first layer at fault."""
    if math.isfinite(loss):
        return
    assert recorder.last is not None
    states = [*recorder.inputs, recorder.last]
    bad = next((i for i, state in enumerate(states) if not state.isfinite().all()), None)
    where = (
        "all layers' outputs are finite, the head's are not"
        if bad is None
        else f"layer {bad - 1} is the first whose output is not finite"
        if bad
        else "the embeddings are not finite"
    )
    raise NonFiniteError(f"{what}: the calibration loss is {loss}; {where}")


def sweep(
    model: PreTrainedModel,
    family: Family,
    parts: Sequence[torch.Tensor],
    targets: int,
    sums: Callable[[], Sums],
    what: str,
    *,
    outer: bool = False,
) -> tuple[dict[str, torch.Tensor], float]:
    """Go forward and backward through the model and reduce the gradients layer by layer.

    Args:
        model: in eval mode; weights and gradients are as before afterwards.
        family: the model's family.
        parts: batches of token ids, int64 [windows, length] each.
        targets: a batch's loss is the sum over its predicted tokens divided by this.
        sums: makes what takes in one layer's gradients of every batch and reduces them.
        what: the pass, for messages.
        outer: whether parameters outside the layers are reduced, too; all at once.

    Returns:
        The reductions on the CPU, those of layers by ``<layer>.<parameter>``, and the sum of all
        batches' losses.

    Raises:
        NonFiniteError: the loss or a layer's gradients are NaN or infinite; names the layer.
    """
    layers = family.layers(model)
    statistics: dict[str, torch.Tensor] = {}
    with frozen(model):
        layers.requires_grad_(True)
        recorders, gradients, loss = [], [], 0.0
        for part in progress(parts, len(parts), "forward batches", logger):
            recorder = _LayerRecorder(layers, GRAPH_BYTES // len(parts))
            try:
                with torch.no_grad():
                    model.base_model(input_ids=part.to(model.device), use_cache=False)
            finally:
                recorder.close()
            assert recorder.last is not None
            gradient, share = head_gradient(model, family, recorder.last, part, targets)
            _require_finite(share, recorder, what)
            recorders.append(recorder)
            gradients.append(gradient)
            loss += share
        for index in progress(range(len(layers))[::-1], len(layers), "layers back", logger):
            names, parameters = zip(*layers[index].named_parameters(), strict=True)
            total = sums()
            for number, recorder in enumerate(recorders):
                leaf, arguments = recorder.inputs.pop(), recorder.arguments.pop()
                output = recorder.outputs.pop(index, None)
                with torch.enable_grad():
                    if output is None:
                        output = layers[index](leaf, **arguments)
                    output = output[0] if isinstance(output, tuple) else output
                    upstream = gradients[number].to(output.device)
                    found = torch.autograd.grad(output, (leaf, *parameters), upstream)
                gradients[number] = found[0]
                total.add(found[1:])
                del found, output
            for number, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
                reduced = total.reduce(number, f"{index}.{name}", parameter)
                if not all(value.isfinite().all() for value in reduced.values()):
                    raise NonFiniteError(f"{what}: layer {index}, {name} is not finite")
                statistics |= reduced
        if outer:
            layers.requires_grad_(False)
            last = [recorder.last for recorder in recorders if recorder.last is not None]
            statistics |= _outer(model, family, parts, targets, last, gradients, sums(), what)
    return statistics, loss


def collect(
    model: PreTrainedModel,
    family: Family,
    config: Config,
    windows: torch.Tensor,
    batch_windows: int,
) -> dict[str, torch.Tensor]:
    """Return the first-order statistics above and the mean ``loss`` [], on the CPU.

    Args:
        model: in eval mode; weights and gradients are as before afterwards.
        family: the model's family.
        config: config.json of the model.
        windows: int64 [n, length] token ids.
        batch_windows: windows per forward and backward pass; the result does not depend on it
            beyond rounding.

    Raises:
        NonFiniteError: the loss or a layer's gradients are NaN or infinite; names the layer.
    """
    return first_order(model, family, windows, batch_windows, "gradients")


def first_order(
    model: PreTrainedModel,
    family: Family,
    windows: torch.Tensor,
    batch_windows: int,
    what: str,
    *,
    outer: bool = False,
) -> dict[str, torch.Tensor]:
    """Return first-order statistics with the mean ``loss``; arguments as of ``sweep``."""
    parts = list(batches(windows, batch_windows))
    targets = windows.shape[0] * (windows.shape[1] - 1)
    statistics, loss = sweep(model, family, parts, targets, Sums, what, outer=outer)
    return statistics | {"loss": torch.tensor(loss, dtype=torch.float64)}
