"""The papers' experiments plan without weights, and their targets give the published sizes."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from prunelib.experiment.experiment import Experiment
from prunelib.families import family_of
from prunelib.families.base import RESIDUAL
from prunelib.plan import Plan
from prunelib.selection import select
from prunelib.surgery import pruned_config
from workflow_scripts import cost

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config"
EXPERIMENTS = sorted(
    path.stem
    for paper in ("llm_pruner", "mini_llm")
    for path in (CONFIG / "experiments").glob(f"{paper}_*.yaml")
)

# One experiment for every size.
SIZES = [
    "llm_pruner_llama_7b",
    "llm_pruner_llama_13b",
    "llm_pruner_vicuna_7b",
    "llm_pruner_llama_3_8b",
    "llm_pruner_tinyllama",
    "llm_pruner_glm_4_9b",
    "llm_pruner_channel_7b",
    "llm_pruner_channel_13b",
    "mini_llm_bloom_7b1",
    "mini_llm_opt_6_7b",
]

# Parameters that are left. LLaMA-7B at 25 %: issue 34 of LLM-Pruner's repository; at 60 %: the
# paper's 3.35 B; Llama-3-8B and TinyLlama: the repository's table. LLaMA-13B by hand: 33 layers
# lose 10 heads of 4 x 128 x 5120 and 3,456 channels of 3 x 5120. OPT-6.7B and BLOOM-7B1 by hand,
# too: a head has three rows with biases and a column, a channel one row with its bias and a column;
# a quarter is 8 heads and 4,096 channels, 60 % are 19 heads and 9,831 channels. GLM-4-9B by hand:
# 37 layers lose 2 of 16 query heads of both kv groups, queries with a bias, and 1,712 channels.
# Of the channel-wise rows, 20 % and 50 %, LLaMA-7B's are the paper's 5.39 B and 3.37 B; LLaMA-13B
# by hand: 4,096 of 5,120 residual channels are left, attention and MLPs keep their widths.
HEAD, CHANNEL = 128 * (4 * 4096 + 3), 2 * 4096 + 1
LEFT = {
    ("llama-7b", 0.25): 5_422_977_024,
    ("llama-7b", 0.6): 3_350_188_032,
    ("vicuna-7b", 0.25): 5_422_977_024,
    ("vicuna-7b", 0.6): 3_350_188_032,
    ("llama-7b", 0.2): 5_389_416_396,
    ("llama-7b", 0.5): 3_369_207_808,
    ("vicuna-7b", 0.2): 5_389_416_396,
    ("vicuna-7b", 0.5): 3_369_207_808,
    ("llama-13b", 0.2): 4096 * (2 * 32000 + 40 * (4 * 5120 + 3 * 13824 + 2) + 1),
    ("llama-13b", 0.25): 13_015_864_320 - 33 * (10 * 4 * 128 * 5120 + 3456 * 3 * 5120),
    ("llama-3-8b", 0.25): 6_612_586_496,
    ("tinyllama-1.1b", 0.25): 945_907_712,
    ("glm-4-9b", 0.125): 9_399_951_360 - 37 * (4 * 128 * (2 * 4096 + 1) + 1712 * 3 * 4096),
    ("opt-6.7b", 0.25): 6_658_473_984 - 26 * (8 * HEAD + 4096 * CHANNEL),
    ("opt-6.7b", 0.6): 6_658_473_984 - 28 * (19 * HEAD + 9831 * CHANNEL),
    ("bloom-7b1", 0.25): 7_069_016_064 - 24 * (8 * HEAD + 4096 * CHANNEL),
    ("bloom-7b1", 0.6): 7_069_016_064 - 26 * (19 * HEAD + 9831 * CHANNEL),
}


@cache
def load(name: str) -> Experiment:
    return Experiment.load(CONFIG / "experiments" / f"{name}.yaml", CONFIG)


@cache
def plans(experiment: Experiment) -> dict[tuple[str, float, str], Plan]:
    """A plan for every model, target and variant that ranks locally, from random scores."""
    found = {}
    rng = np.random.default_rng(0)
    for model in experiment.data["models"]:
        config = experiment.geometry(model)
        family = family_of(config)
        for variant, method in experiment.methods.items():
            rule = method.rule()
            if rule.ranking == "global":
                continue
            layers = family.dimensions(config).layers
            scores = {
                kind: [rng.random(family.kind(config, kind).count)]
                * (1 if kind == RESIDUAL else layers)
                for kind in rule.kinds
            }
            for target in experiment.targets:
                plan = select(scores, family, config, target, rule, {})
                found[model, target.value, variant] = plan
    return found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_targets_leave_the_published_number_of_parameters(name: str) -> None:
    found = plans(load(name))
    assert found
    for (model, value, variant), plan in found.items():
        assert plan.parameters[1] == LEFT[model, value], (model, value, variant)


def test_every_published_size_is_asked_for() -> None:
    asked = {key[:2] for name in SIZES for key in plans(load(name))}
    assert asked == set(LEFT)


@pytest.mark.parametrize("name", SIZES)
def test_models_of_the_published_size_can_be_built(name: str) -> None:
    """Independent of the plan's arithmetic: the modules themselves, without their weights."""
    import torch

    experiment = load(name)
    built = {}
    for (model, value, variant), plan in plans(experiment).items():
        if not variant.startswith("random"):
            continue
        config = experiment.geometry(model)
        family = family_of(config)
        new, _ = pruned_config(family, config, plan)
        config_class, model_class = family.model_class(new)
        with torch.device("meta"):
            built[model, value] = model_class(config_class(**new)).num_parameters()
    assert built == {key: LEFT[key] for key in built}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_can_be_costed_without_a_network(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--experiment", str(CONFIG / "experiments" / f"{name}.yaml"), "--all"]
    arguments += ["--catalogue", str(CONFIG), "--cluster", str(CONFIG / "cluster.yaml")]
    assert cost.main(arguments) == 0
    steps = set(re.findall(r"^(\w+) ", capsys.readouterr().out, re.MULTILINE))
    assert {"prune", "perplexity", "total"} <= steps
    data = load(name).data
    assert ("tasks" in steps) == (data["evaluation"] in ("paper_llm_pruner", "paper_mini_llm"))
    assert ("recover" in steps) == bool(data["recovery"])


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if not n.endswith(("_ptb", "_2048"))])
def test_snakemake_plans_all_cells(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("snakemake"), "-n", "--quiet", "rules"),
            *("--directory", tmp_path, "--config", f"catalogue={CONFIG}"),
            f"experiment={CONFIG}/experiments/{name}.yaml",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE))
    cells = load(name).cells
    for step in ("perplexity", "tasks", "efficiency", "recovery"):
        wanted = {cell.steps[step].key for cell in cells if step in cell.steps}
        assert int(counts.get(step.replace("recovery", "recover"), 0)) == len(wanted), step


