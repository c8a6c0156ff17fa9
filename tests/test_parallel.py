"""Data parallel recovery on a CPU: two processes against one, interruption, refusals.

Tolerance against a single process: the same numbers are added in another order, so losses agree to
1e-5 relative and weights, after steps of rate 0.01, to 2e-5 absolute.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_recovery import (
    RECIPE,
    ROOT,
    STREAMED,
    _in_child,
    _kill_at,
    _pruned,
    _request,
    losses,
    read,
    run,
    streamed,
    tiny,
)

from prunelib.errors import InputError
from prunelib.recovery import parallel
from prunelib.recovery.recipe import parse_recipe

# A last step of an epoch has one window: the second process has nothing to do in it.
PLAIN = replace(RECIPE, dropout=0.0, micro_batch=1, clip_norm=0.5)
STREAM = replace(STREAMED, dropout=0.05)


def both(path: Path, name: str, kill: int = 0) -> list[int]:
    """Return the statuses of two forked processes; rank 0 dies after its ``kill``-th save."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def work(rank: int) -> None:
        os.environ.update(parallel._environment(rank, 2, port))
        if kill and rank == 0:
            _kill_at("save_state", kill, "after", signal.SIGKILL)
        with parallel._joined("cpu") as processes:
            assert (processes.rank, processes.count) == (rank, 2)
            start(path, name, processes)

    helper = os.fork()
    if helper == 0:
        try:
            work(1)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return [_in_child(lambda: work(0)), os.waitpid(helper, 0)[1]]


def start(path: Path, name: str, processes: parallel.Processes) -> None:
    if name == "plain":
        run(path, replace(PLAIN, processes=processes.count), processes=processes)
    else:
        recipe = replace(STREAM, processes=processes.count)
        run(path, recipe, tiny(vocab_size=97), streamed(path), processes=processes)


def _all(root: Path) -> None:
    """All runs, in forks of one process that has everything imported."""
    torch.set_num_threads(1)
    start(root / "plain single", "plain", parallel.ALONE)
    told = {"plain": both(root / "plain", "plain"), "stream": both(root / "stream", "stream")}
    told["killed"] = both(root / "killed", "stream", kill=2)
    told["state"] = [path.name for path in (root / "killed" / "state").iterdir()]
    told["resumed"] = both(root / "killed", "stream")
    print(json.dumps(told))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("parallel")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, str(path)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return path, json.loads(done.stdout.splitlines()[-1])


def test_two_processes_do_what_one_does(runs):
    path, told = runs
    assert told["plain"] == [0, 0]
    ours, single = losses(path / "plain"), losses(path / "plain single")
    for row, expected in zip(ours, single, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    weights, expected = (
        load_file(path / name / "out" / "adapter_model.safetensors")
        for name in ("plain", "plain single")
    )
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-5)
        assert not torch.equal(tensor, torch.zeros_like(tensor))


def test_two_processes_go_on_bit_for_bit(runs):
    """With dropout, a stream, accumulation and a cosine: every generator and place is restored."""
    path, told = runs
    assert told["stream"] == told["resumed"] == [0, 0]
    assert told["killed"][0] == signal.SIGKILL
    # The other one notices that it is alone.
    assert told["killed"][1] != 0
    assert told["state"] == ["step-00000004"]
    assert read(path / "killed") == read(path / "stream")


TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs are visible"),
]


@pytest.mark.long
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_recover_step_starts_its_processes(device, tiny_checkpoint, tmp_path, monkeypatch):
    from workflow_scripts import recover as recover_step

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    checkpoint = _pruned(tiny_checkpoint("llama"), tmp_path / "pruned")
    text = tmp_path / "text"
    text.mkdir()
    row = {"id": 1, "title": "a", "text": "The cat sat on the mat. " * 40, "split": "recovery"}
    (text / "articles.jsonl").write_text(json.dumps(row) + "\n")
    found = []
    for processes in (1, 2):
        recipe = {
            "max_steps": 3, "warmup_steps": 0, "batch": 4, "micro_batch": 2, "length": 16,
            "dropout": 0.0, "processes": processes,
        }  # fmt: skip
        params = {"recipe": recipe, "seed": 0, "device": device, "dtype": "float32", "threads": 1}
        out = tmp_path / str(processes) / "out"
        inputs = {"checkpoint": checkpoint, "text": text}
        recover_step.main(_request("recover", out, params, **inputs), out)
        found.append([row["loss"] for row in losses(out.parent)])
        assert json.loads((out / "meta.json").read_text())["recipe"]["processes"] == processes
    assert found[1] == pytest.approx(found[0], rel=1e-5 if device == "cpu" else 1e-4)
    assert not os.environ.get("RANK")
    assert not torch.distributed.is_initialized()


def test_processes_are_refused_where_they_do_not_fit(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="not a multiple of micro_batch 2 times processes 3"):
        parse_recipe({"batch": 4, "micro_batch": 2, "processes": 3})
    with pytest.raises(InputError, match="processes is 2; the run has 1"):
        run(tmp_path, replace(PLAIN, processes=2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(InputError, match="asks for 4 processes, one per GPU; 2 are visible"),
        parallel.started(4, "cuda", []),
    ):
        pass
    with (
        pytest.raises(InputError, match="device cuda:1 is one GPU"),
        parallel.started(2, "cuda:1", []),
    ):
        pass


if __name__ == "__main__":
    _all(Path(sys.argv[1]))
