"""The embedded real model: fetched, scored, pruned, loaded elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_depth import lacking
from test_pruned_equals_masked import load_in_a_fresh_interpreter, relative_difference
from tiny_project import ROOT

from prunelib import checkpoint
from prunelib.data.calibration import sample_windows, tokenise
from prunelib.data.text import SPLITS, read_articles
from prunelib.data.tokenizer import load_tokenizer
from prunelib.experiment.experiment import Experiment
from prunelib.families import family_of
from prunelib.methods import create
from prunelib.methods.base import ScoringInputs
from prunelib.rules import Target
from prunelib.selection import select
from prunelib.statistics import activations, fisher, gradients
from prunelib.statistics.greedy import greedy_order
from prunelib.statistics.inputs import PassInputs
from prunelib.statistics.layerwise import Layers
from prunelib.surgery import zero_tensors

pytestmark = pytest.mark.real
IDS = torch.arange(1000, 1032).view(2, 16)


@pytest.fixture(scope="session")
def fetched() -> tuple[Path, Path]:
    """The model and text of the quickstart, fetched by the workflow itself."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--until"]
    run = subprocess.run(
        [*command, "fetch_model", "fetch_text"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    path = ROOT / "config" / "experiments" / "quickstart.yaml"
    (dense, *_) = Experiment.load(path, ROOT / "config").cells
    inputs = dense.steps["perplexity"].inputs
    return ROOT / inputs["checkpoint"].directory, ROOT / inputs["text"].directory


@pytest.fixture(scope="session")
def scored(fetched: tuple[Path, Path]) -> dict[str, dict[str, torch.Tensor]]:
    """Both statistic passes over a very small calibration set."""
    model, text = fetched
    tokens = tokenise(read_articles(text, "calibration"), load_tokenizer(model))
    windows = torch.from_numpy(sample_windows(tokens, 2, 48, 0)[0])
    config = checkpoint.read_config(model)
    network = checkpoint.load_model(model)
    arguments: Any = (network, family_of(config), config, windows, 2)
    return {
        "activations": activations.collect(PassInputs(*arguments)),
        "gradients": gradients.collect(PassInputs(*arguments)),
    }


@pytest.mark.parametrize(
    "method",
    [
        "llm_pruner",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("random", "magnitude", "wanda_sp", "shortgpt")
        ),
    ],
)
def test_pruned_equals_masked_here_and_elsewhere(
    method: str,
    fetched: tuple[Path, Path],
    scored: dict[str, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    model, _ = fetched
    config = checkpoint.read_config(model)
    family, chosen = family_of(config), create(method, {})
    passes = {name: scored[name] for name in chosen.statistics}
    reader = checkpoint.WeightReader(model)
    scores = chosen.scores(ScoringInputs(family, config, reader, passes, 0))
    target = Target("parameters", 0.2, 4, 4)
    plan = select(scores, family, config, target, chosen.rule(), {"method": method})
    nearest_block = family.block_parameters(config) / family.parameters(config)
    assert plan.removed_ratio == pytest.approx(0.2, abs=nearest_block / 2)
    checkpoint.prune_checkpoint(model, plan, tmp_path)
    small = checkpoint.load_model(tmp_path)
    assert sum(p.numel() for p in small.parameters()) == plan.parameters[1]
    with torch.inference_mode():
        logits = small(torch.arange(3, 19).view(2, 8)).logits
        found = small(IDS).logits
    bits = logits.contiguous().view(torch.int32).tolist()
    masked = checkpoint.load_model(model)
    state = dict(zero_tensors(checkpoint.read_tensors(model), family, config, plan))
    masked.load_state_dict(state, strict=False)
    with torch.inference_mode():
        assert relative_difference(found, masked(IDS).logits) < 1e-4
    remote = "auto_map" in checkpoint.read_config(tmp_path)
    assert remote == (method != "shortgpt")
    # A fresh interpreter without this library.
    assert load_in_a_fresh_interpreter({str(tmp_path): remote})[str(tmp_path)] == [bits, True, True]


def test_articles_are_disjoint(fetched: tuple[Path, Path]) -> None:
    _, text = fetched
    parts = {name: read_articles(text, name) for name in SPLITS}
    assert all(parts.values())
    titles = [article.title for part in parts.values() for article in part]
    texts = [article.text for part in parts.values() for article in part]
    assert len(titles) == len(set(titles)) == 89
    assert len(texts) == len(set(texts))


@pytest.mark.long
@pytest.mark.parametrize("criterion", ["vector", "element1", "element2", "mixed"])
def test_half_precision_ranks_as_full_precision(criterion: str, fetched: tuple[Path, Path]) -> None:
    """Spearman correlation of a layer's MLP channels, bf16 scoring with fp32 sums against fp32.

    Measured over 4 x 64 tokens, lowest layer: weights alone in bf16 0.9995 (vector) and 0.9999
    (others); products in bf16 too, as on a GPU, 0.992 and 0.998. A vector's terms cancel, so its
    sums lose the most.
    """
    model, text = fetched
    tokens = tokenise(read_articles(text, "calibration"), load_tokenizer(model))
    windows = torch.from_numpy(sample_windows(tokens, 4, 64, 0)[0])
    config = checkpoint.read_config(model)
    method, reader = create("llm_pruner", {"criterion": criterion}), checkpoint.WeightReader(model)

    def ranks(network: Any) -> list[Any]:
        module = {"gradients": gradients, "fisher": fisher}[method.statistics[0]]
        # Batches of two, so that gradients are summed.
        found = module.collect(PassInputs(network, family_of(config), config, windows, 2))
        passes = {method.statistics[0]: found}
        scores = method.scores(ScoringInputs(family_of(config), config, reader, passes, 0))
        return [np.argsort(np.argsort(layer)) for layer in scores["mlp_channel"]]

    full = ranks(checkpoint.load_model(model))
    rounded = ranks(checkpoint.load_model(model, dtype="bfloat16"))
    half: Any = checkpoint.load_model(model)
    products = ranks(half.to(torch.bfloat16))
    for layer, expected in enumerate(full):
        assert np.corrcoef(expected, rounded[layer])[0, 1] >= 0.99, layer
        assert np.corrcoef(expected, products[layer])[0, 1] >= 0.99, layer


@pytest.mark.long
def test_greedy_removal_equals_the_naive_loop(fetched: tuple[Path, Path]) -> None:
    """The same three blocks of 28 as trying every candidate in full, for less of the work."""
    directory, text = fetched
    tokens = tokenise(read_articles(text, "calibration"), load_tokenizer(directory))
    windows = torch.from_numpy(sample_windows(tokens, 8, 12, 0)[0])
    model = checkpoint.load_model(directory)
    layers = Layers(model, family_of(checkpoint.read_config(directory)))
    heads = list[int]()
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: heads.append(1))
    # A candidate can be given up after each of eight batches.
    order, losses = greedy_order(layers, layers.begin(windows, 1), "block", range(1, 29), 3)
    hook.remove()
    naive, lowest, tried, blocks = list[int](), list[float](), 0, 0
    for gone in range(3):
        found = {}
        for block in (block for block in range(1, 29) if block not in naive):
            with torch.inference_mode(), lacking(model, "block", {*naive, block}) as smaller:
                logits = smaller(windows, use_cache=False).logits[:, :-1].double()
            labels = windows[:, 1:].flatten()
            found[block] = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels))
            tried, blocks = tried + 1, blocks + (29 - gone) * len(windows)
        naive.append(min(found, key=lambda block: found[block]))
        lowest.append(min(found.values()))
    assert order == naive
    assert losses == pytest.approx(lowest, rel=1e-5)
    assert len(heads) < len(windows) * tried
    assert layers.windows_passed <= 0.53 * blocks
