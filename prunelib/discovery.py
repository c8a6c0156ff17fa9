"""LLM-Pruner's discovery: which slices of which parameters can only be removed together.

The model is traced by ``torch.export`` and every position of every parameter axis is a neuron. The
graph is then run on labels instead of numbers: a tensor carries, for every element, the neuron that
it belongs to. Layout operations move labels as they move numbers, and the two dependency rules of
LLM-Pruner (arXiv 2305.11627, section 3.1) join labels to groups:

* where an element of one tensor meets exactly one element of another (activations, products, norms,
  biases, and sums, whose terms must keep the same width), either neuron depends on the other: in-
  and out-degree are 1, both rules fire;
* where a linear map joins all inputs to all outputs, degrees are larger than 1 and neither fires:
  the map's columns go with its inputs, its rows begin new neurons;
* a vector that many neurons share (the norm of every head) has a larger out-degree and stays;
* the batch dimension of a product of two activations is what attention calls a head: all that takes
  part in it under one index is one structure.

Joining goes on until nothing changes, so any member of a group leads to the same group. What comes
out are heads (or kv groups), MLP channels, residual channels and rows of the embedding tables and
the head. Nothing here knows a model family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from prunelib.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram
    from torch.fx import Node
    from transformers import PreTrainedModel

HEAD, CHANNEL, RESIDUAL, VOCABULARY = "head", "mlp_channel", "residual_channel", "vocabulary"
_NONE = -1
_TOKENS = 3

# fmt: off
# What only moves elements; called on labels as on numbers.
_LAYOUT = frozenset((
    "alias", "cat", "chunk", "clone", "contiguous", "detach", "expand", "flatten", "permute",
    "repeat", "repeat_interleave", "reshape", "select", "slice", "split", "split_with_sizes",
    "squeeze", "stack", "t", "transpose", "unflatten", "unsqueeze", "view", "_unsafe_view",
))
# Element by element, tensors of the same (broadcast) shape; a softmax only rescales its elements.
_ELEMENTWISE = frozenset((
    "abs", "add", "add_", "addcmul", "clamp", "cos", "div", "div_", "dropout", "exp", "float",
    "gelu", "hardtanh", "leaky_relu", "masked_fill", "maximum", "minimum", "mul", "mul_", "neg",
    "pow", "relu", "rsqrt", "rsub", "sigmoid", "silu", "sin", "softmax", "_softmax", "softplus",
    "sqrt", "sub", "tanh", "to", "_to_copy", "where",
))
_REDUCTIONS = frozenset(("amax", "amin", "mean", "sum", "var"))
_PRODUCTS = frozenset(("baddbmm", "bmm", "matmul"))
# fmt: on
_IGNORED = frozenset(("_assert_tensor_metadata", "sym_size"))

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Slice:
    """Positions of one axis of one parameter."""

    parameter: str
    axis: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """What has to be removed together.

    Attributes:
        kind: ``head``, ``mlp_channel``, ``residual_channel`` or ``vocabulary``.
        slices: sorted by parameter and axis.
    """

    kind: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True, eq=False)
class Dependencies:
    """All groups of a model.

    Attributes:
        groups: the groups that are known in full.
        untraced: operations that could not be followed, each with the module that calls it; what
            they touch is in no group.
    """

    groups: tuple[Group, ...]
    untraced: tuple[str, ...]
    _index: Mapping[tuple[str, int], Mapping[int, Group]] = field(repr=False)

    def of(self, kind: str) -> list[Group]:
        """Return the groups of one kind."""
        return [group for group in self.groups if group.kind == kind]

    def group(self, parameter: str, axis: int, position: int) -> Group:
        """Return the group that a trigger leads to: one position of one axis of one parameter.

        Raises:
            InputError: there is no such position, or its group could not be traced in full.
        """
        try:
            return self._index[parameter, axis][position]
        except KeyError:
            known = f"; not traced: {', '.join(self.untraced)}" if self.untraced else ""
            raise InputError(
                f"{parameter}, axis {axis}, position {position} is in no group{known}"
            ) from None


class _Groups:
    """Union-find over neurons, with what is known of each set."""

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.kinds: dict[int, set[str]] = {}
        self.open: set[int] = set()

    def new(self, count: int) -> Labels:
        first = len(self.parents)
        self.parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def find(self, label: int) -> int:
        while self.parents[label] != label:
            self.parents[label] = self.parents[self.parents[label]]
            label = self.parents[label]
        return label

    def join(self, labels: Iterable[int]) -> None:
        roots = {self.find(int(label)) for label in labels if label != _NONE}
        if roots:
            first = min(roots)
            for root in roots:
                self.parents[root] = first

    def join_pairs(self, left: Labels, right: Labels) -> None:
        both = (left != _NONE) & (right != _NONE)
        for pair in np.unique(np.stack([left[both], right[both]], 1), axis=0):
            self.join(pair)

    def mark(self, labels: Labels, kind: str) -> None:
        for label in np.unique(labels[labels != _NONE]):
            self.kinds.setdefault(int(label), set()).add(kind)


@dataclass(frozen=True, eq=False)
class _Parameter:
    """A parameter as the graph hands it about: labels of each axis, in the order it is seen."""

    axes: tuple[Labels, ...]

    def transposed(self) -> _Parameter:
        return _Parameter(self.axes[::-1])


# The value of what could not be traced, and of what was computed from it up to the next matrix.
_UNTRACED = object()


class _Tracer:
    """Runs an exported graph on labels."""

    def __init__(self, program: ExportedProgram, names: Mapping[str, str]) -> None:
        self.groups = _Groups()
        self.untraced: dict[str, None] = {}
        self.axes: dict[str, tuple[Labels, ...]] = {}
        self._values: dict[str, Any] = {}
        parameters = program.graph_signature.inputs_to_parameters
        for node in program.graph_module.graph.nodes:
            if node.op == "placeholder" and node.name in parameters:
                name = names[parameters[node.name]]
                if name not in self.axes:
                    shape = program.state_dict[parameters[node.name]].shape
                    self.axes[name] = tuple(self.groups.new(size) for size in shape)
                self._values[node.name] = _Parameter(self.axes[name])
            elif node.op == "call_function":
                self._values[node.name] = self._run(node)
            elif node.op == "output":
                for found in node.all_input_nodes:
                    labels = self._labels(found)
                    if labels is not None:
                        self.groups.mark(labels, VOCABULARY)

    # -------------------------------------------------------------------------------- values

    def _value(self, argument: Any) -> Any:
        return self._values.get(argument.name) if isinstance(argument, torch.fx.Node) else argument

    def _labels(self, argument: Any) -> Labels | None:
        """The labels of an activation or a vector parameter; None for everything else."""
        value = self._value(argument)
        if isinstance(value, _Parameter):
            return value.axes[0] if len(value.axes) == 1 else None
        return value if isinstance(value, np.ndarray) else None

    def _filled(self, argument: Any) -> torch.Tensor:
        labels = self._labels(argument)
        if labels is None:
            return torch.full(tuple(argument.meta["val"].shape), _NONE, dtype=torch.int64)
        return torch.from_numpy(np.ascontiguousarray(labels))

    def _give_up(self, node: Node) -> object:
        stack = node.meta.get("nn_module_stack") or {}
        where = next(reversed(stack.values()), ("",))[0] if stack else ""
        self.untraced[f"{_name(node)} in {where or 'the model'}"] = None
        return self._open(node)

    def _open(self, node: Node) -> object:
        """Leave out all that goes in: which neurons are where in what comes out is not known."""
        for argument in node.all_input_nodes:
            value = self._value(argument)
            parts = value.axes if isinstance(value, _Parameter) else (self._labels(argument),)
            for labels in parts:
                if labels is not None:
                    self.groups.open.update(int(x) for x in np.unique(labels) if x != _NONE)
        return _UNTRACED

    # ---------------------------------------------------------------------------- operations

    def _run(self, node: Node) -> Any:
        name = _name(node)
        arguments: tuple[Any, ...] = node.args
        involved = [a for a in node.all_input_nodes if self._values.get(a.name) is not None]
        if not involved or name in _IGNORED:
            return None
        place = {"linear": 1, "addmm": 2}.get(name)
        if place is not None and isinstance(self._value(arguments[place]), _Parameter):
            if name == "linear":
                return self._linear(*arguments)
            bias, given, weight = arguments[:3]
            return self._linear(given, weight, bias, rows=1)
        if any(self._value(a) is _UNTRACED for a in involved):
            return self._open(node)
        if name == "getitem":
            found = self._value(arguments[0])
            return found[arguments[1]] if isinstance(found, list | tuple) else None
        if name == "embedding":
            return self._embedding(node)
        if name in ("layer_norm", "native_layer_norm", "rms_norm"):
            # Weight and bias, of which a root mean square norm has no bias.
            vectors = [self._labels(a) for a in node.args[2:4] if isinstance(a, torch.fx.Node)]
            return self._meet(node, [self._labels(node.args[0]), *vectors])
        weight = self._value(node.args[0])
        if isinstance(weight, _Parameter) and len(weight.axes) > 1:
            if name in ("t", "transpose", "permute") and len(weight.axes) == 2:
                return weight.transposed()
        elif name in _LAYOUT:
            return self._move(node)
        elif name in _REDUCTIONS:
            return self._reduce(node)
        elif name in _PRODUCTS:
            factors = [self._labels(a) for a in node.args[-2:]]
            if all(f is not None and f.ndim > 2 for f in factors):
                return self._product(node, factors)  # type: ignore[arg-type]
        elif name == "scaled_dot_product_attention":
            factors = [self._labels(a) for a in node.args[:3]]
            if all(f is not None and f.ndim > 2 for f in factors):
                return self._attention(node, *factors)  # type: ignore[arg-type]
        elif name in _ELEMENTWISE:
            return self._meet(node, [self._labels(a) for a in node.all_input_nodes])
        return self._give_up(node)

    def _linear(self, given: Any, weight: Any, bias: Any = None, rows: int = 0) -> Labels | None:
        """Columns go with the inputs; rows, with the bias, begin new neurons."""
        matrix, labels = self._value(weight), self._labels(given)
        assert isinstance(matrix, _Parameter)
        outputs, inputs = matrix.axes[rows], matrix.axes[1 - rows]
        if self._value(given) is _UNTRACED:
            self.groups.open.update(inputs.tolist())
        if labels is not None:
            for sample in labels.reshape(-1, len(inputs)):
                self.groups.join_pairs(sample, inputs)
        if bias is not None and (found := self._labels(bias)) is not None:
            self.groups.join_pairs(outputs, found)
        shape = (*given.meta["val"].shape[:-1], len(outputs))
        return np.broadcast_to(outputs, shape).copy()

    def _embedding(self, node: Node) -> Labels:
        table = self._value(node.args[0])
        assert isinstance(table, _Parameter)
        self.groups.mark(table.axes[0], VOCABULARY)
        self.groups.mark(table.axes[1], RESIDUAL)
        return np.broadcast_to(table.axes[1], tuple(node.meta["val"].shape)).copy()

    def _move(self, node: Node) -> Any:
        def labels(argument: Any) -> Any:
            return self._filled(argument) if isinstance(argument, torch.fx.Node) else argument

        arguments: Any = torch.fx.map_arg(node.args, labels)
        options = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
        assert callable(node.target)
        if _name(node) == "contiguous":
            return arguments[0].numpy()
        moved = node.target(*arguments, **options)
        if isinstance(moved, torch.Tensor):
            return moved.numpy().copy()
        return [part.numpy().copy() for part in moved]

    def _reduce(self, node: Node) -> Any:
        """Over neurons: a number that belongs to none. Over anything else: labels stay."""
        labels = self._filled(node.args[0])
        axes: Any = node.args[1]
        keep = node.args[2:3] == (True,)
        lowest = labels.amin(axes, keepdim=keep)
        same = lowest == labels.amax(axes, keepdim=keep)
        found: Labels = torch.where(same, lowest, _NONE).numpy().copy()
        return found if (found != _NONE).any() else None

    def _product(self, node: Node, factors: list[Labels]) -> Labels:
        """One structure for every index of the batch dimensions: a head."""
        shape = tuple(node.meta["val"].shape)
        left, right = (
            np.broadcast_to(f, (*shape[:-2], *f.shape[-2:])).reshape(-1, *f.shape[-2:])
            for f in factors
        )
        result = np.empty((len(left), *shape[-2:]), dtype=np.int64)
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            labels = np.unique(np.concatenate([a.ravel(), b.ravel()]))
            labels = labels[labels != _NONE]
            self.groups.join(labels)
            self.groups.mark(labels, HEAD)
            result[index] = labels[0] if len(labels) else _NONE
        return result.reshape(shape)

    def _attention(self, node: Node, query: Labels, key: Labels, value: Labels) -> Labels:
        """Two products: of queries and keys, and of their weights with the values."""
        if node.kwargs.get("enable_gqa"):
            times = query.shape[-3] // key.shape[-3]
            key, value = (np.repeat(labels, times, axis=-3) for labels in (key, value))
        return self._product(node, [self._product(node, [query, key]), value])

    def _meet(self, node: Node, found: list[Labels | None]) -> Labels | None:
        shape = tuple(node.meta["val"].shape)
        present = [labels for labels in found if labels is not None]
        # The largest first: vectors that are shared join nothing, and lend no labels.
        present.sort(key=lambda labels: -labels.size)
        result = np.broadcast_to(present[0], shape).copy()
        for labels in present[1:]:
            other = np.broadcast_to(labels, shape)
            if labels.size < result.size and self._is_shared(other, result):
                continue
            self.groups.join_pairs(result, other)
            result = np.where(result == _NONE, other, result)
        return result

    def _is_shared(self, small: Labels, large: Labels) -> bool:
        """Whether an element of a broadcast tensor meets several neurons: its out-degree."""
        both = (small != _NONE) & (large != _NONE)
        pairs = {
            (self.groups.find(int(a)), self.groups.find(int(b)))
            for a, b in np.unique(np.stack([small[both], large[both]], 1), axis=0)
        }
        return len(pairs) > len({a for a, _ in pairs})


def _name(node: Node) -> str:
    """``aten.add.Tensor`` -> ``add``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def trace(module: nn.Module, inputs: Mapping[str, torch.Tensor | bool]) -> Dependencies:
    """Return the dependency groups of a module.

    Labels are as many as the elements of the activations: meant for models of a few thousand
    parameters, which have the structure of the large ones.

    Args:
        module: in eval mode; it is not changed.
        inputs: keyword arguments of one call, by name.

    Raises:
        InputError: ``torch.export`` cannot trace it.
    """
    try:
        program = torch.export.export(module, (), dict(inputs), strict=False)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{type(module).__name__} cannot be traced by torch.export: {lines[0]}"
        ) from error
    # Tied parameters are one, under the name that comes first.
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }
    return _collect(_Tracer(program, names))


