"""What people are told of running and failed steps, without a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from prunelib.cluster import orphans, progress
from prunelib.cluster.progress import (
    DONE,
    FAILED,
    QUEUED,
    RUNNING,
    WAITING,
    explain_end,
    failures,
    standing,
    why_missing,
)
from prunelib.cluster.slurm import Job, JobEnd
from prunelib.cluster.watch import Idleness, Silence
from prunelib.errors import InputError
from prunelib.experiment.graph import Node
from prunelib.provenance import artefact
from prunelib.provenance.attempt import attempt_path, begin


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Node, Node]:
    """A prune step and the perplexity step that waits for it, in a directory of their own."""
    monkeypatch.chdir(tmp_path)
    prune = Node("prune", ("m", "magnitude_l2"), {}, {})
    return prune, Node("perplexity", ("m", "magnitude_l2"), {}, {"checkpoint": prune})


def job(node: Node, state: str = "PENDING", job_id: str = "7") -> Job:
    comment = f"rule_{node.step}_wildcards_m_magnitude_l2_{node.key}"
    return Job(job_id, state, Path.cwd(), comment, "pruning_x", "", 0)


def end(state: str, **facts: object) -> JobEnd:
    content = {"exit_code": 0, "signal": 0, "reason": None, "nodes": "n1"} | facts
    return JobEnd("7", state, **content)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ended", "log", "words"),
    [
        (end("OUT_OF_MEMORY"), "", "out of memory, killed by SLURM job 7 on n1"),
        (
            end("FAILED", signal=9),
            "slurmstepd-n1: error: StepId=7.0 exceeded memory limit (352321536 > 314572800), being",
            "out of memory, killed by SLURM job 7 on n1: it used 336 of 300 MiB",
        ),
        (end("TIMEOUT"), "", "time limit reached, ended by SLURM job 7 on n1"),
        (end("NODE_FAIL"), "", "node failure: SLURM job 7 on n1"),
        (end("CANCELLED", cancelled_by="1000"), "", "cancelled by user 1000: SLURM job 7 on n1"),
        (end("CANCELLED", nodes=None), "", "cancelled: SLURM job 7"),
        (end("PREEMPTED"), "", "preempted by another job: SLURM job 7 on n1"),
        (end("FAILED", signal=9), "", "killed by signal 9: SLURM job 7 on n1 FAILED"),
        (end("FAILED", exit_code=1), "", "failed with exit code 1: SLURM job 7 on n1"),
    ],
)
def test_how_slurm_ended_a_job_in_words(ended: JobEnd, log: str, words: str) -> None:
    assert explain_end(ended, log) == words


def test_a_step_waits_is_queued_runs_fails_and_is_done(chain: tuple[Node, Node]) -> None:
    prune, _ = chain
    assert standing(prune, []).state == WAITING
    assert standing(prune, [job(prune)]) == progress.Standing(QUEUED, "SLURM job 7 pending")
    running = begin(prune.directory, "prune", prune.key)
    prune.log.parent.mkdir(parents=True)
    prune.log.write_text("2026-01-01 INFO prunelib.x: 3 of 5 tensors\n")
    found = standing(prune, [])
    assert found.state == RUNNING
    assert found.detail.endswith("0 min, 3 of 5 tensors")
    running.fail("no such channel", 2, permanent=True)
    assert standing(prune, []) == progress.Standing(FAILED, f"no such channel; log {prune.log}")
    running.succeed()
    record = {"key": prune.key, "step": "prune"}
    artefact.commit(prune.directory, lambda out: (out / "x").write_text("1"), record)
    assert standing(prune, []).state == DONE


def test_a_killed_process_is_told_from_a_running_one(
    chain: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    prune, _ = chain
    monkeypatch.setenv("PRUNELIB_RUN", "1")
    begin(prune.directory, "prune", prune.key).fail("", 1, permanent=False)
    running = begin(prune.directory, "prune", prune.key)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    note = asdict(running.attempt) | {"pid": gone.pid}
    running.succeed()
    attempt_path(prune.directory).write_text(json.dumps(note))
    found = standing(prune, [])
    assert found.state == FAILED
    assert f"process {gone.pid} on" in found.detail
    assert "(try 2)" in found.detail
    # In a SLURM job only the queue knows: here there is none.
    note["slurm_job"] = "7"
    attempt_path(prune.directory).write_text(json.dumps(note))
    assert standing(prune, [job(prune, "RUNNING")]).state == RUNNING


def test_failures_of_this_run_are_told_and_older_ones_are_not(chain: tuple[Node, Node]) -> None:
    prune, perplexity = chain
    running = begin(prune.directory, "prune", prune.key)
    running.fail("loss is NaN", 3, permanent=True)
    nodes = {node.key: node for node in chain}
    started = running.attempt.started
    line = f"failed: prune of m/magnitude_l2: loss is NaN; log {prune.log}"
    assert failures(nodes, started) == [line]
    assert failures(nodes, started + 3600) == []
    assert why_missing({"prune": prune, "perplexity": perplexity}) == {
        "prune": f"prune of m/magnitude_l2 failed: loss is NaN; log {prune.log}",
        "perplexity": f"prune of m/magnitude_l2 failed: loss is NaN; log {prune.log}",
    }


def test_silence_is_told_after_three_minutes_and_every_quarter_of_an_hour() -> None:
    said: list[tuple[int, str]] = []
    silence = Silence("squeue", lambda line: said.append((now, line)))
    for now in range(0, 3600, 60):
        silence.heard(now < 600 or now >= 2700, now)
    assert [moment for moment, _ in said] == [780, 1680, 2580, 2700]
    assert said[0][1].startswith("squeue has not answered for 3 min: jobs run on")
    assert said[-1][1] == "squeue answers again after 35 min"


def test_a_run_is_stuck_when_nothing_is_at_work_for_five_minutes() -> None:
    idleness = Idleness()
    looks = [(True, 0), (False, 60), (False, 300), (True, 330), (False, 340), (False, 600)]
    assert not any(idleness.is_stuck(*look) for look in looks)
    assert idleness.is_stuck(False, 640)


def fake_queue(monkeypatch: pytest.MonkeyPatch, looks: list[list[Job]]) -> None:
    monkeypatch.setattr(orphans, "workflow_jobs", lambda: looks.pop(0))


def test_jobs_of_an_earlier_run_are_waited_for(
    chain: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job(chain[0])
    fake_queue(monkeypatch, [[one], [one], [one], []])
    said: list[str] = []
    slept: list[float] = []
    assert orphans.settle("wait", said.append, slept.append)
    assert said[0].startswith("1 job of an earlier run in this directory: 7 (pending, prune)")
    assert len(slept) == 2
    fake_queue(monkeypatch, [[]])
    assert not orphans.settle("wait", said.append, slept.append)


def test_jobs_of_an_earlier_run_are_cancelled_or_refused(
    chain: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[str] = []
    monkeypatch.setattr(orphans, "cancel", cancelled.extend)
    fake_queue(monkeypatch, [[job(chain[0])], []])
    assert orphans.settle("cancel", lambda line: None, lambda seconds: None)
    assert cancelled == ["7"]
    fake_queue(monkeypatch, [[job(chain[0])]])
    with pytest.raises(InputError, match="orphans=wait or orphans=cancel"):
        orphans.settle("refuse", lambda line: None)
    with pytest.raises(InputError, match="'kill'; allowed: wait, cancel, refuse"):
        orphans.check_policy("kill", "configuration")


def test_no_slurm_here_means_no_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    assert progress.workflow_jobs() is None
