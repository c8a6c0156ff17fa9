"""Tasks through lm-eval's Python API: scores, standard errors and per-item results."""

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
from prunelib.evaluation.tasks import CHOICE_METRICS, GENERATION_METRICS, TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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


def _item_score(metric: str, value: Any) -> float:
    """Return one document's score; of chrF lm-eval logs (reference, text), for a whole corpus."""
    if metric != "chrf":
        return float(value)
    import sacrebleu

    reference, text = value
    return sacrebleu.sentence_chrf(text, [reference]).score / 100


def _mean(scores: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error; one score has no spread."""
    mean, count = math.fsum(scores) / len(scores), len(scores)
    if count < 2:
        return mean, None
    variance = math.fsum((score - mean) ** 2 for score in scores) / (count - 1)
    return mean, math.sqrt(variance / count)


def _summary(name: str, samples: Sequence[Mapping[str, Any]], version: Any) -> dict[str, Any]:
    """Return the metrics of one task; ``samples`` are lm-eval's logged documents."""
    # A generation task may cut answers out of its texts in several ways; the first one counts.
    ways = [sample["filter"] for sample in samples]
    ordered = sorted(
        (sample for sample in samples if sample["filter"] == ways[0]), key=lambda s: s["doc_id"]
    )
    metrics = CHOICE_METRICS if "acc" in ordered[0] else GENERATION_METRICS
    if not any(metric in ordered[0] for metric in metrics):
        raise InputError(
            f"task {name} has none of acc, {', '.join(GENERATION_METRICS)}; such a task cannot be "
            "compared here"
        )
    summary: dict[str, Any] = {}
    items: dict[str, Any] = {"doc_id": [sample["doc_id"] for sample in ordered]}
    if metrics is CHOICE_METRICS:
        for sample in ordered:
            if not all(math.isfinite(likelihood) for likelihood, _ in sample["filtered_resps"]):
                raise NonFiniteError(
                    f"task {name}, document {sample['doc_id']}: a log-likelihood is not finite"
                )
    else:
        items["text"] = [str(sample["filtered_resps"][0]) for sample in ordered]
    for metric in metrics:
        summary |= {metric: None, f"{metric}_stderr": None}
        items[metric] = None
        if metric in ordered[0]:
            scores = [_item_score(metric, sample[metric]) for sample in ordered]
            items[metric] = scores if metric == "chrf" else [int(score) for score in scores]
            summary[metric], summary[f"{metric}_stderr"] = _mean(scores)
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
            # Errors of means are computed here; nothing is bootstrapped.
            bootstrap_iters=0,
        )
    return {
        name: _summary(name, results["samples"][name], results["versions"][name]) for name in tasks
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
        By task name: of multiple choice ``acc`` and ``acc_norm`` (the choice's log-likelihood
        divided by its length in characters), of generation ``exact_match`` and ``chrf`` (mean of
        single documents'), each from 0 to 1 with ``<metric>_stderr`` (None where the task does not
        define the metric, or one document has no spread), ``n``, ``items`` (``doc_id``, a score per
        document for each metric and what was generated, in document order), ``documents_sha256``
        and the task's ``version``.

    Raises:
        InputError: an unknown task, a broken definition or documents, or a task without any of
            these metrics.
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
