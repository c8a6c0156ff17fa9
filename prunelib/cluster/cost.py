"""What an experiment costs: jobs, GPU-hours, memory, time and disk by step, before it is run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prunelib.cluster.geometry import model_name
from prunelib.cluster.resources import Request, is_local, request
from prunelib.cluster.settings import Cluster
from prunelib.cluster.work import MIB
from prunelib.experiment.graph import SCRIPTS, Node

_ORDER = tuple(SCRIPTS)


@dataclass(frozen=True)
class CostRow:
    """All jobs of one step.

    Attributes:
        step: the step.
        local: whether its jobs run where the workflow was started.
        jobs: number of jobs.
        gpus: most GPUs of one job.
        gpu_hours: expected hours times GPUs, all jobs.
        cpu_hours: expected hours times cores, all jobs.
        mem_mb: most host memory that one job asks for, MiB.
        runtime: longest time that one job asks for, minutes.
        disk_mb: size of all artefacts, MiB.
    """

    step: str
    local: bool
    jobs: int
    gpus: int
    gpu_hours: float
    cpu_hours: float
    mem_mb: int
    runtime: int
    disk_mb: int


def planned_disk_bytes(nodes: Iterable[Node], cluster: Cluster) -> int:
    """Return the bytes that the artefacts of ``nodes`` are expected to take."""
    return sum(request(node, cluster).disk_mb for node in nodes) * MIB


def cost_rows(
    nodes: Iterable[Node], cluster: Cluster, gpu_type: str | None = None
) -> list[CostRow]:
    """Return one row per step of ``nodes``, in the order of the graph.

    Raises:
        InputError: the GPU type is unknown, or a job does not fit on one node.
    """
    nodes = list(nodes)
    by_step: dict[str, list[Request]] = {}
    for node in nodes:
        by_step.setdefault(node.step, []).append(request(node, cluster, gpu_type=gpu_type))
    return [
        CostRow(
            step=step,
            local=is_local(step, nodes, cluster),
            jobs=len(jobs),
            gpus=max(job.gpus for job in jobs),
            gpu_hours=sum(job.gpus * job.seconds for job in jobs) / 3600,
            cpu_hours=sum(job.cpus * job.seconds for job in jobs) / 3600,
            mem_mb=max(job.mem_mb for job in jobs),
            runtime=max(job.runtime for job in jobs),
            disk_mb=sum(job.disk_mb for job in jobs),
        )
        for step, jobs in sorted(by_step.items(), key=lambda item: _ORDER.index(item[0]))
    ]


def largest_requests(
    nodes: Iterable[Node], cluster: Cluster, gpu_type: str | None = None
) -> list[tuple[str, str, Request]]:
    """Return per model and step the request of its most demanding job: (model, step, request).

    Steps on texts alone have ``-`` for a model.
    """
    largest: dict[tuple[str, str], Request] = {}
    for node in nodes:
        place = (model_name(node) or "-", node.step)
        job = request(node, cluster, gpu_type=gpu_type)
        known = largest.get(place)
        if known is None or (job.gpu_mem_mb, job.mem_mb) > (known.gpu_mem_mb, known.mem_mb):
            largest[place] = job
    order = sorted(largest, key=lambda place: (place[0], _ORDER.index(place[1])))
    return [(*place, largest[place]) for place in order]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: text (the leading ones) to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    numeric = [all(row[i][:1].isdigit() for row in rows) for i in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in (header, *rows)
    ]


def render(
    rows: Sequence[CostRow], requests: Sequence[tuple[str, str, Request]], gpu_type: str
) -> str:
    """Return the cost table, its totals, and one sentence per model and step, as plain text."""
    header = (
        "step", "runs", "jobs", "GPUs/job", "GPU-hours", "CPU-hours",
        "GiB/job", "longest request", "disk GiB",
    )  # fmt: skip
    lines = [
        (
            row.step,
            "here" if row.local else "as jobs",
            str(row.jobs),
            str(row.gpus),
            f"{row.gpu_hours:.2f}",
            f"{row.cpu_hours:.2f}",
            f"{row.mem_mb / 1024:.1f}",
            f"{row.runtime} min",
            f"{row.disk_mb / 1024:.2f}",
        )
        for row in rows
    ]
    lines.append(
        (
            "total",
            "",
            str(sum(row.jobs for row in rows)),
            str(max((row.gpus for row in rows), default=0)),
            f"{sum(row.gpu_hours for row in rows):.2f}",
            f"{sum(row.cpu_hours for row in rows):.2f}",
            f"{max((row.mem_mb for row in rows), default=0) / 1024:.1f}",
            f"{max((row.runtime for row in rows), default=0)} min",
            f"{sum(row.disk_mb for row in rows) / 1024:.2f}",
        )
    )
    text = _table(header, lines)
    text += [
        "",
        f"GPUs are {gpu_type}. Hours are the expected ones; GPUs, memory and time per job are what "
        "the most demanding job asks for.",
        "",
    ]
    text += [
        f"{model} {step}: {job.gpus} GPU{'' if job.gpus == 1 else 's'}, "
        f"{job.mem_mb / 1024:.1f} GiB, {job.cpus} CPU{'' if job.cpus == 1 else 's'}, "
        f"{job.runtime} min. {job.explanation}"
        for model, step, job in requests
    ]
    return "\n".join(text)
