"""The resource model: hand-computed figures, borders, refusals, and measured steps."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunelib.cluster import geometry, scoring_work, step_work
from prunelib.cluster.cost import cost_rows, largest_requests, planned_disk_bytes
from prunelib.cluster.geometry import model_of
from prunelib.cluster.resources import is_local, request
from prunelib.cluster.settings import DEVICE_STEPS, Cluster, Gpu
from prunelib.cluster.work import MIB, Case
from prunelib.errors import InputError
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import Node, closure
from prunelib.recovery.recipe import LoraRecipe
from workflow_scripts import cost

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config"
LLAMA = CONFIG / "experiments" / "cost_llama.yaml"
QUICKSTART = CONFIG / "experiments" / "quickstart.yaml"
STUDY = CONFIG / "experiments" / "study_llm_pruner.yaml"
MODELS = ("llama-7b", "llama-13b", "llama-2-70b")

Nodes = Callable[..., Node]


@cache
def graph(path: Path, merge: bool = False) -> list[Node]:
    experiment = Experiment.load(path, CONFIG)
    experiment = replace(experiment, data={**experiment.data, "merge": merge})
    return list(closure(n for cell in experiment.cells for n in cell.steps.values()).values())


def find(step: str, model: str = "llama-7b", path: Path = LLAMA, *labels: str) -> Node:
    """The first node of a step on a model whose labels hold all of ``labels``."""
    return next(
        node
        for node in graph(path, merge=True)
        if node.step == step and {model, *labels} <= set(node.labels)
    )


def dense(step: str, model: str, **params: Any) -> Node:
    node = find(step, model, LLAMA, "dense")
    return replace(node, params={**node.params, **params})


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return Cluster.load(CONFIG / "cluster.yaml")


@pytest.mark.parametrize(
    ("name", "weights", "cache_bytes", "adapter"),
    [
        # Parameters x 2 B; 2 x layers x kv heads x 128 x 2048 tokens x 4 sequences x 2 B; and
        # r (in + out) = 8 x (4 x 8192 + 3 x 15104) x 32, the count that LLM-Pruner prints.
        ("llama-7b", 13_476_831_232, 4_294_967_296, 19_988_480),
        # 8 x (4 x 10240 + 3 x 18944) x 40
        ("llama-13b", 26_031_728_640, 6_710_886_400, 31_293_440),
        # 8 x (2 x 16384 + 2 x 9216 + 3 x 36864) x 80
        ("llama-2-70b", 137_953_296_384, 2_684_354_560, 103_546_880),
    ],
)
def test_model_sizes_by_hand(name: str, weights: int, cache_bytes: int, adapter: int) -> None:
    node = find("fetch_model", name)
    model = model_of(node)
    assert model is not None
    assert model.parameters == node.params["parameters"]
    assert 2 * model.parameters == weights
    assert model.kv_cache_bytes(4 * 2048, 2) == cache_bytes
    assert model.lora_parameters(LoraRecipe()) == adapter


@pytest.mark.parametrize(
    ("targets", "adapter"),
    [
        (("attention", "mlp"), 19_988_480),
        (("attention", "mlp", "q_proj"), 19_988_480),
        # 8 x (4 x 8192) x 32, and 8 x (3 x 15104) x 32.
        (("attention",), 8_388_608),
        (("mlp",), 11_599_872),
    ],
)
def test_adapters_by_role(targets: tuple[str, ...], adapter: int) -> None:
    model = model_of(find("fetch_model", "llama-7b"))
    assert model is not None
    assert model.lora_parameters(LoraRecipe(targets=targets)) == adapter


def test_work_of_instruction_recovery_by_hand(cluster: Cluster) -> None:
    """Alpaca's 49,760 records in batches of 64 are 778 steps an epoch; 2 epochs, 16 validations."""
    node = find("recover", "llama-7b", LLAMA, "recovery_only")
    text = {"name": "alpaca-cleaned", "format": "alpaca", "validation": 2000}

    def seconds(**recipe: Any) -> float:
        source = replace(node.inputs["text"], params=text)
        inputs = {**node.inputs, "text": source}
        changed = replace(node, params={**node.params, "recipe": recipe}, inputs=inputs)
        return request(changed, cluster).seconds

    flops = 2 * (6_738_415_616 - 32_000 * 4096) * 256
    rate = 989e12 * cluster.utilisation.gpu
    step = 64 * 2.5 * flops / rate
    assert seconds() - seconds(max_steps=556) == pytest.approx(1000 * step)
    assert seconds(eval_every=100) - seconds() == pytest.approx(16 * 2000 * flops / rate)


