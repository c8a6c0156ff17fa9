"""The comparison of depth methods' orders, against numbers by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.study_orders import (
    Order,
    agreement,
    draw,
    main,
    means,
    published_orders,
    rank_correlation,
    removal_order,
    rows,
)
from prunelib.criteria.depth import order_scores
from prunelib.experiment.experiment import Experiment
from prunelib.provenance import artefact
from prunelib.reporting.published import load_published

CONFIG = Path(__file__).parent.parent / "config"


def order(method: str, seed: int | None, *blocks: int, complete: bool = True) -> Order:
    return Order("m", "block", method, seed, blocks, complete)


def test_an_order_of_plain_scores_leaves_out_what_stays() -> None:
    scores = np.array([0.1, 0.5, 0.2, 0.2, 0.9])
    assert removal_order(scores, range(5)) == ((0, 2, 3, 1, 4), True)
    assert removal_order(scores, range(1, 4)) == ((2, 3, 1), True)


def test_an_order_of_a_search_ends_where_the_search_did() -> None:
    assert removal_order(order_scores([3, 1], 5), range(1, 4)) == ((3, 1), False)
    # One that came to all blocks that may go is complete: the first and the last never may.
    assert removal_order(order_scores([3, 1, 2], 5), range(1, 4)) == ((3, 1, 2), True)
    # A score that happens to be 2 n - i does not make an order a search's.
    assert removal_order(np.array([10.0, 0.5, 0.25]), range(3)) == ((2, 1, 0), True)
    assert removal_order(np.array([6.0, 0.5, 0.25]), range(3)) == ((2, 1, 0), True)


def test_rank_correlation_by_hand() -> None:
    # Places of 0, 1, 2, 3 in the other order: 1, 0, 2, 3; squared differences 1 + 1.
    assert rank_correlation((0, 1, 2, 3), (1, 0, 2, 3)) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert rank_correlation((0, 1, 2, 3), (3, 2, 1, 0)) == -1
    # Blocks that one order lacks have no place: left are 4 2 0 and 2 4 0.
    assert rank_correlation((4, 2, 0), (5, 2, 4, 1, 0)) == pytest.approx(1 - 6 * 2 / (3 * 8))
    assert rank_correlation((0, 1), (1, 0)) is None


def test_agreement_of_a_partial_order_is_its_overlap_alone() -> None:
    whole = order("a", 0, 5, 4, 3, 2, 1, 0)
    part = order("b", 0, 4, 3, 0, complete=False)
    found = agreement(whole, part)
    assert (found.common, found.spearman) == (3, None)
    assert found.overlaps == {3: pytest.approx(2 / 3), 6: None, 9: None}
    assert agreement(whole, whole).overlaps == {3: 1.0, 6: 1.0, 9: None}


def test_what_is_compared_and_its_means() -> None:
    orders = [
        order("a", 0, 0, 1, 2, 3),
        order("a", 1, 1, 0, 2, 3),
        order("b", 0, 3, 2, 1, 0),
        order("b", 1, 0, 1, 2, 3),
        order("fixed", None, 0, 1, 2, 3),
        Order("m", "mlp", "c", 0, (0, 1, 2, 3), True),
    ]
    compared = rows(orders)
    # Two seeds of a and of b, a with b at two seeds, and four with the one that has no seed.
    assert len(compared) == 8
    assert not any(row["kind"] == "mlp" for row in compared)
    found = means(compared, "spearman")
    assert found["a", "a"] == pytest.approx(0.8)
    assert found["a", "b"] == found["b", "a"] == pytest.approx((-1 + 0.8) / 2)
    assert found["fixed", "a"] == pytest.approx((1 + 0.8) / 2)
    assert means(compared, "overlap_3")["b", "b"] == pytest.approx(2 / 3)
    assert means(compared, "overlap_6") == {}


def test_published_orders_are_of_the_same_model_and_method() -> None:
    figures = load_published(CONFIG / "published")
    described = {
        "models": {"llama-7b": {"source": "hf:huggyllama/llama-7b@x"}, "smollm2-135m": {}},
        "methods": {
            "shortened_llama_taylor_any": {"method": "shortened_llama"},
            "sleb": {"method": "sleb"},
        },
    }
    ours = [
        Order("llama-7b", "block", "shortened_llama_taylor_any", 0, (1, 2), False),
        Order("llama-7b", "block", "sleb", 0, (1, 2), False),
        Order("smollm2-135m", "block", "shortened_llama_taylor_any", 0, (1, 2), False),
    ]
    (found,) = published_orders(figures, described, ours)
    assert (found.model, found.seed, found.complete) == ("llama-7b", None, True)
    assert found.method == "published: shortened_llama_taylor_any"
    assert (found.blocks[:6], len(found.blocks)) == ((0, 27, 24, 26, 25, 29), 32)


def test_the_heat_map_is_written(tmp_path: Path) -> None:
    orders = [order("a", 0, *range(6)), order("b", 0, 4, 5, complete=False)]
    draw(orders, rows(orders), tmp_path / "orders.png")
    assert (tmp_path / "orders.png").read_bytes()[:4] == b"\x89PNG"


def test_a_partly_finished_study_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = CONFIG / "experiments" / "study_depth.yaml"
    experiment = Experiment.load(path, CONFIG)
    monkeypatch.chdir(tmp_path)
    arguments = ["--experiment", str(path), "--catalogue", str(CONFIG)]
    assert main(arguments) == 2
    assert "no scores of methods that remove blocks" in capsys.readouterr().err
    values = {
        ("shortgpt", 0): np.arange(30.0),
        ("shortgpt", 1): np.arange(30.0)[::-1].copy(),
        ("sleb_third", 0): order_scores([2, 1, 9], 30),
    }
    for cell in experiment.cells:
        if cell.control or cell.recovery != "none" or (cell.method, cell.seed) not in values:
            continue
        tensors = {"block.0": values.pop((cell.method, cell.seed))}
        node = cell.steps["prune"].inputs["scores"]
        artefact.commit(
            node.directory,
            lambda out, tensors=tensors: save_file(tensors, out / "scores.safetensors"),
            {"key": node.key, "step": node.step},
        )
    assert not values
    assert main([*arguments, "--csv", "orders.csv", "--plot", "orders.png"]) == 0
    printed = capsys.readouterr().out
    assert "| smollm2-135m | block | sleb_third | 0 | 2 1 9 ... |" in printed
    assert "| shortgpt | shortgpt | -1.00 | 0.00 | 0.00 | 0.00 |" in printed
    assert "| shortgpt | sleb_third |  | 0.67 |  |  |" in printed
    with Path("orders.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["method"], row["other_method"], row["spearman"]) for row in found] == [
        ("shortgpt", "shortgpt", "-1.0"),
        ("shortgpt", "sleb_third", ""),
    ]
    assert Path("orders.png").stat().st_size > 1000
