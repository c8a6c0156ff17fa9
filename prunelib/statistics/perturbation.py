"""Random directions that are regenerated from a seed and never stored.

A direction is a number ``k``: everything that it consists of is drawn anew, in chunks, whenever it
is needed, from a generator seeded by the run's seed, ``k`` and the place. While a layer runs with
``W + step z``, a copy of one matrix at a time takes the matrix's place; the weights themselves are
never written. Afterwards the gradient estimate ``sum_k c_k z_k`` of one parameter at a time is put
together from the numbers ``c_k`` alone.

Random numbers are drawn on the device of the parameter; devices of different kinds draw others.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from prunelib.statistics.fms import fms_sums, gate_slices, unit_parameters

if TYPE_CHECKING:
    from torch import nn

    from prunelib.families.base import Config, Family
    from prunelib.statistics.estimator import Estimator

# Numbers drawn at a time.
CHUNK = 1 << 18

Coefficients = Sequence[tuple[int, float]]


@cache
def _byte_signs(device: torch.device) -> torch.Tensor:
    """Return, for every byte, its bits as plus or minus 1, fp32 [256, 8]."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (2.0 * bits - 1).to(device)


class Perturbation(ABC):
    """Directions through all units of a model, one layer at a time.

    Args:
        settings: the estimator's.
        seed: of all directions.
    """

    def __init__(self, settings: Estimator, seed: int) -> None:
        self.settings = settings
        self.seed = seed

    def generator(self, direction: int, place: str, device: torch.device | str) -> torch.Generator:
        """Return the generator of what a direction has at a place."""
        digest = hashlib.sha256(f"{self.seed}/{direction}/{place}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:8]) >> 1)

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Return ``count`` numbers with mean 0 and variance 1, fp32."""
        device = generator.device
        if self.settings.distribution == "rademacher":
            # Eight signs of one random byte: on a CPU a third of the time of a number each.
            drawn = torch.empty(-(-count // 8), dtype=torch.uint8, device=device)
            drawn.random_(generator=generator)
            signs = torch.nn.functional.embedding(drawn.int(), _byte_signs(device))
            return signs.view(-1)[:count]
        return torch.empty(count, device=device).normal_(generator=generator)

    @abstractmethod
    @contextmanager
    def moved(self, index: int, layer: nn.Module, direction: int, step: float) -> Iterator[None]:
        """Let the layer compute as if it had been moved by ``step`` along the direction."""

    @abstractmethod
    def reduce(
        self, index: int, layer: nn.Module, coefficients: Coefficients
    ) -> dict[str, torch.Tensor]:
        """Return the statistics of the gradient estimate ``sum_k c_k z_k`` of one layer.

        Args:
            index: of the layer.
            layer: with its weights.
            coefficients: per direction its number ``k`` and ``c_k``, the mean's divisor included.
        """


class Weights(Perturbation):
    """Every weight that units own moves by a number of its own.

    Args:
        settings: the estimator's.
        seed: of all directions.
        family: the model's family.
        config: config.json of the model.
        norms: of input features, by ``<layer>.<parameter>``.
    """

    def __init__(
        self,
        settings: Estimator,
        seed: int,
        family: Family,
        config: Config,
        norms: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__(settings, seed)
        self._names = unit_parameters(family, config)
        self._norms = norms

    def chunks(
        self, direction: int, place: str, shape: torch.Size, device: torch.device | str
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (positions, their numbers, fp32 [positions]) of a flattened parameter."""
        generator, count = self.generator(direction, place, device), math.prod(shape)
        for start in range(0, count, CHUNK):
            part = slice(start, min(start + CHUNK, count))
            yield part, self.draw(part.stop - part.start, generator)

    def shifted(
        self, weight: torch.Tensor, place: str, direction: int, step: float
    ) -> torch.Tensor:
        """Return ``weight + step z``, added in fp32 and rounded to the weight's type."""
        moved = torch.empty_like(weight, memory_format=torch.contiguous_format)
        source, target = weight.reshape(-1), moved.view(-1)
        for part, numbers in self.chunks(direction, place, weight.shape, weight.device):
            target[part] = numbers.mul_(step).add_(source[part])
        return moved

    @contextmanager
    def moved(self, index: int, layer: nn.Module, direction: int, step: float) -> Iterator[None]:
        """Put a moved copy in the place of every matrix while it is used."""
        kept: dict[str, torch.Tensor] = {}

        def enter(names: Sequence[str]) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                for name in names:
                    parameter = layer.get_parameter(name)
                    kept[name] = parameter.data
                    parameter.data = self.shifted(
                        parameter.data, f"{index}.{name}", direction, step
                    )

            return hook

        def leave(*_: Any) -> None:
            while kept:
                name, data = kept.popitem()
                layer.get_parameter(name).data = data

        by_module: dict[str, list[str]] = {}
        for name in self._names:
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
        hooks: list[Any] = []
        for name, names in by_module.items():
            module = layer.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(enter(names)))
            hooks.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            leave()
            for hook in hooks:
                hook.remove()

    def gradient(
        self, place: str, shape: torch.Size, device: torch.device | str, coefficients: Coefficients
    ) -> torch.Tensor:
        """Return ``sum_k c_k z_k`` of one parameter, fp32, in its shape."""
        total = torch.zeros(shape, device=device)
        flat = total.view(-1)
        for direction, coefficient in coefficients:
            for part, numbers in self.chunks(direction, place, shape, device):
                flat[part].add_(numbers, alpha=coefficient)
        return total

    def reduce(
        self, index: int, layer: nn.Module, coefficients: Coefficients
    ) -> dict[str, torch.Tensor]:
        """Return ``.fms.rows`` and ``.fms.columns`` of all parameters that units own."""
        statistics: dict[str, torch.Tensor] = {}
        for name in self._names:
            place, weight = f"{index}.{name}", layer.get_parameter(name).detach()
            product = self.gradient(place, weight.shape, weight.device, coefficients).mul_(weight)
            statistics |= fms_sums(place, product, self._norms[place])
        return statistics