def test_processes_of_recovery_have_a_gpu_each_and_share_the_products(cluster: Cluster) -> None:
    node = find("recover", "llama-7b", LLAMA, "recovery_only")

    def asked(processes: int, **params: Any) -> Any:
        recipe = {"max_steps": 1000, "processes": processes}
        return request(replace(node, params={**node.params, "recipe": recipe, **params}), cluster)

    one, four = asked(1), asked(4)
    assert (one.gpus, four.gpus) == (1, 4)
    assert four.gpu_mem_mb == pytest.approx(4 * one.gpu_mem_mb, abs=4)
    assert four.mem_mb == pytest.approx(4 * one.mem_mb, abs=4)
    products = 1000 * 64 * 256 * 2.5 * 2 * (6_738_415_616 - 32_000 * 4096)
    rate = 989e12 * cluster.utilisation.gpu
    assert one.seconds - four.seconds == pytest.approx(0.75 * products / rate)
    alone = asked(1, device="cpu", threads=4)
    assert asked(2, device="cpu", threads=4).cpus == 2 * alone.cpus == 8
    with pytest.raises(InputError, match=r"16 processes of \S+ GB, one per GPU; allowed: at most"):
        asked(16)
    largest = find("recover", "llama-2-70b", LLAMA, "recovery_only")
    recipe = {**largest.params["recipe"], "processes": 2}
    with pytest.raises(InputError, match=r"processes of \S+ GB, one per GPU"):
        request(replace(largest, params={**largest.params, "recipe": recipe}), cluster)


def test_work_of_streamed_recovery_by_hand(cluster: Cluster) -> None:
    """What is held and computed follows from the budget; the text's size is nobody's business."""
    node = find("recover", "llama-7b", LLAMA, "recovery_only")
    text = {"name": "endless", "format": "jsonl", "stream": True, "source": "hf:a/b@unpinned"}

    def asked(tokens: int, batch: int = 64) -> Any:
        recipe = {"tokens": tokens, "batch": batch}
        source = replace(node.inputs["text"], params=text)
        inputs = {**node.inputs, "text": source}
        changed = replace(node, params={**node.params, "recipe": recipe}, inputs=inputs)
        return request(changed, cluster)

    flops = 2.5 * 2 * (6_738_415_616 - 32_000 * 4096) / (989e12 * cluster.utilisation.gpu)
    more = 10**9 // (64 * 256) * 64 * 256
    per_token = flops + 1e-5
    assert asked(2 * more).seconds - asked(more).seconds == pytest.approx(more * per_token)
    assert asked(2 * more).mem_mb == asked(more).mem_mb < asked(more, 64 * 64).mem_mb


@pytest.mark.parametrize(
    ("name", "cache_bytes", "adapter", "scores"),
    [
        # 2 x layers x kv width x 2048 tokens x 2 B; r (in + out), r = 8, of all linear maps:
        # 8 x (4 x 8192 + 2 x 20480) x 32
        ("opt-6.7b", 1_073_741_824, 18_874_368, 0),
        # 8 x (16384 + 8192 + 2 x 20480) x 30; 32 heads x 2048 keys x 10 B, beyond the MLP's 32 x
        # 4096 B
        ("bloom-7b1", 1_006_632_960, 15_728_640, 32 * 2048 * 10 - 4 * 16384 * 2),
        # 8 x (2 x 8192 + 2 x 4352 + 31488 + 17792) x 40
        ("glm-4-9b", 83_886_080, 23_797_760, 0),
    ],
)
def test_model_sizes_of_other_architectures_by_hand(
    name: str, cache_bytes: int, adapter: int, scores: int
) -> None:
    model = geometry.model_of_geometry((CONFIG / "models" / f"{name}.json").read_text())
    assert model.kv_cache_bytes(2048, 2) == cache_bytes
    assert model.lora_parameters(LoraRecipe()) == adapter
    assert model.forward_token_bytes(2, 2048) - model.forward_token_bytes(2, 0) == scores


