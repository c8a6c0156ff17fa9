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
them; a linear map's, from known outputs, one at a time if all windows are in one batch. The outputs
of linear maps, most of a layer's time, are kept as far as they fit into
``kept_bytes`` and not computed again. The head is applied in chunks of positions.

``sweep`` is that walk; what is kept of a layer's gradients is the caller's ``Sums``, so that
second order (``prunelib.statistics.fisher``) shares everything else. On request it goes on to the
parameters outside the layers (``prunelib.statistics.gradients_whole``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from prunelib.errors import InputError, NonFiniteError
from prunelib.statistics.batches import batches, progress

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from prunelib.families.base import Family
    from prunelib.statistics.inputs import PassInputs

logger = logging.getLogger(__name__)

# Kept between the forward and the backward pass; more is faster, by a quarter at the most. A part
# of the weights is little beside them, and of a large model the least would be too little.
KEPT_BYTES = 640 * 1024**2
KEPT_WEIGHTS = 5
LOGITS_BYTES = 32 * 1024**2


def kept_bytes(model: PreTrainedModel) -> int:
    """Return how many bytes of linear maps' outputs are kept for the backward pass, of all windows.

    The larger one of ``KEPT_BYTES`` and the ``KEPT_WEIGHTS``-th part of the weights' bytes.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return max(KEPT_BYTES, weights // KEPT_WEIGHTS)


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
    """The sum over batches of the gradient of one parameter, and what is kept of it.

    Over several batches it is in fp32, whatever the type of the weights.

    Attributes:
        first: the summed gradient, shaped as the parameter.
        batches: how many have been added.
    """

    first: torch.Tensor

    def __init__(self) -> None:
        self.batches = 0

    def add(self, gradient: torch.Tensor) -> None:
        """Add one batch's gradient: keeps and overwrites the first one, not those after it."""
        self.first = self.first.float().add_(gradient) if self.batches else gradient
        self.batches += 1

    def reduce(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the parameter's statistics; overwrites the sums.

        Args:
            name: ``<layer>.<parameter>``.
            weight: the parameter.
        """
        product = self.first.float().mul_(weight.detach())
        reduced = rows_and_columns(f"{name}.sum", product)
        return reduced | rows_and_columns(f"{name}.abs", product.abs_())


class _Memory:
    """Tensors that gradients are written into again and again: fresh pages cost time."""

    def __init__(self) -> None:
        self._taken: dict[tuple[Any, ...], torch.Tensor] = {}

    def like(self, weight: torch.Tensor, name: str | None) -> torch.Tensor:
        """Return a tensor shaped as ``weight`` with any values.

        Args:
            weight: also gives type and device.
            name: whose it is alone; with None, that of whoever asks next for this shape.
        """
        key = (name, weight.shape, weight.dtype, weight.device)
        if key not in self._taken:
            self._taken[key] = torch.empty_like(weight, requires_grad=False)
        return self._taken[key]


class _KnownProduct(torch.autograd.Function):
    """A linear map whose output is known, or needed by no gradient: only its backward is run."""

    @staticmethod
    def forward(
        ctx: Any,
        known: torch.Tensor,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        take: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        """Return ``known`` [..., rows].

        Args:
            ctx: for backward.
            known: the output.
            states: as of ``torch.nn.functional.linear``, like weight and bias.
            weight: [rows, columns].
            bias: [rows] or None.
            take: is given the upstream gradient [n, rows] and the states [n, columns], whose
                product is the weight's gradient.
        """
        ctx.save_for_backward(states, weight)
        ctx.biased, ctx.take = bias is not None, take
        return known.view_as(known)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return those of states [..., columns] and bias [rows]; the weight's has been taken.

        Args:
            ctx: holds states and weight.
            upstream: the one gradient of the output [..., rows].
        """
        states, weight = ctx.saved_tensors
        flat = upstream[0].flatten(0, -2)
        ctx.take(flat, states.flatten(0, -2))
        return None, upstream[0] @ weight, None, flat.sum(0) if ctx.biased else None, None


class _LayerRecorder:
    """Hooks that keep every layer's input and, for the last layers, what their linear maps gave.

    Attributes:
        inputs: per layer, the hidden states [batch, length, hidden] as a leaf.
        arguments: per layer, the other keyword arguments of its call.
        known: per layer, linear maps and their outputs; None for one that no gradient needs.
        last: the last layer's output.
    """

    def __init__(self, layers: nn.ModuleList, kept_bytes: int) -> None:
        self.inputs: list[torch.Tensor] = []
        self.arguments: list[dict[str, Any]] = []
        self.known: list[dict[nn.Module, torch.Tensor | None]] = [{} for _ in layers]
        self.last: torch.Tensor | None = None
        self._kept_bytes = kept_bytes
        self._first_kept, self._count = 0, len(layers)
        # Of the first layer, which tells how much one layer keeps.
        self._called: list[tuple[nn.Module, int]] = []
        self._final: str | None = None
        self._hooks: list[Any] = []
        for index, layer in enumerate(layers):
            self._hooks += [
                layer.register_forward_pre_hook(self._before(index), with_kwargs=True),
                layer.register_forward_hook(self._after(index)),
            ]
            for module in layer.modules():
                if not index and not list(module.children()):
                    self._hooks.append(module.register_forward_hook(self._note))
                if _is_plain(module):
                    self._hooks.append(module.register_forward_hook(self._keep(index)))

    def _before(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            self.inputs.append(hidden.detach().requires_grad_())
            self.arguments.append(kwargs)

        return hook

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        plain = _is_plain(module)
        if plain and any(module is other for other, _ in self._called):
            # Its gradient would be the sum over its calls, each taken as the whole.
            raise InputError(
                f"a layer calls its {module} more than once; allowed: linear maps called once"
            )
        self._called.append((module, output.nbytes if plain else 0))

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if index >= self._first_kept:
                self.known[index][module] = output

        return hook

    def _after(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if index == 0:
                size = sum(nbytes for _, nbytes in self._called)
                last, nbytes = self._called[-1]
                if _is_plain(last):
                    # Nothing but the residual sum comes after it.
                    self._final = next(n for n, m in module.named_modules() if m is last)
                    size -= nbytes
                self._first_kept = max(self._count - self._kept_bytes // max(size, 1), 0)
                if self._first_kept:
                    self.known[0].clear()
            if self._final:
                self.known[index].pop(module.get_submodule(self._final), None)
            if index == self._count - 1:
                self.last = output[0] if isinstance(output, tuple) else output

        return hook

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def run_again(
        self, layer: nn.Module, take: Callable[[str, torch.Tensor, torch.Tensor], None]
    ) -> tuple[torch.Tensor, torch.Tensor, set[str]]:
        """Forget the last layer that is left; return its input, and its graph as an output.

        The values of that output are not those of the layer.

        Args:
            layer: of which this is.
            take: is given, when the graph is gone through, the name of a weight in the layer and
                the two factors of its gradient (see ``_KnownProduct``).

        Returns:
            The input, the output, and the names of all weights that ``take`` is given.
        """
        leaf, known = self.inputs.pop(), self.known.pop()
        if self._final and _is_plain(final := layer.get_submodule(self._final)):
            known[final] = None
        taken = {f"{name}.weight": m for name, m in layer.named_modules() if m in known}
        for name, module in taken.items():
            module.forward = partial(_known_product, module, known[module], partial(take, name))
        try:
            with torch.enable_grad():
                output = layer(leaf, **self.arguments.pop())
        finally:
            for module in known:
                del module.forward
        return leaf, output[0] if isinstance(output, tuple) else output, set(taken)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear map, and nothing else has replaced its forward function."""
    return type(module) is torch.nn.Linear and "forward" not in vars(module)


def _known_product(
    module: nn.Module,
    known: torch.Tensor | None,
    take: Callable[[torch.Tensor, torch.Tensor], None],
    states: torch.Tensor,
) -> torch.Tensor:
    assert isinstance(module, torch.nn.Linear)
    if known is None:
        known = states.new_zeros(()).expand(*states.shape[:-1], module.out_features)
    product: torch.Tensor = _KnownProduct.apply(known, states, module.weight, module.bias, take)
    return product


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy summed over rows, with its gradient in the place of the logits.

    torch's own holds four tensors of that size: logits, log-softmax and the gradients of both.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss [] of ``logits`` [rows, classes], overwritten; ``labels`` [rows]."""
        rows = torch.arange(len(labels), device=labels.device)
        # First, so that the sum's logarithm is rounded as a number near zero.
        logits.sub_(logits.amax(-1, keepdim=True))
        chosen = logits[rows, labels]
        total = logits.logsumexp(-1)
        gradient = logits.sub_(total[:, None]).exp_()
        gradient[rows, labels] -= 1
        ctx.save_for_backward(gradient)
        return (total - chosen).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of the logits [rows, classes]."""
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream[0]), None


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
            share = _CrossEntropy.apply(logits, labels[part].to(logits.device)) / targets
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
    sums: Callable[[], Sums],
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
        sums: makes what takes in one parameter's gradients.
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
    total = [sums() for _ in parameters]
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
        for taken, gradient in zip(total, gradients, strict=True):
            taken.add(gradient)
    statistics: dict[str, torch.Tensor] = {}
    for name, parameter, taken in zip(names, parameters, total, strict=True):
        reduced = taken.reduce(name, parameter)
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


class _LayerBack:
    """One layer's way back: every batch's gradients go into sums, reduced with the last batch.

    A weight's gradient is reduced as soon as it is there, so that of known products one at a time
    is held.

    Attributes:
        statistics: the reductions, by ``<layer>.<parameter>``.
    """

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        batches: int,
        sums: Callable[[], Sums],
        memory: _Memory,
    ) -> None:
        self.statistics: dict[str, torch.Tensor] = {}
        self._layer, self._index, self._left, self._memory = layer, index, batches, memory
        self._parameters = dict(layer.named_parameters())
        self._total = {name: sums() for name in self._parameters}
        self._kept = batches > 1

    def go(self, recorder: _LayerRecorder, upstream: torch.Tensor) -> torch.Tensor:
        """Take in one batch; return the gradient of its input [batch, length, hidden].

        Args:
            recorder: of the batch; forgets this layer.
            upstream: the gradient of the layer's output.
        """
        self._left -= 1
        leaf, output, taken = recorder.run_again(self._layer, self._take)
        rest = {name: p for name, p in self._parameters.items() if name not in taken}
        found = torch.autograd.grad(output, (leaf, *rest.values()), upstream.to(output.device))
        for name, gradient in zip(rest, found[1:], strict=True):
            self._add(name, gradient)
        # Of several batches, the first one's gradients are the sums.
        self._kept = False
        assert self._left or not self._total
        return found[0]

    def _take(self, name: str, upstream: torch.Tensor, states: torch.Tensor) -> None:
        memory = self._memory.like(self._parameters[name], name if self._kept else None)
        self._add(name, torch.mm(upstream.T, states, out=memory))

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        self._total[name].add(gradient)
        if not self._left:
            total = self._total.pop(name)
            self.statistics |= total.reduce(f"{self._index}.{name}", self._parameters[name])


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
        sums: makes what takes in one parameter's gradients of every batch and reduces them.
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
            recorder = _LayerRecorder(layers, kept_bytes(model) // len(parts))
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
        memory = _Memory()
        for index in progress(range(len(layers))[::-1], len(layers), "layers back", logger):
            back = _LayerBack(layers[index], index, len(parts), sums, memory)
            for number, recorder in enumerate(recorders):
                gradients[number] = back.go(recorder, gradients[number])
            for name, value in back.statistics.items():
                if not value.isfinite().all():
                    where = name.removeprefix(f"{index}.").rsplit(".", 2)[0]
                    raise NonFiniteError(f"{what}: layer {index}, {where} is not finite")
            statistics |= back.statistics
        if outer:
            layers.requires_grad_(False)
            last = [recorder.last for recorder in recorders if recorder.last is not None]
            statistics |= _outer(model, family, parts, targets, last, gradients, sums, what)
    return statistics, loss


def collect(inputs: PassInputs) -> dict[str, torch.Tensor]:
    """Return the first-order statistics above and the mean ``loss`` [], on the CPU.

    Args:
        inputs: model and windows.

    Raises:
        NonFiniteError: the loss or a layer's gradients are NaN or infinite; names the layer.
    """
    return first_order(inputs, "gradients")


def first_order(inputs: PassInputs, what: str, *, outer: bool = False) -> dict[str, torch.Tensor]:
    """Return first-order statistics with the mean ``loss``.

    Args:
        inputs: model and windows.
        what: name of the pass, for messages.
        outer: whether what is outside the layers has statistics, too.
    """
    windows = inputs.windows
    parts = list(batches(windows, inputs.batch_windows))
    targets = windows.shape[0] * (windows.shape[1] - 1)
    statistics, loss = sweep(inputs.model, inputs.family, parts, targets, Sums, what, outer=outer)
    return statistics | {"loss": torch.tensor(loss, dtype=torch.float64)}