class LowRank(Weights):
    """As ``Weights``, but a matrix [m, n] moves along ``U z V^T sqrt(mn) / r`` of rank r.

    U [m, r] and V [n, r] are orthonormal (QR of Gaussian matrices) and z [r, r] has numbers of
    variance 1, all drawn anew for every direction: SubZero (arXiv 2410.08989), which keeps U and V
    for many steps. The factor makes the mean of ``Z <Z, G>`` equal to ``G``. Biases move as there.
    """

    def chunks(
        self, direction: int, place: str, shape: torch.Size, device: torch.device | str
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (positions, their numbers, fp32 [positions]) of a flattened parameter."""
        if len(shape) != 2:
            yield from super().chunks(direction, place, shape, device)
            return
        (rows, columns), rank = shape, min(self.settings.rank, *shape)
        generator = self.generator(direction, place, device)

        def basis(size: int) -> torch.Tensor:
            gauss = torch.randn(size, rank, generator=generator, device=device)
            orthonormal: torch.Tensor = torch.linalg.qr(gauss)[0]
            return orthonormal

        left, right = basis(rows), basis(columns)
        middle = self.draw(rank * rank, generator).view(rank, rank)
        left = left @ middle.mul_(math.sqrt(rows * columns) / rank)
        step = max(CHUNK // columns, 1)
        for start in range(0, rows, step):
            part = left[start : start + step] @ right.T
            yield slice(start * columns, start * columns + part.numel()), part.view(-1)


class Gates(Perturbation):
    """Every unit has one factor on its input columns of the output or down projection.

    Args:
        settings: the estimator's.
        seed: of all directions.
        family: the model's family.
        config: config.json of the model.
        kinds: whose units have gates; no two may own the same columns.
    """

    def __init__(
        self,
        settings: Estimator,
        seed: int,
        family: Family,
        config: Config,
        kinds: Sequence[str],
    ) -> None:
        super().__init__(settings, seed)
        self._gates = gate_slices(family, config, kinds)
        self._counts = {kind: family.kind(config, kind).count for kind in kinds}

    def numbers(self, direction: int, index: int, kind: str) -> torch.Tensor:
        """Return what a direction has at the gates of one kind in one layer, fp32 [units].

        They are few, so that the CPU draws them for every device.
        """
        generator = self.generator(direction, f"{index}.{kind}", "cpu")
        return self.draw(self._counts[kind], generator)

    @contextmanager
    def moved(self, index: int, layer: nn.Module, direction: int, step: float) -> Iterator[None]:
        """Multiply the inputs of the output and down projections by ``1 + step z``."""

        def scale(kind: str) -> Any:
            factors = 1 + step * self.numbers(direction, index, kind)
            factors = factors[torch.from_numpy(self._gates[kind].owner)]

            def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
                scaled = args[0].float() * factors.to(args[0].device)
                return (scaled.to(args[0].dtype), *args[1:])

            return hook

        hooks = [
            layer.get_submodule(part.parameter.rpartition(".")[0]).register_forward_pre_hook(
                scale(kind)
            )
            for kind, part in self._gates.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def reduce(
        self, index: int, layer: nn.Module, coefficients: Coefficients
    ) -> dict[str, torch.Tensor]:
        """Return ``<layer>.<kind>.gate`` [units], fp64."""
        return {
            f"{index}.{kind}.gate": torch.stack(
                [c * self.numbers(k, index, kind).double() for k, c in coefficients]
            ).sum(0)
            for kind in self._gates
        }