def test_decoding_needs_weights_and_cache(cluster: Cluster) -> None:
    node = dense("efficiency", "llama-7b", batch=4, length=200, new_tokens=1848)
    need = request(node, cluster).gpu_mem_mb * MIB
    assert need > 13_476_831_232 + 4_294_967_296
    # Batch 8 adds as large a cache again, activations and logits of 800 tokens.
    twice = request(replace(node, params={**node.params, "batch": 8}), cluster).gpu_mem_mb * MIB
    assert 4_294_967_296 < twice - need < 1.1 * 4_294_967_296


def test_gpus_of_the_published_models(cluster: Cluster) -> None:
    asked = {name: request(dense("perplexity", name), cluster).gpus for name in MODELS}
    assert asked["llama-7b"] == asked["llama-13b"] == 1
    # 138 GB of weights in cards of 72 GB usable.
    assert 2 <= asked["llama-2-70b"] <= 3
    pruned = request(find("perplexity", "llama-2-70b", LLAMA, "random", "seed0"), cluster)
    assert pruned.gpu_mem_mb < request(dense("perplexity", "llama-2-70b"), cluster).gpu_mem_mb


def test_gpus_step_at_the_memory_border(cluster: Cluster) -> None:
    node = dense("perplexity", "llama-7b")
    need = request(node, cluster).gpu_mem_mb * MIB / 1e9 / cluster.usable

    def gpus(memory_gb: float, attempt: int = 1) -> int:
        card = Gpu(memory_gb, 67, 989, 3350)
        other = replace(cluster, gpus={"card": card}, default_gpu="card")
        return request(node, other, attempt).gpus

    assert [gpus(need * 1.001), gpus(need * 0.999), gpus(need * 0.499)] == [1, 2, 3]
    growth = cluster.steps["perplexity"].memory_growth
    assert [gpus(need * growth * 1.001, 2), gpus(need * growth * 0.999, 2)] == [1, 2]
    with pytest.raises(InputError, match=r"perplexity of llama-7b/dense.*at most 8 on one node"):
        gpus(need * 0.124)


def test_growth_with_attempts_and_limits(cluster: Cluster) -> None:
    node = find("prune")
    rules = cluster.steps["prune"]
    first, second = request(node, cluster), request(node, cluster, attempt=2)
    assert second.mem_mb == pytest.approx(first.mem_mb * rules.memory_growth, abs=2)
    assert second.runtime == pytest.approx(first.runtime * rules.time_growth, abs=1)
    assert (second.seconds, second.disk_mb) == (first.seconds, first.disk_mb)
    tight = replace(cluster, limits=replace(cluster.limits, mem_mb=first.mem_mb + 1))
    assert request(node, tight, attempt=3).mem_mb == first.mem_mb + 1
    small = replace(cluster, limits=replace(cluster.limits, mem_mb=first.mem_mb - 1))
    with pytest.raises(InputError, match=r"cluster.yaml: prune of llama-7b/.*limits.mem_mb is"):
        request(node, small)


def test_who_asks_for_gpus(cluster: Cluster) -> None:
    for node in graph(LLAMA, merge=True):
        asked = request(node, cluster)
        assert (asked.gpus > 0) == (node.step in DEVICE_STEPS), node.step
        assert asked.cpus >= node.params.get("threads", 1)
        assert asked.exclusive == (node.step == "efficiency")
    on_cpu = request(dense("perplexity", "llama-7b", device="cpu"), cluster)
    assert (on_cpu.gpus, on_cpu.gpu_mem_mb) == (0, 0)
    # The device's memory is host memory then, and weights are fp32 beside their bf16 copy.
    assert on_cpu.mem_mb * MIB > 6 * 6_738_415_616
    auto = dense("perplexity", "llama-7b", device="auto")
    assert request(auto, cluster).gpus == 1
    assert request(auto, replace(cluster, gpu_for_auto=False)).gpus == 0