def test_nothing_is_missing_but_pinned_revisions() -> None:
    for name in EXPERIMENTS:
        problems = load(name).preflight()
        assert problems
        assert all("the revision is not pinned" in problem for problem in problems)


@pytest.mark.parametrize("name", ["study_mini_llm", "study_mini_llm_channels"])
def test_studies_of_the_estimate_plan(name: str) -> None:
    experiment = load(name)
    assert experiment.preflight() == []
    statistics = {
        cell.method: cell.steps["prune"].inputs["scores"].inputs.get("zeroth_order")
        for cell in experiment.cells
        if "prune" in cell.steps and cell.seed == 1
    }
    found = {variant: node for variant, node in statistics.items() if node is not None}
    assert {"mini_llm", "mini_llm_last", "mini_llm_low_rank_layer", "mini_llm_gates"} <= set(found)
    # What differs between estimators is in the key; what differs in scoring alone is not.
    same = {"mini_llm_last": "mini_llm"}
    if "mini_llm_gates_taylor" in found:
        same["mini_llm_gates_taylor"] = "mini_llm_gates"
    own = {node.key for variant, node in found.items() if variant not in same}
    assert len(own) == len(set(found) - set(same))
    for variant, other in same.items():
        assert found[variant].key == found[other].key
    for variant, node in found.items():
        options = node.params["options"]
        assert node.params["seed"] == 1
        share = (options["minibatch"] or 10) / 10
        depth = 15.5 if options["scope"] == "layer" else 1
        passes = 1 + options["perturbations"] * options["sides"] * share * depth
        assert variant == "mini_llm_1" or 62 <= passes <= 66, variant
