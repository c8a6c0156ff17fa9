"""Gradients estimated from forward passes alone (MINI-LLM, arXiv 2407.11681, equation 7).

First the unchanged model gives the norms of all input features. Then every direction ``z_k`` of the
estimator (``prunelib.statistics.estimator``) gives the number ``c_k``, a difference of losses in
fp64. What is kept of the directions is their numbers: at the end one layer after the other is
visited once more, ``1/n sum_k c_k z_k`` is regenerated parameter by parameter and reduced with
the weights and norms (``prunelib.statistics.fms``). So memory holds the weights, hidden states, and
what one matrix takes; with ``streamed`` layers not even the weights.

Only parameters that heads or MLP channels own are perturbed. Embeddings, norms and the head own no
unit, so that moving them would only add noise; a tied embedding is as it was for both of its uses.

* tensors of ``prunelib.statistics.fms``: ``.fms`` of weights, or ``.gate`` and ``.norm`` of gates;
* ``coefficients`` [layers, perturbations], fp64: ``c_k`` by layer; with one scope all rows agree;
* ``forward_passes`` []: windows through layers, all in all, in passes of all windows through all
  layers;
* ``loss`` []: of the unchanged model over all windows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from prunelib.errors import InputError, NonFiniteError
from prunelib.statistics.batches import progress
from prunelib.statistics.estimator import Estimator
from prunelib.statistics.fms import KINDS, gate_norms, gate_slices, input_norms
from prunelib.statistics.layerwise import Layers, Stream, StreamedLayers, layers_of
from prunelib.statistics.perturbation import Gates, LowRank, Perturbation, Weights

if TYPE_CHECKING:
    from prunelib.statistics.inputs import PassInputs

__all__ = ["StreamedLayers", "collect"]

logger = logging.getLogger(__name__)

# Hidden states that go through the layers side by side; the result does not depend on it.
STREAM_BYTES = 32 * 1024**2


def _minibatches(settings: Estimator, windows: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Return the windows of every direction's losses; the same tensor where they are shared.

    Raises:
        InputError: there are fewer windows than a minibatch has.
    """
    size, count = settings.minibatch, settings.perturbations
    if size > len(windows):
        raise InputError(
            f"minibatch {size} given; at most the {len(windows)} calibration windows allowed"
        )
    if not size:
        return [windows] * count

    def drawn(number: int) -> torch.Tensor:
        rows = np.random.default_rng([seed, number]).permutation(len(windows))[:size]
        return windows[torch.from_numpy(rows)]

    return [drawn(number) for number in range(count)] if settings.fresh else [drawn(0)] * count


