"""Devices, dtypes and the description of the hardware that a figure was measured on."""

from __future__ import annotations

import logging
import os
import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunelib.errors import InputError, PrunelibError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")


def resolve_device(name: str) -> torch.device:
    """Return the torch device called ``name``; ``auto`` takes a GPU where there is one.

    Raises:
        InputError: the name is unknown, or names a GPU that this machine does not have.
        PrunelibError: SLURM gave this job a GPU that cannot be used: another node may do better.
    """
    import torch

    given = os.environ.get("SLURM_JOB_ID") and os.environ.get("CUDA_VISIBLE_DEVICES")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if given and name == "cpu":
            _log.warning("SLURM gave GPU %s, but torch sees none: computing on the CPU", given)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is unknown; allowed: auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        if given:
            raise PrunelibError(
                f"device {name!r}: SLURM gave GPU {given} of node {platform.node()}, but torch "
                "sees none: the node's driver, or a torch built without CUDA"
            )
        raise InputError(f"device {name!r} was asked for, but no GPU is visible here")
    return device


def resolve_dtype(name: str) -> torch.dtype:
    """Return the torch dtype for ``name``.

    fp16 is not offered: its gradients overflow or vanish without loss scaling.

    Raises:
        InputError: the name is not one of ``DTYPES``.
    """
    import torch

    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not supported; allowed: {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@cache
def _cpu_model() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def hardware(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Describe the hardware that a figure is measured on (JSON-serialisable).

    Keys: ``device`` (cpu or cuda), ``name``, ``count``, ``threads``, ``host_cpus``, and for GPUs
    ``cuda`` and ``memory_bytes``.
    """
    import torch

    device = torch.device(device)
    facts: dict[str, Any] = {
        "device": device.type,
        "name": _cpu_model(),
        "count": 1,
        "threads": torch.get_num_threads(),
        "host_cpus": os.cpu_count(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "memory_bytes": properties.total_memory,
        }
    return facts
