"""Data parallel recovery: several processes on one machine, each with a copy of the model.

The step's own process is rank 0. It starts the others as copies of its command, and they end with
it; rank 0 alone reads a stream, saves states and writes the artefact. Every rank passes its share
of a step's micro-batches forward and backward, and the sums of the gradients are added up once a
step: what comes out is the gradient of the whole batch. The process group is accelerate's; none of
its checkpoints is written, and no Python object is sent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunelib.errors import InputError

if TYPE_CHECKING:
    import torch

    from prunelib.provenance.step import StepRequest

HELPER = "PRUNELIB_RECOVERY_HELPER"
"""Marks the environment of a process that another one has started."""

# What accelerate reads. Nothing leaves the machine.
_HOST = "127.0.0.1"
_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: this one's number; 0 is the main process.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this process saves and writes."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Return this process's own device for the run's ``name``."""
        import torch

        if self.count == 1 or name == "cpu" or not torch.cuda.is_available():
            return name
        return f"cuda:{self.rank}"

    def share(self, items: Sequence[Any]) -> list[Any]:
        """Return this process's part of ``items``; all parts together are all items."""
        return list(items[self.rank :: self.count])

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace fp32 ``tensors`` by their sums over all processes, sent as one piece."""
        if self.count == 1:
            return
        import torch
        from accelerate.utils import reduce

        tensors = list(tensors)
        flat = reduce(torch.cat([tensor.flatten() for tensor in tensors]), reduction="sum")
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def total(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Return the sums of ``values`` over all processes, in fp64."""
        if self.count == 1:
            return list(values)
        import torch
        from accelerate.utils import reduce

        sums = reduce(torch.tensor(values, dtype=torch.float64, device=device), reduction="sum")
        found: list[float] = sums.tolist()
        return found

    def from_main(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the main process's ``tensor``; the others give one of its shape and dtype."""
        if self.count == 1:
            return tensor
        from accelerate.utils import broadcast

        sent: torch.Tensor = broadcast(tensor.to(device).contiguous()).to(tensor.device)
        return sent

    def collect(self, tensor: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
        """Return every process's ``tensor``, all of one shape and dtype, by rank."""
        if self.count == 1:
            return [tensor]
        from accelerate.utils import gather

        parts = gather(tensor.to(device)[None]).to(tensor.device)
        return list(parts)


ALONE = Processes()


def _check(count: int, device: str) -> None:
    import torch

    visible = torch.cuda.device_count()
    if device.startswith("cuda:"):
        raise InputError(
            f"recovery: device {device} is one GPU and the recipe asks for {count} processes; "
            "allowed: device cuda"
        )
    if device != "cpu" and visible and visible < count:
        raise InputError(
            f"recovery: the recipe asks for {count} processes, one per GPU; {visible} are visible"
        )


def _environment(rank: int, count: int, port: str) -> dict[str, str]:
    values = (rank, rank, count, count, _HOST, port)
    return dict(zip(_NAMES, map(str, values), strict=True))


def is_helper() -> bool:
    """Whether this process was started by `started` in another one."""
    return os.environ.get(HELPER) == "1"


@contextlib.contextmanager
def _joined(device: str) -> Iterator[Processes]:
    """Join the process group that the environment describes."""
    import torch
    from accelerate import PartialState

    PartialState._reset_state()
    threads = torch.get_num_threads()
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu)
    # Accelerate sets threads of its own where OMP_NUM_THREADS does not say how many.
    torch.set_num_threads(threads)
    try:
        yield Processes(state.process_index, state.num_processes)
    finally:
        state.destroy_process_group()
        PartialState._reset_state()


@contextlib.contextmanager
def started(count: int, device: str, command: Sequence[str]) -> Iterator[Processes]:
    """Start the other processes of a run and join them.

    Args:
        count: how many processes there are with this one.
        device: ``auto``, ``cpu`` or ``cuda``; on GPUs every process has one of its own.
        command: what starts a process that calls `run_helper`, or in a helper: anything.

    Raises:
        InputError: there are fewer GPUs than processes, or the device is one GPU.
    """
    if count == 1:
        yield ALONE
        return
    if is_helper():
        with _joined(device) as processes:
            yield processes
        return
    _check(count, device)
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port = str(probe.getsockname()[1])
    before = {name: os.environ.get(name) for name in _NAMES}
    helpers = [
        # It reads its standard input, which ends with this process.
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            env=os.environ | _environment(rank, count, port) | {HELPER: "1"},
        )
        for rank in range(1, count)
    ]
    try:
        os.environ.update(_environment(0, count, port))
        with _joined(device) as processes:
            yield processes
        for helper in helpers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                helper.wait(60)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        for helper in helpers:
            helper.kill()
            helper.wait()


def run_helper(main: Callable[[StepRequest, Path], None]) -> None:
    """Run a step's ``main`` in a process that `started` has started; it writes nothing."""
    from prunelib.provenance.step import StepRequest

    # The main process decides when a run ends.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = StepRequest.from_json(sys.argv[sys.argv.index("--request") + 1])
    main(request, request.out)


def _end_with_parent() -> None:
    # Nothing is ever written to it.
    os.read(0, 1)
    os._exit(1)