class _Losses:
    """Loss differences along directions, for streams that start at some layer."""

    def __init__(
        self,
        layers: Layers,
        perturbation: Perturbation,
        settings: Estimator,
        minibatches: Sequence[torch.Tensor],
        batch_windows: int,
    ) -> None:
        self._layers = layers
        self._perturbation = perturbation
        self._settings = settings
        begun: dict[int, Stream] = {}
        for windows in minibatches:
            if id(windows) not in begun:
                begun[id(windows)] = layers.begin(windows, batch_windows)
        self.origins = list(begun.values())
        self._origin = [begun[id(windows)] for windows in minibatches]
        self._baselines: dict[Stream, float] = {}
        if settings.sides == 1:
            ends = [origin.branch() for origin in self.origins]
            for index, layer in layers.sweep():
                for end in ends:
                    layers.advance(index, layer, end)
            self._baselines = {
                origin: layers.loss(end) for origin, end in zip(self.origins, ends, strict=True)
            }

    def coefficients(self, start: int, only: int | None) -> list[float]:
        """Return ``c_k`` of every direction.

        Args:
            start: the layer that the origins have reached.
            only: the one layer that moves; None for all.

        Raises:
            NonFiniteError: a loss is NaN or infinite; names the direction.
        """
        settings, epsilon = self._settings, self._settings.epsilon
        steps = (epsilon, -epsilon)[: settings.sides]
        size = max(stream.nbytes for stream in self.origins)
        together = max(STREAM_BYTES // (size * len(steps)), 1)
        found: list[float] = []
        numbers = range(settings.perturbations)
        groups = [numbers[first : first + together] for first in numbers[::together]]
        for group in progress(groups, len(groups), "groups of directions", logger):
            runs = [(k, step, self._origin[k].branch()) for k in group for step in steps]
            for index, layer in self._layers.sweep(start):
                for k, step, stream in runs:
                    moves = only is None or index == only
                    with (
                        self._perturbation.moved(index, layer, k, step) if moves else nullcontext()
                    ):
                        self._layers.advance(index, layer, stream)
            losses = [self._layers.loss(stream) for _, _, stream in runs]
            for number, k in enumerate(group):
                ends = losses[number * len(steps) : (number + 1) * len(steps)]
                if settings.sides == 1:
                    ends.append(self._baselines[self._origin[k]])
                if not all(math.isfinite(loss) for loss in ends):
                    raise NonFiniteError(
                        f"zeroth_order: the losses along direction {k} are {ends[0]}, {ends[1]}"
                    )
                found.append((ends[0] - ends[1]) / (settings.sides * epsilon))
        return found


@dataclass(eq=False)
class Estimate:
    """What is known of a gradient once all losses are there.

    Attributes:
        perturbation: draws the directions again.
        coefficients: ``c_k``, float64 [layers, perturbations].
        statistics: ``loss``, ``forward_passes``, ``coefficients`` and, of gates, ``.norm``.
    """

    perturbation: Perturbation
    coefficients: torch.Tensor
    statistics: dict[str, torch.Tensor]

    def reduce(self, layers: Layers, count: int | None = None) -> dict[str, torch.Tensor]:
        """Return the statistics of the mean over the first ``count`` directions, by default all.

        Raises:
            NonFiniteError: names the layer.
        """
        statistics: dict[str, torch.Tensor] = {}
        for index, layer in layers.sweep():
            chosen = self.coefficients[index][:count].tolist()
            mean = [(k, c / len(chosen)) for k, c in enumerate(chosen)]
            reduced = self.perturbation.reduce(index, layer, mean)
            if not all(value.isfinite().all() for value in reduced.values()):
                raise NonFiniteError(f"zeroth_order: layer {index} is not finite")
            statistics |= reduced
        return statistics


def estimate(
    layers: Layers,
    inputs: PassInputs,
    seed: int,
    settings: Estimator,
    kinds: Sequence[str] = KINDS,
) -> Estimate:
    """Find the loss differences along all directions; arguments and errors as of ``collect``."""
    config, windows, batch_windows = inputs.config, inputs.windows, inputs.batch_windows
    minibatches = _minibatches(settings, windows, seed)
    before = layers.windows_passed
    norms, loss = input_norms(layers, config, windows, batch_windows, "zeroth_order")
    family, count = layers.family, len(layers.modules)
    statistics: dict[str, torch.Tensor] = {}
    perturbation: Perturbation
    if settings.perturbation == "gates":
        perturbation = Gates(settings, seed, family, config, kinds)
        statistics |= gate_norms(norms, gate_slices(family, config, kinds), count)
    else:
        made = LowRank if settings.perturbation == "low_rank" else Weights
        perturbation = made(settings, seed, family, config, norms)
    losses = _Losses(layers, perturbation, settings, minibatches, batch_windows)
    if settings.scope == "model":
        table = [losses.coefficients(0, None)] * count
    else:
        table = []
        for index in range(count):
            table.append(losses.coefficients(index, index))
            for _, layer in layers.sweep(index, index + 1):
                for origin in losses.origins:
                    layers.advance(index, layer, origin)
    passes = (layers.windows_passed - before) / (count * len(windows))
    for name, value in {"loss": loss, "forward_passes": passes, "coefficients": table}.items():
        statistics[name] = torch.tensor(value, dtype=torch.float64)
    return Estimate(perturbation, statistics["coefficients"], statistics)


def collect(
    inputs: PassInputs,
    *,
    seed: int,
    kinds: Sequence[str] = KINDS,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """Return the statistics above, on the CPU.

    Args:
        inputs: model and windows.
        seed: of the directions and of the minibatches.
        kinds: whose units have gates.
        settings: of ``Estimator``.

    Raises:
        InputError: a setting is not allowed, or a minibatch is larger than the calibration set.
        NonFiniteError: an activation or a loss is NaN or infinite; names the layer or direction.
    """
    layers = layers_of(inputs)
    found = estimate(layers, inputs, seed, Estimator(**settings), kinds)
    return found.statistics | found.reduce(layers)