def test_steps_that_are_over_before_a_job_starts_run_here(cluster: Cluster) -> None:
    small, large = graph(QUICKSTART, merge=True), graph(LLAMA, merge=True)
    always = cluster.local_steps
    for step in {node.step for node in small}:
        short = step in always or step in ("scores", "prune", "merge")
        assert is_local(step, small, cluster) == short, step
    assert not any(is_local(step, large, cluster) for step in ("scores", "prune", "statistics"))
    # One long job is enough.
    assert not is_local("prune", [*small, find("prune")], cluster)
    never = replace(cluster, local_below_seconds=0)
    assert not is_local("prune", small, never)
    assert is_local("calibration", large, never)


def test_a_numbered_device_is_one_gpu(cluster: Cluster) -> None:
    assert request(dense("perplexity", "llama-7b", device="cuda:2"), cluster).gpus == 3
    with pytest.raises(InputError, match="at most 1 on one node"):
        request(dense("perplexity", "llama-2-70b", device="cuda:0"), cluster)
    with pytest.raises(InputError, match="device cuda:8 needs 9 GPUs"):
        request(dense("perplexity", "llama-7b", device="cuda:8"), cluster)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(gpu=1), r"top level: .*'gpu' was unexpected.*allowed keys"),
        (lambda data: data["steps"].update(prun={}), r"steps: .*'prun' was unexpected"),
        (lambda data: data["steps"]["default"].update(min_mem_mb=100), r"min_mem_mb: 100 .*1500"),
        (lambda data: data["gpus"].update(default="h900"), r"gpus.default: GPU type 'h900' .*h100"),
        (lambda data: data["local_steps"].remove("fetch_model"), r"local_steps: fetch_model "),
    ],
)
def test_refused_cluster_files(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = yaml.safe_load((CONFIG / "cluster.yaml").read_text())
    change(data)
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(InputError, match=message) as caught:
        Cluster.load(tmp_path / "cluster.yaml")
    assert "\n" not in str(caught.value)


def test_unknown_gpu_type(cluster: Cluster) -> None:
    with pytest.raises(InputError, match=r"GPU type 'h900' is not .*known: a100, "):
        request(find("perplexity"), cluster, gpu_type="h900")


def test_cost_counts_the_graph(cluster: Cluster) -> None:
    nodes = graph(LLAMA)
    rows = cost_rows(nodes, cluster)
    assert {row.step: row.jobs for row in rows} == Counter(node.step for node in nodes)
    hours = sum(request(n, cluster).gpus * request(n, cluster).seconds for n in nodes) / 3600
    assert sum(row.gpu_hours for row in rows) == pytest.approx(hours)
    assert planned_disk_bytes(nodes, cluster) == sum(row.disk_mb for row in rows) * MIB
    # Weights of one unpruned copy per model at the least.
    assert planned_disk_bytes(nodes, cluster) > 2 * (6.7e9 + 13.0e9 + 69.0e9)


def test_cost_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--experiment", str(LLAMA), "--catalogue", str(CONFIG)]
    arguments += ["--cluster", str(CONFIG / "cluster.yaml"), "--all"]
    assert cost.main(arguments) == 0
    out = capsys.readouterr().out
    jobs = len(graph(LLAMA))
    assert re.search(rf"^total +{jobs} ", out, re.MULTILINE)
    for model in MODELS:
        assert re.search(
            rf"^{model} perplexity: \d GPUs?, .* weights \S+ x 2 B ", out, re.MULTILINE
        )
    assert cost.main([*arguments, "--gpu-type", "h900"]) == InputError.exit_code
    assert capsys.readouterr().err.count("\n") == 1


def test_planning_does_not_import_torch() -> None:
    code = "import sys, prunelib.cluster.cost; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_second_order_by_hand(cluster: Cluster) -> None:
    gradients = find("statistics")
    fisher = replace(gradients, params={**gradients.params, "name": "fisher"})
    sentence = request(fisher, cluster).explanation
    # A block of 202,383,360 parameters: bf16 gradients, their fp32 copy, two fp32 sums; and the
    # product of the largest tensor, 11,008 x 4,096 in fp32.
    layer = 202_383_360 * (2 + 4 + 4 + 4) + 11_008 * 4_096 * 4
    assert f"one layer's gradients ({layer / 1e9:.3g} GB)" in sentence
    # One window of 128 tokens is the batch, whatever the experiment's.
    assert "one layer's graph of 128 tokens" in sentence
    assert "one layer's graph of 1,280 tokens" in request(gradients, cluster).explanation
    # 10 windows x 32 blocks x (7 x 4 B + 3 x 2 B) through the memory, which takes time.
    work = scoring_work.statistics_work(Case(fisher, cluster, cluster.gpu(None)[1]))
    assert work.moved == 10 * 32 * 202_383_360 * 34
    assert request(fisher, cluster).seconds > request(gradients, cluster).seconds


def test_gradients_outside_the_layers_by_hand(cluster: Cluster) -> None:
    node = find("statistics")
    whole = replace(node, params={**node.params, "name": "gradients_whole"})
    # Embedding and head of 32,000 x 4,096 and the final norm: a bf16 part of the gradient, its sum
    # and two products in fp32.
    size = (2 * 32_000 * 4_096 + 4_096) * (2 + 3 * 4)
    assert (
        f"gradients outside the layers ({size / 1e9:.3g} GB)" in request(whole, cluster).explanation
    )
    assert "outside the layers" not in request(node, cluster).explanation
    second = replace(node, params={**node.params, "name": "fisher_whole"})
    assert "one layer's graph of 128 tokens" in request(second, cluster).explanation
    assert request(whole, cluster).seconds > request(node, cluster).seconds


def test_second_order_covers_what_was_measured(cluster: Cluster) -> None:
    # Peak resident memory of the pass on the embedded model, one thread: 1374 MiB.
    node = find("statistics", "smollm2-135m", QUICKSTART, "gradients")
    fisher = replace(node, params={**node.params, "name": "fisher"})
    assert 1374 <= request(fisher, cluster).mem_mb <= 4 * 1374


def zeroth_order(model: str, path: Path, **options: Any) -> Node:
    """The pass of gradients from forward passes over the calibration set of another."""
    from prunelib.methods import create

    told = create("mini_llm", options).statistic_options["zeroth_order"]
    node = find("statistics", model, path)
    more = {"name": "zeroth_order", "options": dict(told), "seed": 0}
    return replace(node, params={**node.params, **more})


def test_gradients_from_forward_passes_by_hand(cluster: Cluster) -> None:
    sentence = request(zeroth_order("llama-7b", LLAMA), cluster).explanation
    # 1,280 tokens x 4,096 x 2 B a side: one direction's two sides beside one clean stream.
    assert "hidden states of 1 directions and 1 minibatches" in sentence
    assert f"a moved matrix, its estimate and product ({11_008 * 4_096 * 10 / 1e9:.3g} GB)" in (
        sentence
    )
    gates = request(zeroth_order("llama-7b", LLAMA, perturbation="gates"), cluster)
    assert "a moved matrix" not in gates.explanation
    streamed = request(zeroth_order("llama-2-70b", LLAMA, streamed=True), cluster)
    assert (streamed.gpus, request(zeroth_order("llama-2-70b", LLAMA), cluster).gpus) == (1, 2)
    # Two embeddings of 32,000 x 8,192, the final norm, and a block of 855,654,400.
    held = 2 * (2 * 32_000 * 8_192 + 8_192 + 855_654_400)
    assert f"weights outside the layers and one block ({held / 1e9:.3g} GB)" in (
        streamed.explanation
    )
    node = find("statistics", "llama-2-70b")
    direct = replace(node, params={**node.params, "name": "fms_direct"})
    told = replace(direct, params={**direct.params, "options": {"streamed": True}, "seed": 0})
    assert (request(told, cluster).gpus, request(direct, cluster).gpus) == (1, 2)
    assert f"weights outside the layers and one block ({held / 1e9:.3g} GB)" in (
        request(told, cluster).explanation
    )
    work = {
        count: scoring_work.statistics_work(
            Case(
                zeroth_order("llama-7b", LLAMA, perturbations=count), cluster, cluster.gpu(None)[1]
            )
        )
        for count in (1, 2, 3)
    }
    # Layer by layer: of 30 layers 15.5 are left on average, and only the layer that moves is drawn.
    read = {"streamed": True}
    by_layer, whole, read_by_layer, read_whole = (
        scoring_work.statistics_work(
            Case(zeroth_order("smollm2-135m", STUDY, perturbations=2, **told), cluster, None)
        )
        for told in ({"scope": "layer"}, {}, {"scope": "layer", **read}, read)
    )
    assert by_layer.flops / whole.flops == pytest.approx((2 + 4 * 15.5) / (2 + 4))
    assert by_layer.host_seconds == whole.host_seconds > 0
    # Three walks, or 18.5: 15.5 for both directions together, and one that moves the start on.
    blocks = 30 * 3_540_096 * 4 / 1e9 / cluster.host.disk_gbs
    more = read_by_layer.host_seconds - read_whole.host_seconds
    assert more == pytest.approx(15.5 * blocks)
    # Two passes for every direction more.
    assert work[3].flops - work[2].flops == work[2].flops - work[1].flops
    assert work[2].flops / work[1].flops == pytest.approx(6 / 4)


def test_gradients_from_forward_passes_cover_what_was_measured(cluster: Cluster) -> None:
    # Peak resident memory of the processes, ten windows of 128 tokens: MiB.
    for options, measured in (({}, 1085), ({"streamed": True}, 692)):
        node = zeroth_order("smollm2-135m", STUDY, **options)
        assert measured <= request(node, cluster).mem_mb <= 4 * measured


def test_buffers_are_those_of_the_steps() -> None:
    from prunelib.evaluation import perplexity
    from prunelib.recovery import loss
    from prunelib.statistics import gradients, zeroth_order

    assert scoring_work.KEPT_BYTES == gradients.KEPT_BYTES
    assert scoring_work.KEPT_WEIGHTS == gradients.KEPT_WEIGHTS
    assert scoring_work.STREAM_BYTES == zeroth_order.STREAM_BYTES
    assert scoring_work.HEAD_BYTES == gradients.LOGITS_BYTES
    assert step_work.LOSS_CHUNK == loss.CHUNK
    assert step_work.EVALUATION_TOKENS["cpu"] == perplexity.BATCH_TOKENS["cpu"]
    assert step_work.EVALUATION_TOKENS["cuda"] == perplexity.GPU_BATCH_TOKENS
    assert step_work.LOGITS_SHARE == perplexity.MEMORY_SHARE


def test_methods_without_weights_read_none(cluster: Cluster) -> None:
    for name in cluster.methods_without_weights:
        source = (ROOT / "prunelib" / "methods" / f"{name}.py").read_text()
        assert "inputs.weight" not in source, name


def _table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of docs/resources.md."""
    text = (ROOT / "docs" / "resources.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = section[section.index("\n|") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_requests_cover_what_was_measured(cluster: Cluster) -> None:
    rows = _table("Against measurement")
    assert {row[0] for row in rows} == DEVICE_STEPS | {
        "fetch_model", "fetch_text", "calibration", "tasks_data", "scores", "prune", "merge",
    }  # fmt: skip
    for step, what, documented, measured, *_ in rows:
        node = next(
            node
            for node in graph(QUICKSTART, merge=True)
            if node.step == step and (what == "" or what in node.labels)
        )
        asked = request(node, cluster).mem_mb
        floor = cluster.steps[step].min_mem_mb
        assert int(documented) == asked, f"docs/resources.md: {step} {what}"
        assert int(measured) <= asked <= 4 * int(measured) + floor, step


def test_documented_requests_are_the_current_ones(cluster: Cluster) -> None:
    rows = _table("LLaMA-7B, 13B and 70B")
    largest = {(m, s): job for m, s, job in largest_requests(graph(LLAMA), cluster)}
    for step, *cells in rows:
        for model, cell in zip(MODELS, cells, strict=True):
            job = largest[model, step]
            gpus = f"{job.gpus} x h100, {job.gpu_mem_mb / 1024:.0f} GiB; " if job.gpus else ""
            assert cell == f"{gpus}host {job.mem_mb / 1024:.0f} GiB", (model, step)
