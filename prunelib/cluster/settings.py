"""What a site says about its cluster: ``config/cluster.yaml`` as validated data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from prunelib.errors import InputError
from prunelib.experiment.graph import SCRIPTS, Node
from prunelib.experiment.schema import lookup, read_yaml, validate

# Steps that compute on the experiment's device; all others run on the CPU.
DEVICE_STEPS = frozenset({"statistics", "recover", "perplexity", "tasks", "efficiency"})
# Compute nodes often have no network.
NETWORK_STEPS = ("fetch_model", "fetch_text", "fetch_analogies")

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Gpu:
    """A type of GPU: memory in GB, peak TFLOP/s by dtype, memory bandwidth in GB/s."""

    memory_gb: float
    float32_tflops: float
    bfloat16_tflops: float
    bandwidth_gbs: float


@dataclass(frozen=True)
class Host:
    """Rates of a node (GB/s, GFLOP/s), and what every job's processes take (MiB)."""

    gflops_per_core: float
    memory_gbs: float
    disk_gbs: float
    network_gbs: float
    hash_gbs: float
    startup_seconds: float
    python_mb: int
    snakemake_mb: int
    cuda_mb: int
    mapped_share: float
    shard_gb: float


@dataclass(frozen=True)
class Limits:
    """Most that one job may ask for: GPUs, host memory in MiB, minutes."""

    gpus: int
    mem_mb: int
    runtime: int


@dataclass(frozen=True)
class Utilisation:
    """Share of the peak rates that is really reached."""

    gpu: float
    cpu: float
    bandwidth: float


@dataclass(frozen=True)
class StepRules:
    """Safety factors, floors and growth per attempt of one step."""

    memory_factor: float
    time_factor: float
    min_mem_mb: int
    min_runtime: int
    cpus: int
    memory_growth: float
    time_growth: float


@dataclass(frozen=True)
class TaskSize:
    """Documents of a task, choices each, mean and longest tokens of a choice with its context."""

    documents: int
    choices: int
    tokens: int
    longest: int


def _settings(kind: type[Settings], data: Mapping[str, Any]) -> Settings:
    return kind(**{name.name: data[name.name] for name in fields(kind)})  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Cluster:
    """A site's cluster and the constants of the resource model.

    Attributes:
        path: the file it was read from, for messages.
        gpus: known GPU types by SLURM's gres name.
        default_gpu: the type that is asked for unless another is named.
        usable: share of a GPU's memory that tensors get.
        gpu_for_auto: whether experiments with device ``auto`` ask for GPUs.
        local_steps: steps that run where the workflow was started (``report`` is none of the
            graph's nodes, but may be among them).
        local_below_seconds: steps without a GPU whose jobs would all be shorter than this run
            locally, too; start-up aside.
        steps: rules by step.
        text_tokens: tokens by text, ``default`` for others.
        text_records: records by instruction text, ``default`` for others.
        tasks: sizes by task, ``default`` for others.
        methods_without_weights: methods whose scores read no weights.
    """

    path: Path
    gpus: Mapping[str, Gpu]
    default_gpu: str
    usable: float
    gpu_for_auto: bool
    local_steps: frozenset[str]
    local_below_seconds: float
    host: Host
    limits: Limits
    utilisation: Utilisation
    steps: Mapping[str, StepRules]
    text_tokens: Mapping[str, int]
    text_records: Mapping[str, int]
    tasks: Mapping[str, TaskSize]
    methods_without_weights: frozenset[str] = field(default=frozenset())

    @classmethod
    def load(cls, path: Path) -> Cluster:
        """Read and validate a cluster file.

        Raises:
            InputError: file, key, what was given and what is allowed.
        """
        data = read_yaml(path)
        validate(data, "cluster", path)
        gpus = {name: _settings(Gpu, entry) for name, entry in data["gpus"]["types"].items()}
        default = data["gpus"]["default"]
        lookup(gpus, default, "GPU type", f"{path}: gpus.default")
        for step in NETWORK_STEPS:
            if step not in data["local_steps"]:
                raise InputError(f"{path}: local_steps: {step} needs a network and must be listed")
        rules = data["steps"]
        return cls(
            path=path,
            gpus=gpus,
            default_gpu=default,
            usable=data["gpus"]["usable"],
            gpu_for_auto=data["gpu_for_auto"],
            local_steps=frozenset(data["local_steps"]),
            local_below_seconds=data["local_below_seconds"],
            host=_settings(Host, data["host"]),
            limits=_settings(Limits, data["limits"]),
            utilisation=_settings(Utilisation, data["utilisation"]),
            steps={
                step: _settings(StepRules, rules["default"] | rules.get(step, {}))
                for step in SCRIPTS
            },
            text_tokens=data["text_tokens"],
            text_records=data["text_records"],
            tasks={name: _settings(TaskSize, size) for name, size in data["tasks"].items()},
            methods_without_weights=frozenset(data["methods_without_weights"]),
        )

    def gpu(self, name: str | None = None) -> tuple[str, Gpu]:
        """Return a GPU type's name and figures; the default type for None.

        Raises:
            InputError: the type is not in the file.
        """
        name = name or self.default_gpu
        return name, lookup(self.gpus, name, "GPU type", f"{self.path}: gpus.types")

    def tokens_of(self, text: str) -> int:
        """Return the expected tokens of a text, all splits together."""
        return self.text_tokens.get(text, self.text_tokens["default"])

    def records_of(self, text: str) -> int:
        """Return the expected records of an instruction text, all parts together."""
        return self.text_records.get(text, self.text_records["default"])

    def wants_gpu(self, node: Node) -> bool:
        """Whether a step computes on a GPU here."""
        if node.step not in DEVICE_STEPS:
            return False
        device = str(node.params["device"])
        return device.startswith("cuda") or (device == "auto" and self.gpu_for_auto)
