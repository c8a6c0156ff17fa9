"""Width against depth, against numbers by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.width_depth import (
    Point,
    draw,
    equal_latency,
    interpolated,
    points_of,
    print_tables,
    realised,
    shares,
    timings,
)
from prunelib.reporting.artefacts import Artefact, Cell, Target


def point(method: str, side: str, ms: float, nll: float, size: int = 100, macs: int = 80) -> Point:
    target = "none" if side == "dense" else f"parameters {100 - size}%"
    return Point("m", method, side, target, "prefill", 1, ms, nll, size, macs, 3, True)


POINTS = [
    point("dense", "dense", 10.0, 3.0),
    point("wanda_sp", "width", 9.0, 4.0, 80, 60),
    point("wanda_sp", "width", 7.0, 5.0, 50, 40),
    point("shortgpt", "depth", 8.0, 4.25, 80, 64),
    point("shortgpt", "depth", 5.0, 6.0, 50, 40),
]


def test_realised_share_by_hand() -> None:
    # 1.2 times as fast where 1.5 times was to be had.
    assert realised(1.2, 1.5) == pytest.approx(0.4)
    assert realised(0.9, 1.5) == pytest.approx(-0.2)
    assert realised(1.0, 1.0) is None
    told = shares(POINTS[3], POINTS)
    assert told["removed"] == pytest.approx(0.2)
    assert told["speed_up"] == pytest.approx(1.25)
    # Parameters 100 over 80, MACs 80 over 64: all of it is realised.
    assert told["realised_parameters"] == pytest.approx(1)
    assert told["realised_macs"] == pytest.approx(1)
    told = shares(POINTS[1], POINTS)
    assert told["realised_parameters"] == pytest.approx((1 / 9) / 0.25)
    assert told["realised_macs"] == pytest.approx((1 / 9) / (1 / 3))
    assert shares(POINTS[0], POINTS)["realised_macs"] is None


def test_interpolation_by_hand() -> None:
    curve = [(10.0, 3.0), (7.0, 5.0), (9.0, 4.0)]
    assert interpolated(curve, 9.5) == pytest.approx(3.5)
    assert interpolated(curve, 7.5) == pytest.approx(4.75)
    assert interpolated(curve, 7.0) == 5.0
    assert interpolated(curve, 6.9) is None
    assert interpolated(curve, 10.1) is None
    assert interpolated([(7.0, 2.0), (7.0, 4.0)], 7.0) == 2.0


def test_equal_latency_is_in_log_perplexity() -> None:
    near, far = equal_latency(POINTS)
    # At 8 ms the width lies half way between 4 and 5; nothing measured is as fast as 5 ms.
    assert near["width_perplexity"] == pytest.approx(math.exp(4.5))
    assert near["ratio"] == pytest.approx(math.exp(0.25))
    assert (far["milliseconds"], far["width_perplexity"], far["ratio"]) == (5.0, None, None)


def cell(perplexity: float | None, efficiency: dict[str, Any] | None) -> Cell:
    contents = {"perplexity": {"perplexity": perplexity} if perplexity else None}
    contents["efficiency"] = efficiency
    found = {name: Artefact(Path(), told, {}) for name, told in contents.items() if told}
    return Cell("c", "m", "wanda_sp", None, Target("parameters", 0.2), 0, "none", found)


def test_points_are_of_every_batch_size_and_all_seeds() -> None:
    def phases(batch: int, seconds: float) -> dict[str, Any]:
        decode = {"batch": batch, "latency_s": seconds, "new_tokens": 4}
        return {"prefill": {"batch": batch, "latency_s": seconds}, "decode": decode}

    metrics = phases(1, 0.02) | {
        "batches": [phases(4, 0.08)],
        "parameters": 7,
        "macs": {"macs": 30, "macs_last_logits": 20},
        "comparable": False,
    }
    assert timings(metrics) == [
        *(("prefill", 1, 20.0), ("decode", 1, 5.0), ("prefill", 4, 80.0), ("decode", 4, 20.0)),
    ]
    found = points_of([cell(2.0, None), cell(8.0, metrics), cell(None, None)], "width")
    assert [(one.phase, one.batch, one.macs) for one in found] == [
        *(("prefill", 1, 20), ("decode", 1, 30), ("prefill", 4, 20), ("decode", 4, 30)),
    ]
    # The geometric mean of 2 and 8.
    assert {round(math.exp(one.nll), 9) for one in found} == {4.0}
    assert {(one.seeds, one.undisturbed) for one in found} == {(2, False)}
    assert points_of([cell(2.0, None)], "width") == []


def test_tables_and_plots_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_tables(POINTS)
    printed = capsys.readouterr().out
    assert "| prefill | 1 | parameters 20% | shortgpt | 0.2 | 70.1 | 8 | 1.25 | 1 | 1 |" in printed
    assert "not comparable" not in printed
    draw(POINTS, tmp_path / "plots.png")
    assert (tmp_path / "plots.png").read_bytes()[:4] == b"\x89PNG"
