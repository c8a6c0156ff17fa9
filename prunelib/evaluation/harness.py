"""Tasks through lm-eval's Python API: accuracies, standard errors and per-item results."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunelib.errors import InputError, NonFiniteError
from prunelib.evaluation.precision import fp32_compute
from prunelib.evaluation.tasks import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

METRICS = ("acc", "acc_norm")


def _local_config(spec: TaskSpec, cache: Path) -> dict[str, Any]:
    """Return the definition of a local task, pointed at its documents."""
    assert spec.definition is not None
    assert spec.documents is not None
    if not spec.documents.is_file():
        raise InputError(f"task {spec.name}: {spec.documents} does not exist")
    return dict(spec.definition) | {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(spec.documents.resolve())},
            # A cache of its own: nothing stale from another run, nothing left in the home.
            "cache_dir": str(cache),
        },
        "test_split": "test",
    }


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let neither the hub client nor datasets use the network; both read their flag at import."""
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _load_tasks(spec: TaskSpec, cache: Path, seed: int) -> dict[str, Any]:
    """Return lm-eval's task objects for one spec, by name (a hub group has several)."""
    from lm_eval.tasks import TaskManager

    if spec.definition is None:
        manager = TaskManager()
        if spec.name not in manager.all_tasks:
            raise InputError(f"task {spec.name!r} is neither local nor known to lm-eval")
        wanted: Any = [spec.name]
    else:
        manager = TaskManager(include_defaults=False)
        wanted = [_local_config(spec, cache)]
    try:
        tasks: dict[str, Any] = manager.load(wanted)["tasks"]
    except Exception as error:
        message = " ".join(str(error).split())
        raise InputError(f"task {spec.name}: its documents cannot be loaded ({message})") from error
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return tasks


def _standard_error(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _summary(
    name: str, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], version: Any
) -> dict[str, Any]:
    """Return the metrics of one task; ``samples`` are lm-eval's logged documents."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    if "acc" not in ordered[0]:
        raise InputError(f"task {name} has no acc; only multiple-choice tasks can be compared here")
    for sample in ordered:
        if not all(math.isfinite(likelihood) for likelihood, _ in sample["filtered_resps"]):
            raise NonFiniteError(
                f"task {name}, document {sample['doc_id']}: a log-likelihood is not finite"
            )
    summary: dict[str, Any] = {}
    items: dict[str, Any] = {"doc_id": [sample["doc_id"] for sample in ordered]}
    for metric in METRICS:
        measured = metric in ordered[0]
        summary[metric] = float(results[f"{metric},none"]) if measured else None
        summary[f"{metric}_stderr"] = _standard_error(results.get(f"{metric}_stderr,none"))
        items[metric] = [int(sample[metric]) for sample in ordered] if measured else None
    hashes = json.dumps([sample["doc_hash"] for sample in ordered]).encode()
    return summary | {
        "n": len(ordered),
        "items": items,
        # Equal for two models exactly when both answered the same documents in the same order.
        "documents_sha256": hashlib.sha256(hashes).hexdigest(),
        "version": version,
    }


def _evaluate_one(
    spec: TaskSpec, harness_model: Any, cache: Path, limit: int | None, seed: int
) -> dict[str, dict[str, Any]]:
    from lm_eval.evaluator import evaluate

    network = contextlib.nullcontext() if spec.definition is None else _offline()
    # lm-eval and datasets print; the standard output belongs to the caller.
    with network, contextlib.redirect_stdout(sys.stderr):
        tasks = _load_tasks(spec, cache, seed)
        results = evaluate(
            lm=harness_model,
            task_dict={"tasks": tasks},
            limit=limit,
            # Means have a closed-form standard error; only other metrics would be bootstrapped.
            bootstrap_iters=1,
        )
    return {
        name: _summary(
            name, results["results"][name], results["samples"][name], results["versions"][name]
        )
        for name in tasks
    }


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskSpec],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Evaluate a model on tasks, zero-shot unless a task's own definition says otherwise.

    Local tasks never touch the network; hub tasks fetch their documents. No code from a hub or a
    task definition is executed beyond what lm-eval itself ships.

    Args:
        model: causal language model in eval mode.
        tokenizer: its tokenizer.
        tasks: what to evaluate; names must differ.
        batch_size: sequences per forward pass.
        limit: the first ``limit`` documents of every task; all when None.
        seed: for the few-shot samples and whatever a task draws.

    Returns:
        By task name: ``acc``, ``acc_stderr``, ``acc_norm`` (the choice's log-likelihood divided by
        its length in characters), ``acc_norm_stderr`` (None where the task does not define the
        metric, or one document has no spread), ``n``, ``items`` (``doc_id``, 0/1 per document for
        each metric, in document order), ``documents_sha256`` and the task's ``version``.

    Raises:
        InputError: an unknown task, a broken definition or documents, or a task without acc.
        NonFiniteError: a log-likelihood is NaN or infinite.
    """
    names = [spec.name for spec in tasks]
    if not names or len(set(names)) != len(names):
        raise InputError(f"tasks are {names}; allowed: one or more, each once")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise InputError(f"batch_size={batch_size}, limit={limit}; allowed: at least 1")
    import numpy as np
    import torch
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    measured: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as cache, fp32_compute(model):
        harness_model = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            softmax_dtype=torch.float32,
            trust_remote_code=False,
        )
        for number, spec in enumerate(tasks, start=1):
            logger.info("tasks: %s (%d of %d)", spec.name, number, len(tasks))
            measured |= _evaluate_one(spec, harness_model, Path(cache), limit, seed)
    return measured
