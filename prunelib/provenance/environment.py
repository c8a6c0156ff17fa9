"""What a record says about where a result was made. None of it is part of a key."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from prunelib.provenance.liveness import host_name

_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "MALLOC_MMAP_THRESHOLD_",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_GPUS",
    "SLURM_JOB_ID",
    "SLURM_JOB_PARTITION",
    "SLURM_STEP_GPUS",
    "SLURMD_NODENAME",
)
"""The only environment variables that are ever written down: records are published."""


def describe(root: Path) -> dict[str, Any]:
    """Return Python, host, git state, command line and the listed environment variables.

    Args:
        root: the directory whose git commit is recorded.
    """
    return {
        "python": platform.python_version(),
        "host": {
            "name": host_name(),
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
        },
        "git": git_state(root),
        "command": list(sys.argv),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def git_state(root: Path) -> dict[str, Any] | None:
    """Return ``{"commit": sha, "dirty": bool}`` of the checkout at ``root``, None without one.

    Optional locks are off: a hundred steps at once must not hinder a person's ``git commit``.
    """
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty"]
    command += ["--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    commit, _, dirty = done.stdout.strip().partition("-")
    return {"commit": commit, "dirty": bool(dirty)}


def visible_gpus() -> list[dict[str, str]] | None:
    """Return uuid, name, driver and memory of the GPUs that this process was given.

    ``CUDA_VISIBLE_DEVICES`` decides, which SLURM sets to what the job got. None where
    ``nvidia-smi`` does not answer: then there is no NVIDIA driver.
    """
    command = [
        "nvidia-smi",
        "--format=csv,noheader",
        "--query-gpu=uuid,name,driver_version,memory.total",
    ]
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices == "":
        return []
    if devices:
        command.append(f"--id={devices}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    names = ("uuid", "name", "driver", "memory")
    return [
        dict(zip(names, (value.strip() for value in line.split(",")), strict=True))
        for line in done.stdout.splitlines()
    ]


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process in bytes (VmHWM where there is one)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory_bytes() -> int | None:
    """Return the most that this process's tensors took on GPUs, summed; None if it used none.

    Counted since a step last set torch's counters back.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    peaks = (torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return int(sum(peaks))