def discover(model: PreTrainedModel) -> Dependencies:
    """Return the dependency groups of a causal language model; see ``trace``."""
    ids = torch.arange(_TOKENS, device=model.device)[None]
    implementation, mode = model.config._attn_implementation, model.training
    # Heads show in the products that the eager form writes out.
    model.set_attn_implementation("eager")
    model.eval()
    try:
        return trace(model, {"input_ids": ids, "use_cache": False})
    finally:
        model.set_attn_implementation(implementation)
        model.train(mode)


def _collect(tracer: _Tracer) -> Dependencies:
    groups = tracer.groups
    kinds: dict[int, set[str]] = {}
    for label, found in groups.kinds.items():
        kinds.setdefault(groups.find(label), set()).update(found)
    unknown = {groups.find(label) for label in groups.open}
    members: dict[int, dict[tuple[str, int], list[int]]] = {}
    for name, axes in tracer.axes.items():
        for axis, labels in enumerate(axes):
            for position, label in enumerate(labels):
                places = members.setdefault(groups.find(int(label)), {})
                places.setdefault((name, axis), []).append(position)
    made: list[Group] = []
    index: dict[tuple[str, int], dict[int, Group]] = {}
    for root, places in members.items():
        kind = _kind(kinds.get(root, set()), places)
        if kind is None or root in unknown:
            continue
        slices = tuple(Slice(*place, tuple(places[place])) for place in sorted(places))
        made.append(group := Group(kind, slices))
        for part in slices:
            index.setdefault((part.parameter, part.axis), {}).update(
                dict.fromkeys(part.positions, group)
            )
    return Dependencies(tuple(made), tuple(tracer.untraced), index)


def _kind(marks: set[str], places: Mapping[tuple[str, int], list[int]]) -> str | None:
    """The kind of a group; None for what is shared and cannot go, such as a norm of every head."""
    for kind in (RESIDUAL, HEAD, VOCABULARY):
        if kind in marks:
            return kind
    axes = {axis for _, axis in places}
    return CHANNEL if axes == {0, 1} else None
