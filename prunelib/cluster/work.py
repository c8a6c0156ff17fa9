"""What a step holds and does: terms of memory, products, transfers and seconds.

Sizes are in bytes and rates per second unless a name says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from prunelib.cluster.geometry import ITEM_BYTES, Model, model_of
from prunelib.cluster.settings import Cluster, Gpu
from prunelib.experiment.graph import Node

MIB = 1024**2
GB = 10**9
# A tokenised text: ids, masks, offsets and the tokens' strings, until the ids alone are kept.
TOKEN_BYTES = 300
# Metrics, windows, summaries.
SMALL_BYTES = 10**6


@dataclass(frozen=True)
class Term:
    """A part of the memory need; ``estimated`` ones get the step's safety factor."""

    label: str
    size: float
    estimated: bool = True


@dataclass(frozen=True)
class Work:
    """What a step holds and does.

    Attributes:
        device: memory on the compute device.
        host: memory of the host besides.
        flops: matrix products on the device.
        moved: bytes that must pass through the device's memory beyond the products.
        host_seconds: reading, writing, hashing and plain loops on the host.
        disk: size of the artefact.
        replicas: processes that hold all of it and share the products; on GPUs one for each.
    """

    device: tuple[Term, ...] = ()
    host: tuple[Term, ...] = ()
    flops: float = 0.0
    moved: float = 0.0
    host_seconds: float = 0.0
    disk: float = SMALL_BYTES
    replicas: int = 1


@dataclass(frozen=True, eq=False)
class Case:
    """A step on a cluster, with what its formulas look at."""

    node: Node
    cluster: Cluster
    gpu: Gpu

    @property
    def on_gpu(self) -> bool:
        """Whether the step computes on GPUs."""
        return self.cluster.wants_gpu(self.node)

    @property
    def model(self) -> Model:
        """The unpruned model that the step works on; of steps on texts alone there is none."""
        model = model_of(self.node)
        assert model is not None
        return model

    @property
    def usable(self) -> float:
        """Bytes of one GPU that tensors get."""
        return self.gpu.memory_gb * GB * self.cluster.usable

    @property
    def item(self) -> int:
        """Bytes of a number in the step's products; a CPU computes in fp32."""
        return ITEM_BYTES[str(self.node.params["dtype"])] if self.on_gpu else 4

    def param(self, name: str) -> Any:
        """Return a parameter of the step."""
        return self.node.params[name]

    def text_tokens(self, split: str) -> int:
        """Expected tokens of a split of the step's text."""
        text = self.node.inputs["text"].params
        share = float(text.get("split", {}).get(split, 1))
        return math.ceil(self.cluster.tokens_of(str(text["name"])) * share)

    def records(self) -> tuple[int, int]:
        """Expected records of the step's text for training and for validation; 0 for articles."""
        text = self.node.inputs["text"].params
        if text["format"] != "alpaca":
            return 0, 0
        count, validation = self.cluster.records_of(str(text["name"])), text["validation"]
        aside = validation if validation >= 1 else math.floor(count * validation)
        return max(count - aside, 1), aside

    def read_seconds(self, size: float) -> float:
        """Return the time of reading and hashing ``size`` bytes."""
        return size / GB * (1 / self.cluster.host.disk_gbs + 1 / self.cluster.host.hash_gbs)

    def mapped(self, what: str, size: float) -> Term:
        """Return mapped files as the cluster's accounting counts them."""
        share = self.cluster.host.mapped_share
        counted = "" if share == 1 else f", of which {share:.0%} count"
        return Term(what + counted, size * share, estimated=False)


def billions(count: float) -> str:
    """Return a count as a label: 6.738e9, 134.5e6."""
    return f"{count / GB:.4g}e9" if count >= GB else f"{count / 1e6:.4g}e6"


def loaded(case: Case, parameters: int) -> tuple[tuple[Term, ...], tuple[Term, ...], float]:
    """Return device terms, host terms and seconds of ``checkpoint.load_model``.

    On a CPU fp32 weights are views of the mapped file; weights of another dtype are converted in
    memory, and bf16 weights are rounded first and widened after. Before they go to a single GPU,
    weights of another dtype are converted on the host; with several each goes there by itself.
    """
    stored = parameters * case.model.item
    seconds = case.read_seconds(stored)
    item, count = case.item, billions(parameters)
    if case.on_gpu:
        weights = Term(f"weights {count} x {item} B", parameters * item, estimated=False)
        host = [case.mapped(f"mapped weight file {count} x {case.model.item} B", stored)]
        if case.param("dtype") != case.model.dtype and weights.size <= case.usable:
            label = f"their conversion to {case.param('dtype')}"
            host.append(Term(label, weights.size, estimated=False))
        return (weights,), tuple(host), seconds
    terms = [Term(f"weights {count} x 4 B", parameters * 4, estimated=False)]
    if case.param("dtype") == "bfloat16":
        terms.append(Term(f"their rounding to {count} x 2 B", parameters * 2, estimated=False))
    elif case.model.dtype != "float32":
        terms.append(case.mapped(f"mapped weight file {count} x {case.model.item} B", stored))
    return tuple(terms), (), seconds


def tokenised(tokens: int, size: int = TOKEN_BYTES) -> Term:
    """Return what a tokenised text takes at its peak."""
    return Term(f"tokenised text {tokens:,} x {size} B", tokens * size)


def need(terms: tuple[Term, ...], factor: float) -> float:
    """Return the bytes of ``terms``, estimated ones times ``factor``."""
    return sum(term.size * (factor if term.estimated else 1) for term in terms)


def listed(terms: tuple[Term, ...]) -> str:
    """Return ``terms`` with their sizes as a line."""
    return " + ".join(f"{term.label} ({term.size / GB:.3g} GB)" for term in terms)
