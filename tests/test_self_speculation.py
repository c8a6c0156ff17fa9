"""Scripts that measure speculation and the greedy search: verdicts and sums, by hand."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from prunelib.errors import InputError

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Any:
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield {
            name: importlib.import_module(name) for name in ("self_speculation", "greedy_search")
        }
    finally:
        sys.path.remove(str(SCRIPTS))


def prompt(plain: float, seconds: float, differing: Any = None, **more: Any) -> dict[str, Any]:
    counts = {"drafted": 8, "accepted": 4, "judged": 6, "passes": 3, "searches": 1}
    works = {"draft_work": 4.0, "search_work": 0.5, "tokens": 8}
    times = {"plain_seconds": plain, "seconds": seconds}
    return times | counts | works | {"differing": differing, "scores": [0.5]} | more


def content(prompts: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    told = {"row": "swift", "threshold": 0.0} | settings
    return {"settings": told, "cost": 0.5, "skipped": {}, "prompts": prompts}


def test_a_tie_is_what_rounding_can_turn(scripts: Any) -> None:
    limit = scripts["self_speculation"].tie_limit
    # Both logits may be off by what was measured.
    assert limit(4e-5, 20.0) == pytest.approx(8e-5)
    # A unit in the last place of 20 is 2^-19; what differs by more than 64 of them is no rounding.
    assert limit(1.0, 20.0) == pytest.approx(2 * 64 * 2**-19)
    assert limit(0.0, 20.0) == 0


def test_a_row_counts_the_search_and_pairs_prompts(scripts: Any) -> None:
    summary = scripts["self_speculation"].summary
    found = summary(content([prompt(2.0, 1.0), prompt(3.0, 2.0), prompt(1.0, 1.0)]), 0.0)
    assert found["speed_up"] == pytest.approx(1.5)
    assert 1 <= found["interval"][0] < found["interval"][1] <= 2
    assert found["acceptance_rate"] == pytest.approx(12 / 18)
    # 21 tokens behind the first ones, 9 passes, 12 passes' work of drafts, 1.5 of the search.
    assert found["tokens_per_pass"] == pytest.approx(21 / 9)
    assert found["gpu"] == pytest.approx(21 / 22.5)
    assert found["gpu_after_search"] == pytest.approx(21 / 21)
    assert found["gpu_best"][0] >= 1
    assert "gpu_best" not in summary(content([prompt(2.0, 1.0)], threshold=0.6), 0.0)
    assert summary(content([prompt(2.0, 1.0)], threshold=0.6), 0.0)["gpu"] == pytest.approx(7 / 7.5)


def test_what_differs_by_more_than_a_tie_fails(
    scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = scripts["self_speculation"]
    rounding = {"positions": 9, "flipped": 0, "largest_difference": 4e-5, "least_gap": 1e-3}
    machine = {"tokens": 5, "pass_ratio": 1.5, "load_average_before": [0.5], "rounding": rounding}
    module.write(tmp_path / "machine.json", machine)

    def exit_code(gap: float) -> int:
        parted = {"place": 3, "gap": gap, "rounding": 1e-5, "largest": 20.0}
        module.write(tmp_path / "swift-0.json", content([prompt(2.0, 1.0, parted)]))
        return int(module.main(["--out", str(tmp_path), "--report"]))

    assert exit_code(7e-5) == 0
    assert "prompt 0 parts at token 3, logits 7e-05 apart: a tie" in capsys.readouterr().out
    assert exit_code(9e-5) == 1
    assert "more than rounding" in capsys.readouterr().out
    assert module.main(["--out", str(tmp_path / "none"), "--report"]) == 2
    assert "no row is there" in capsys.readouterr().err


def test_a_row_goes_on_with_the_same_settings_alone(scripts: Any, tmp_path: Path) -> None:
    module, path = scripts["self_speculation"], tmp_path / "swift-0.json"
    assert module.begun(path, {"row": "swift"}) == []
    module.write(path, content([prompt(2.0, 1.0)], blocks=4))
    assert len(module.begun(path, {"row": "swift", "blocks": 4})) == 1
    with pytest.raises(InputError, match="is of other blocks; name another --out"):
        module.begun(path, {"row": "swift", "blocks": 5})
    assert json.loads(path.read_text())["cost"] == 0.5


def test_the_greedy_search_is_held_to_its_limit(scripts: Any) -> None:
    module = scripts["greedy_search"]
    # Medians, not the median of ratios.
    assert module.ratio([1.0, 9.0, 2.0], [4.0, 3.0, 5.0]) == pytest.approx(0.5)
    same = [([3, 1], [3, 1]), ([3, 1], [3, 1])]
    assert [holds for _, holds in module.verdict(same, 0.65)] == [True, True]
    assert [holds for _, holds in module.verdict(same, 0.66)] == [True, False]
    assert [holds for _, holds in module.verdict([*same, ([3], [1])], 0.5)] == [False, True]
    assert [holds for _, holds in module.verdict(same, math.nan)] == [True, False]
