"""Resources of every step: memory, GPUs, time and disk, from the arithmetic of what it does.

Everything follows from the model's shapes and the step's parameters; nothing is fetched or loaded,
and nothing here imports torch: the workflow asks while it plans. Rates, factors and limits come
from ``config/cluster.yaml``. Where a formula takes an upper bound it says so; a pruned model has
the unpruned model's widths as its bound, and its target's ratio for its weights.

Sizes are in bytes and rates per second unless a name says otherwise; ``_mb`` is MiB, as in SLURM.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from prunelib.cluster.settings import DEVICE_STEPS, Cluster
from prunelib.cluster.step_work import STEPS
from prunelib.cluster.work import GB, MIB, Case, Term, Work, listed, need
from prunelib.errors import InputError
from prunelib.experiment.graph import Node


@dataclass(frozen=True)
class Request:
    """What one job asks for.

    Attributes:
        gpus: GPUs of the type asked about.
        mem_mb: host memory, MiB.
        runtime: minutes.
        cpus: CPU cores.
        exclusive: whether the node must run nothing else (timings).
        gpu_mem_mb: estimated need on the device, MiB, all GPUs together; 0 without GPUs.
        disk_mb: size of the artefact that it leaves, MiB.
        seconds: expected time, before the safety factor.
        explanation: one sentence, how memory follows from the step's arithmetic.
    """

    gpus: int
    mem_mb: int
    runtime: int
    cpus: int
    exclusive: bool
    gpu_mem_mb: int
    disk_mb: int
    seconds: float
    explanation: str


def _seconds(case: Case, work: Work, cpus: int) -> float:
    """Return the expected time; layers spread over several GPUs compute one after another."""
    host, share = case.cluster.host, case.cluster.utilisation
    if case.on_gpu:
        dtype = case.param("dtype")
        tflops = case.gpu.float32_tflops if dtype == "float32" else case.gpu.bfloat16_tflops
        rate, bandwidth = tflops * 1e12 * share.gpu, case.gpu.bandwidth_gbs
    else:
        rate, bandwidth = host.gflops_per_core * GB * cpus * share.cpu, host.memory_gbs
    moved = work.moved / (bandwidth * GB * share.bandwidth)
    return host.startup_seconds + work.host_seconds + work.flops / work.replicas / rate + moved


def _gpus(case: Case, need: float, growth: float, gpu_type: str) -> int:
    """Return the GPUs for ``need`` bytes; refuse what one node cannot hold at the first attempt."""
    device, most = str(case.param("device")), case.cluster.limits.gpus
    least = math.ceil(need / case.usable)
    index = int(device.partition(":")[2] or -1)
    if index >= most:
        raise InputError(
            f"{case.cluster.path}: limits.gpus is {most}; device {device} needs {index + 1} GPUs"
        )
    # A device with a number is one GPU, which must be visible under that number.
    room = 1 if index >= 0 else most
    if least > room:
        raise InputError(
            f"{case.cluster.path}: {case.node.step} of {'/'.join(case.node.labels)} needs "
            f"{need / GB:.1f} GB on device {device}, {least} x {gpu_type} with "
            f"{case.usable / GB:.1f} GB usable each; allowed: at most {room} on one node"
        )
    if index >= 0:
        return index + 1
    return min(math.ceil(need * growth / case.usable), most)


def _gpus_of_replicas(case: Case, need: float, replicas: int) -> int:
    """Return the GPUs of data parallel processes; refuse more than a node has, or a split model."""
    if need > case.usable or replicas > case.cluster.limits.gpus:
        raise InputError(
            f"{case.cluster.path}: {case.node.step} of {'/'.join(case.node.labels)} asks for "
            f"{replicas} processes of {need / GB:.1f} GB, one per GPU; allowed: at most "
            f"{case.cluster.limits.gpus} on one node, {case.usable / GB:.1f} GB usable each"
        )
    return replicas


def request(node: Node, cluster: Cluster, attempt: int = 1, gpu_type: str | None = None) -> Request:
    """Return what the job of a step asks for.

    Args:
        node: the step.
        cluster: rates, factors, floors and limits.
        attempt: 1 for the first try; memory, GPUs and time grow with every other one.
        gpu_type: a type of the cluster file; None for its default.

    Raises:
        InputError: the GPU type is unknown, or the first attempt does not fit on one node.
    """
    name, _ = cluster.gpu(gpu_type)
    return _request(node, cluster, attempt, name)


def is_local(step: str, nodes: Iterable[Node], cluster: Cluster) -> bool:
    """Return whether a step's jobs run where the workflow was started.

    Some always do; those without a GPU also when all of them are expected to compute for less than
    ``local_below_seconds``.
    """
    if step in cluster.local_steps or step in DEVICE_STEPS:
        return step in cluster.local_steps
    most = cluster.host.startup_seconds + cluster.local_below_seconds
    return all(request(node, cluster).seconds < most for node in nodes if node.step == step)


@cache
def _request(node: Node, cluster: Cluster, attempt: int, gpu_type: str) -> Request:
    case = Case(node, cluster, cluster.gpus[gpu_type])
    rules, host, limits = cluster.steps[node.step], cluster.host, cluster.limits
    work = STEPS[node.step](case)
    cpus = max(rules.cpus, work.replicas * int(node.params.get("threads") or 1))
    seconds = _seconds(case, work, int(node.params.get("threads") or 1))
    growth = rules.memory_growth ** (attempt - 1)
    base = (host.python_mb + host.snakemake_mb) * MIB
    gpus, gpu_need, where = 0, 0.0, ""
    terms, replicas = work.host, work.replicas
    if case.on_gpu:
        base += host.cuda_mb * MIB
        gpu_need = need(work.device, rules.memory_factor)
        gpus = _gpus(case, gpu_need, growth, gpu_type)
        if replicas > 1:
            gpus, gpu_need = _gpus_of_replicas(case, gpu_need, replicas), gpu_need * replicas
        where = f"GPU memory {gpu_need / GB:.1f} GB: {listed(work.device)}"
    else:
        terms = work.device + work.host
    memory = (base + need(terms, rules.memory_factor)) * replicas / MIB
    if memory > limits.mem_mb:
        raise InputError(
            f"{cluster.path}: {node.step} of {'/'.join(node.labels)} needs "
            f"{math.ceil(memory):,} MiB of host memory; limits.mem_mb is {limits.mem_mb:,}"
        )
    runtime = max(rules.min_runtime, math.ceil(seconds * rules.time_factor / 60))
    what = "; host memory" if gpus else "Host memory"
    processes = Term("Python and Snakemake" + (" and CUDA" if gpus else ""), base, False)
    return Request(
        gpus=gpus,
        mem_mb=min(math.ceil(max(memory, rules.min_mem_mb) * growth), limits.mem_mb),
        runtime=min(
            math.ceil(runtime * rules.time_growth ** (attempt - 1)),
            limits.runtime,
        ),
        cpus=cpus,
        exclusive=node.step == "efficiency",
        gpu_mem_mb=math.ceil(gpu_need / MIB),
        disk_mb=math.ceil(work.disk / MIB),
        seconds=seconds,
        explanation=f"{where}{what} {memory * MIB / GB:.1f} GB: "
        f"{listed((processes, *terms))}; estimated parts x {rules.memory_factor:g}"
        + (f", all of it in each of {replicas} processes." if replicas > 1 else "."),
    )
