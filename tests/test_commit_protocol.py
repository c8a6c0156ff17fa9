"""The commit protocol: kills, races, full disks and changed code never leave a false artefact."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from prunelib.errors import InputError, PrunelibError
from prunelib.provenance import artefact, liveness
from prunelib.provenance.attempt import Attempt, attempt_path, begin, is_alive, read_attempt
from prunelib.provenance.fingerprint import ROOT
from prunelib.provenance.step import (
    StepRequest,
    execute,
    planned_key,
    state_directory,
)

KEY = "0123456789abcdef"


def fill(out: Path) -> None:
    """Write two files in three goes, as a step does."""
    (out / "weights").mkdir()
    with (out / "weights" / "model.bin").open("wb") as file:
        for _ in range(3):
            file.write(b"x" * 1000)
            file.flush()
    (out / "metrics.json").write_text('{"perplexity": 1.5}\n')


def is_whole(out: Path) -> bool:
    """Judge an artefact by its contents, without the code under test."""
    record = json.loads((out / "provenance.json").read_text())
    assert set(record["files"]) == {"metrics.json", "weights/model.bin"}
    for name, facts in record["files"].items():
        content = (out / name).read_bytes()
        if len(content) != facts["size"]:
            return False
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            return False
    return (out / "weights" / "model.bin").read_bytes() == b"x" * 3000


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "prune" / "wanda" / KEY


def test_an_artefact_is_made_once(out: Path) -> None:
    assert artefact.commit(out, fill, {"step": "prune", "key": KEY})
    assert is_whole(out)
    assert beside(out) == [KEY]
    record = artefact.read(out)
    assert record["step"] == "prune"
    assert record["seconds"] >= 0
    assert record["started"] <= record["finished"]
    assert record["started"].endswith("+00:00")
    assert record["peak_memory_bytes"] > 2**20
    assert record["peak_gpu_memory_bytes"] is None

    def never(directory: Path) -> None:
        raise AssertionError("a valid artefact was made again")

    assert not artefact.commit(out, never, {"step": "prune", "key": KEY})
    artefact.verify(out)


def leave_empty(out: Path) -> None:
    out.mkdir(parents=True)


def leave_partial(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "metrics.json").write_text("{")
    (out / "old").mkdir()


def leave_file(out: Path) -> None:
    out.parent.mkdir(parents=True)
    out.write_text("a file")


def leave_link(out: Path) -> None:
    out.parent.mkdir(parents=True)
    elsewhere = out.parent.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    out.symlink_to(elsewhere)


def leave_other_key(out: Path) -> None:
    artefact.commit(out, fill, {"key": "another"})


LEFT = [leave_empty, leave_partial, leave_file, leave_link, leave_other_key]


@pytest.mark.parametrize("leave", LEFT)
def test_what_is_not_a_valid_artefact_of_this_key_gives_way(
    out: Path, leave: Callable[[Path], None]
) -> None:
    leave(out)
    assert artefact.commit(out, fill, {"key": KEY})
    assert is_whole(out)
    assert not out.is_symlink()
    assert beside(out) == [KEY]
    if leave is leave_link:
        assert (out.parent.parent / "elsewhere" / "kept").exists()


def test_errors_and_refusals_leave_nothing(out: Path) -> None:
    def fail(directory: Path) -> None:
        fill(directory)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        artefact.commit(out, fail, {"key": KEY})
    assert beside(out) == []

    def refuse() -> None:
        raise PrunelibError("no")

    with pytest.raises(PrunelibError, match="no"):
        artefact.commit(out, fill, {"key": KEY}, refuse)
    assert beside(out) == []


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda d: None, "no file was written"),
        (lambda d: (d / "empty").mkdir(), "no file was written"),
        (lambda d: (d / "link").symlink_to("/etc/passwd"), "link of the result is not a regular"),
        (lambda d: (d / "provenance.json").write_text("{}"), "provenance.json of its own"),
    ],
)
def test_results_that_are_not_files_are_refused(out: Path, write, message: str) -> None:
    with pytest.raises(PrunelibError, match=message):
        artefact.commit(out, write, {"key": KEY})
    assert beside(out) == []


def test_a_full_disk_is_one_line_with_path_and_free_bytes(out: Path) -> None:
    def write(directory: Path) -> None:
        (directory / "model.bin").symlink_to("/dev/full")
        with (directory / "model.bin").open("w") as file:
            file.write("x" * 100_000)

    with pytest.raises(PrunelibError, match=r"^no space left on device while writing .*tmp-") as e:
        artefact.commit(out, write, {"key": KEY})
    free = int(str(e.value).split(": ")[1].split()[0])
    assert abs(free - shutil.disk_usage(out.parent).free) < 2**30
    assert "\n" not in str(e.value)
    assert beside(out) == []


def test_a_full_disk_is_recognised_in_errors_of_compiled_writers(out: Path) -> None:
    def write(directory: Path) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(PrunelibError, match=r"^no space left on device .* bytes free$"):
        artefact.commit(out, write, {"key": KEY})

    def fail(directory: Path) -> None:
        raise OSError(errno.EIO, "other")

    with pytest.raises(OSError, match="other"):
        artefact.commit(out, fail, {"key": KEY})


# --- writers that die ----------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked process; return its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process kill itself before its ``count``-th call that changes the disk."""
    left = [count]

    def wrap(call: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    for name in ("mkdir", "fsync", "rename", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    # Record and results are written through these two.
    monkeypatch.setattr(json, "dump", wrap(json.dump))
    monkeypatch.setattr(Path, "open", wrap(Path.open))


@pytest.mark.parametrize("leave", [None, *LEFT])
def test_a_kill_before_any_disk_operation_leaves_no_false_artefact(
    tmp_path: Path, leave: Callable[[Path], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = 0
    for count in range(1, 200):
        out = tmp_path / str(count) / "prune" / KEY
        if leave:
            leave(out)

        def work(out: Path = out, count: int = count) -> None:
            die_at(count, monkeypatch)
            artefact.commit(out, fill, {"key": KEY})

        code = in_child(work)
        assert code in (0, -signal.SIGKILL)
        if artefact.is_valid(out, KEY):
            assert is_whole(out)
        assert artefact.commit(out, fill, {"key": KEY}) or is_whole(out)
        assert is_whole(out)
        assert beside(out) == [KEY]
        if code == 0:
            break
        killed += 1
    assert code == 0
    assert killed >= 10


SLOW_STEP = """
import pathlib, sys, time
from prunelib.provenance import artefact
def write(out):
    (out / "model.bin").write_bytes(b"x" * 1000)
    print("writing", flush=True)
    time.sleep(60)
artefact.commit(pathlib.Path(sys.argv[1]), write, {"key": sys.argv[2]})
"""


def start_writer(out: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SLOW_STEP, str(out), KEY]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "writing\n"
    return process


def test_the_next_run_cleans_up_after_a_killed_writer_but_not_a_live_one(out: Path) -> None:
    killed, alive = start_writer(out), start_writer(out)
    try:
        killed.kill()
        # Not collected yet: a zombie must count as dead, containers often keep them.
        host = liveness.host_name()
        while (liveness.process_start(killed.pid)) is not None:
            time.sleep(0.02)
        assert len(beside(out)) == 2
        assert not artefact.is_valid(out)
        assert artefact.commit(out, fill, {"key": KEY})
        assert beside(out) == [KEY, f"{KEY}.tmp-{host}-{alive.pid}"]
    finally:
        for process in (killed, alive):
            process.kill()
            process.communicate()
    artefact.remove_dead_writers(out)
    assert beside(out) == [KEY]


@pytest.mark.parametrize(("hours", "gone"), [(0.1, False), (5.5, False), (6.5, True)])
def test_a_silent_writer_on_another_host_is_dead_after_six_hours(
    out: Path, hours: float, gone: bool
) -> None:
    left = out.with_name(f"{KEY}.tmp-gpu-node-7.cluster-{os.getpid()}")
    left.mkdir(parents=True)
    os.utime(left, (time.time() - hours * 3600,) * 2)
    artefact.remove_dead_writers(out)
    assert left.exists() != gone


def test_a_reused_process_number_does_not_keep_a_scratch_directory(out: Path) -> None:
    left = out.with_name(f"{KEY}.tmp-{liveness.host_name()}-{os.getppid()}")
    left.mkdir(parents=True)
    artefact.remove_dead_writers(out)
    assert left.exists()
    os.utime(left, (1, 1))
    artefact.remove_dead_writers(out)
    assert not left.exists()


def test_what_belongs_to_other_keys_is_left_alone(out: Path) -> None:
    names = [f"{KEY}0.tmp-node-1", f"{KEY}.state", f"{KEY}.dvc", f"x{KEY}.tmp-node-1"]
    for name in names:
        out.with_name(name).mkdir(parents=True)
        os.utime(out.with_name(name), (1, 1))
    artefact.commit(out, fill, {"key": KEY})
    assert beside(out) == sorted([KEY, *names])


def test_a_working_writer_shows_a_heartbeat(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact, "_BEAT_SECONDS", 0.05)

    def write(directory: Path) -> None:
        fill(directory)
        os.utime(directory, (1, 1))
        deadline = time.time() + 20
        while directory.stat().st_mtime < 2:
            assert time.time() < deadline
            time.sleep(0.02)

    assert artefact.commit(out, write, {"key": KEY})


# --- writers that race ---------------------------------------------------------------------------

RACER = """
import pathlib, sys, time
from prunelib.provenance import artefact
out, key, go, count = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), 0
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
for turn in range(60):
    target = out / str(turn) / key
    def write(directory):
        (directory / "weights").mkdir()
        (directory / "weights/model.bin").write_bytes(b"x" * 3000)
        (directory / "metrics.json").write_text(sys.argv[4])
    count += artefact.commit(target, write, {"key": key})
    artefact.verify(target)
print(count)
"""


@pytest.mark.parametrize("leave", [None, leave_empty, leave_partial])
def test_racing_writers_all_succeed_and_leave_one_artefact(
    tmp_path: Path, leave: Callable[[Path], None] | None
) -> None:
    for turn in range(60):
        if leave:
            leave(tmp_path / "race" / str(turn) / KEY)
    racers = []
    for name in "abc":
        command = [sys.executable, "-c", RACER, str(tmp_path / "race"), KEY, str(tmp_path / "go")]
        racers.append(
            subprocess.Popen([*command, name], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        )
    for racer in racers:
        assert racer.stdout
        assert racer.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    made = [int(racer.communicate(timeout=120)[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    # With an invalid target two may replace it one after the other, each with a whole artefact.
    assert sum(made) >= 60
    for turn in range(60):
        out = tmp_path / "race" / str(turn) / KEY
        assert is_whole(out)
        assert beside(out) == [KEY]


def test_the_loser_of_a_race_keeps_the_winner(out: Path) -> None:
    def overtaken(directory: Path) -> None:
        fill(directory)
        assert in_child(lambda: artefact.commit(out, fill, {"key": KEY, "by": "winner"})) == 0

    assert not artefact.commit(out, overtaken, {"key": KEY, "by": "loser"})
    assert artefact.read(out)["by"] == "winner"
    assert is_whole(out)
    assert beside(out) == [KEY]


def test_a_target_that_becomes_valid_while_it_is_set_aside_is_kept(out: Path) -> None:
    artefact.commit(out, fill, {"key": KEY, "by": "winner"})
    artefact._set_aside(out, KEY)
    assert artefact.read(out)["by"] == "winner"
    assert beside(out) == [KEY]


def test_failing_after_another_writer_has_finished_is_success(out: Path) -> None:
    def overtaken(directory: Path) -> None:
        assert in_child(lambda: artefact.commit(out, fill, {"key": KEY})) == 0
        raise FileNotFoundError("the winner removed the state that this one read")

    assert not artefact.commit(out, overtaken, {"key": KEY})
    assert is_whole(out)


# --- steps ---------------------------------------------------------------------------------------

ENTRY = ("prunelib.errors",)
PACKAGES = ("psutil",)


def make_request(tmp_path: Path) -> StepRequest:
    model = tmp_path / "model" / "feedfeedfeedfeed"
    if not model.exists():
        artefact.commit(model, fill, {"key": model.name})
    params = {"ratio": 0.2, "layers": [4, 5]}
    key = planned_key("prune", params, ENTRY, {"model": model.name}, PACKAGES)
    out = tmp_path / "prune" / "wanda" / key
    return StepRequest("prune", key, params, {"model": model}, out, ENTRY, PACKAGES)


def never(request: StepRequest, out: Path) -> None:
    raise AssertionError("work that is refused was begun")


def main(request: StepRequest, out: Path) -> None:
    (out / "ratio.txt").write_text(str(request.params["ratio"]))


def test_a_step_commits_under_its_planned_key(tmp_path: Path) -> None:
    request = make_request(tmp_path)
    state = state_directory(request)
    assert state == request.out.with_name(f"{request.key}.state")
    state.mkdir(parents=True)
    (state / "optimiser.safetensors").write_text("resume me")
    assert execute(request, main)
    assert not state.exists()
    assert (request.out / "ratio.txt").read_text() == "0.2"
    record = artefact.read(request.out)
    assert record["step"] == "prune"
    assert record["key"] == request.key == request.out.name
    assert record["params"] == request.params
    assert record["upstream"] == {"model": "feedfeedfeedfeed"}
    # Errors and provenance cannot change a number.
    assert not any(name.startswith("prunelib.") for name in record["definitions"])
    assert set(record["packages"]) == {"psutil"}
    assert set(record) >= {"fingerprint", "python", "host", "git", "command", "environment"}
    assert not execute(request, main)


def test_a_record_has_the_costs_of_all_that_the_step_builds_on(tmp_path: Path) -> None:
    """Directly and through others, each once; of records without costs behind them, as far."""
    request = make_request(tmp_path)
    source = tmp_path / "statistics" / "beefbeefbeefbeef"
    behind = {"step": "calibration", "seconds": 3, "peak_memory_bytes": 7}
    costs = {"upstream_costs": {"0123456789abcdef": behind}}
    artefact.commit(source, fill, {"step": "statistics", "key": source.name, **costs})
    inputs = request.inputs | {"statistics": source, "again": source}
    upstream = {name: path.name for name, path in inputs.items()}
    key = planned_key("prune", request.params, ENTRY, upstream, PACKAGES)
    out = request.out.with_name(key)
    assert execute(replace(request, key=key, inputs=inputs, out=out), main)
    found = artefact.read(out)["upstream_costs"]
    assert set(found) == {"feedfeedfeedfeed", source.name, "0123456789abcdef"}
    assert found["0123456789abcdef"] == behind
    record = artefact.read(source)
    assert found[source.name] == {
        "step": "statistics",
        "seconds": record["seconds"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "peak_gpu_memory_bytes": None,
    }


def test_a_valid_artefact_is_enough_even_without_its_inputs(tmp_path: Path) -> None:
    request = make_request(tmp_path)
    execute(request, main)
    shutil.rmtree(request.inputs["model"])
    assert not execute(request, main)


def test_state_survives_a_failure(tmp_path: Path) -> None:
    request = make_request(tmp_path)

    def fail(request: StepRequest, out: Path) -> None:
        state_directory(request).mkdir(parents=True)
        raise RuntimeError("time limit")

    with pytest.raises(RuntimeError):
        execute(request, fail)
    assert state_directory(request).is_dir()


@pytest.mark.parametrize(
    "change",
    [
        lambda r: replace(r, key="0" * 16),
        lambda r: replace(r, params=r.params | {"ratio": 0.21}),
        lambda r: replace(r, step="score"),
        lambda r: replace(r, entry=("prunelib.errors", "prunelib.device")),
        lambda r: replace(r, packages=("psutil", "numpy")),
        lambda r: replace(r, inputs={"base": r.inputs["model"]}),
        lambda r: replace(r, inputs={}),
    ],
)
def test_a_key_that_is_not_the_planned_one_is_refused(tmp_path: Path, change) -> None:
    request = change(make_request(tmp_path))
    request = replace(request, out=tmp_path / "prune" / "other" / request.key)
    with pytest.raises(PrunelibError, match=f"planned key {request.key}, but"):
        execute(request, never)
    assert not request.out.exists()


def test_another_upstream_key_is_refused(tmp_path: Path) -> None:
    request = make_request(tmp_path)
    record = json.loads((request.inputs["model"] / "provenance.json").read_text())
    record["key"] = "beefbeefbeefbeef"
    (request.inputs["model"] / "provenance.json").write_text(json.dumps(record))
    with pytest.raises(PrunelibError, match="planned key"):
        execute(request, never)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d), "is not finished"),
        (lambda d: (d / "metrics.json").write_text("{"), "another size"),
        (lambda d: (d / "provenance.json").unlink(), "is not finished"),
    ],
)
def test_inputs_that_are_not_whole_are_refused(tmp_path: Path, damage, message: str) -> None:
    request = make_request(tmp_path)
    damage(request.inputs["model"])
    with pytest.raises(InputError, match=f"input 'model': .*{message}"):
        execute(request, never)


def test_requests_survive_json(tmp_path: Path) -> None:
    request = make_request(tmp_path)
    assert StepRequest.from_json(request.to_json()) == request
    assert "\n" not in request.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown colour"),
        ({"key": None}, "key must be a text"),
        ({"params": []}, "params must be an object"),
        ({"inputs": ["x"]}, "inputs must be an object"),
        ({"inputs": {"model": 3}}, "model must be a text"),
        ({"entry": "prunelib.errors"}, "entry must be a list"),
        ({"packages": [1]}, "packages must be a list"),
    ],
)
def test_requests_of_another_form_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    content = json.loads(make_request(tmp_path).to_json()) | change
    with pytest.raises(InputError, match=message):
        StepRequest.from_json(json.dumps(content))


def test_requests_with_missing_keys_or_without_json_are_refused(tmp_path: Path) -> None:
    content = json.loads(make_request(tmp_path).to_json())
    del content["packages"]
    with pytest.raises(InputError, match="missing packages"):
        StepRequest.from_json(json.dumps(content))
    for text in ("", "{", "[]", '{"params": NaN}'):
        with pytest.raises(InputError, match="request: "):
            StepRequest.from_json(text)


# --- step scripts as processes -------------------------------------------------------------------

SCRIPT = """
import importlib, os, pathlib, sys, time
from prunelib.errors import InputError, NonFiniteError
from prunelib.provenance.step import run_step
from prunelib.methods import score

def main(request, out):
    (out / "score.txt").write_text(str(score.value()))
    what = request.params["what"]
    if what == "wait":
        print("waiting", flush=True)
        for _ in range(600):
            if pathlib.Path("go").exists():
                break
            time.sleep(0.1)
    elif what == "non-finite":
        raise NonFiniteError("loss is NaN\\nat step 3")
    elif what == "bug":
        raise KeyError("bug")
    elif what == "hidden":
        importlib.import_module("prunelib.methods." + "hidden")
    elif what == "edit":
        path = pathlib.Path(score.__file__)
        path.write_text(path.read_text().replace("41", "43"))
    elif what == "full":
        open("/dev/full", "w").write("x" * 100000)

if __name__ == "__main__":
    run_step(main)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Set up a small project with the provenance code in it, which its scripts import."""
    root = tmp_path / "project"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "prunelib/provenance", root / "prunelib/provenance", ignore=skip)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "prunelib" / name, root / "prunelib" / name)
    (root / "prunelib/methods").mkdir()
    (root / "prunelib/methods/__init__.py").touch()
    (root / "prunelib/methods/score.py").write_text("def value():\n    return 41\n")
    (root / "prunelib/methods/hidden.py").write_text("H = 1\n")
    (root / "workflow_scripts").mkdir()
    (root / "workflow_scripts/prune.py").write_text(SCRIPT)
    return root


def plan(project: Path, what: str, entry: tuple[str, ...] = ("workflow_scripts/prune.py",)) -> str:
    """Plan a step in a process of its own, as the workflow does; return the request."""
    code = (
        "import sys, pathlib\nfrom prunelib.provenance.step import StepRequest, planned_key\n"
        f"params, entry = {{'what': {what!r}}}, {entry!r}\n"
        "key = planned_key('prune', params, entry, {}, ['psutil'])\n"
        "out = pathlib.Path('results/prune') / key\n"
        "print(StepRequest('prune', key, params, {}, out, entry, ('psutil',)).to_json())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def start(
    project: Path,
    request: str,
    disposition: signal.Handlers = signal.SIG_DFL,
    run: str = "1",
) -> subprocess.Popen:
    """Start the step script; tests that run in the background may have inherited SIG_IGN."""

    def dispose() -> None:
        for number in SIGNALS:
            signal.signal(number, disposition)

    return subprocess.Popen(
        [
            sys.executable,
            "workflow_scripts/prune.py",
            "--request",
            request,
        ],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project), "PRUNELIB_RUN": run},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=dispose,
    )


def run(project: Path, request: str, name: str = "1") -> tuple[int, str]:
    process = start(project, request, run=name)
    errors = process.communicate(timeout=60)[1]
    return process.returncode, errors


def results(project: Path) -> list[str]:
    """What lies among the artefacts, the notes on attempts aside."""
    found = sorted(path.name for path in (project / "results/prune").glob("*"))
    return [name for name in found if not name.endswith(".attempt.json")]


def test_a_script_makes_its_artefact_and_then_has_nothing_to_do(project: Path) -> None:
    request = plan(project, "work")
    code, errors = run(project, request)
    assert (code, "Traceback" in errors) == (0, False), errors
    key = json.loads(request)["key"]
    out = project / "results/prune" / key
    assert artefact.is_valid(out, key)
    assert (out / "score.txt").read_text() == "41"
    code, errors = run(project, request)
    assert code == 0
    assert "is there already" in errors
    assert results(project) == [key]


@pytest.mark.parametrize(
    ("what", "code", "last"),
    [
        ("non-finite", 3, "error: prune: loss is NaN at step 3"),
        ("bug", 1, "error: prune: KeyError: 'bug'"),
        ("hidden", 1, "error: prune: prunelib.methods.hidden was loaded but is not in the finger"),
        ("edit", 1, "error: prune: planned key "),
        ("full", 1, "error: prune: no space left on device while writing "),
    ],
)
def test_a_script_that_fails_says_so_in_its_last_line(
    project: Path, what: str, code: int, last: str
) -> None:
    returned, errors = run(project, plan(project, what))
    assert returned == code, errors
    assert errors.strip().splitlines()[-1].startswith(last)
    assert ("Traceback" in errors) == (what == "bug")
    assert results(project) == []


def test_a_script_refuses_code_that_changed_since_the_plan(project: Path) -> None:
    request = plan(project, "work")
    score = project / "prunelib/methods/score.py"
    score.write_text("# a comment\ndef value():\n    '''Documented.'''\n    return 41\n")
    assert run(project, request)[0] == 0
    score.write_text("def value():\n    return 42\n")
    shutil.rmtree(project / "results")
    code, errors = run(project, request)
    assert code == 1
    assert "error: prune: planned key" in errors.splitlines()[-1]
    assert results(project) == []
    assert plan(project, "work") != request


def test_a_script_that_is_not_part_of_its_own_key_is_refused(project: Path) -> None:
    code, errors = run(project, plan(project, "work", entry=("prunelib.methods.score",)))
    assert code == 1
    assert "workflow_scripts/prune.py is not among" in errors.splitlines()[-1]


def test_a_script_with_a_bad_request_exits_with_two(project: Path) -> None:
    code, errors = run(project, "{}")
    assert code == 2
    assert errors.splitlines()[-1].startswith("error: prune: request: missing")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)],
)
def test_a_signal_ends_a_script_with_nothing_left(project: Path, number: int, code: int) -> None:
    process = start(project, plan(project, "wait"))
    assert process.stdout
    assert process.stdout.readline() == "waiting\n"
    assert len(results(project)) == 1
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert results(project) == []


def test_signals_that_were_ignored_stay_ignored(project: Path) -> None:
    request = plan(project, "wait")
    process = start(project, request, signal.SIG_IGN)
    assert process.stdout
    assert process.stdout.readline() == "waiting\n"
    for number in SIGNALS:
        process.send_signal(number)
    (project / "go").touch()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert results(project) == [json.loads(request)["key"]]


def test_a_killed_script_is_run_again_and_finishes(project: Path) -> None:
    request = plan(project, "wait")
    process = start(project, request)
    assert process.stdout
    assert process.stdout.readline() == "waiting\n"
    process.kill()
    process.communicate()
    key = json.loads(request)["key"]
    assert [name.startswith(f"{key}.tmp-") for name in results(project)] == [True]
    again = start(project, request)
    assert again.stdout
    assert again.stdout.readline() == "waiting\n"
    assert [name.endswith(f"-{again.pid}") for name in results(project)] == [True]
    (project / "go").touch()
    again.communicate(timeout=60)
    assert again.returncode == 0
    assert results(project) == [key]
    artefact.verify(project / "results/prune" / key)


# --- attempts ------------------------------------------------------------------------------------


def note(project: Path, request: str) -> Attempt | None:
    return read_attempt(project / json.loads(request)["out"])


def test_after_a_permanent_error_a_retry_ends_at_once_and_a_new_run_tries_again(
    project: Path,
) -> None:
    request = plan(project, "non-finite")
    assert run(project, request)[0] == 3
    first = note(project, request)
    assert first
    assert (first.permanent, first.exit_code, first.number) == (True, 3, 1)
    code, errors = run(project, request)
    assert code == 3
    assert errors.splitlines() == ["error: prune: loss is NaN at step 3 (not tried again)"]
    assert note(project, request) == first
    code, errors = run(project, request, "2")
    assert (code, "not tried again" in errors) == (3, False)
    again = note(project, request)
    assert again
    assert again.started > first.started


@pytest.mark.parametrize("what", ["bug", "full"])
def test_after_another_error_a_retry_tries_again(project: Path, what: str) -> None:
    request = plan(project, what)
    assert run(project, request)[0] == 1
    code, errors = run(project, request)
    assert (code, "not tried again" in errors) == (1, False)
    found = note(project, request)
    assert found
    assert (found.permanent, found.number) == (False, 2)
    assert [line.startswith("try 1 on ") for line in found.earlier] == [True]
    assert f"before: {found.earlier[0]}" in errors


def test_success_leaves_no_note(project: Path) -> None:
    request = plan(project, "work")
    assert run(project, request)[0] == 0
    assert note(project, request) is None
    assert not list((project / "results").rglob("*attempt*"))


def test_signals_and_kills_can_be_told_apart_afterwards(project: Path) -> None:
    request = plan(project, "wait")
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = start(project, request)
        assert process.stdout
        assert process.stdout.readline() == "waiting\n"
        running = note(project, request)
        assert running
        assert (running.pid, running.ended) == (process.pid, None)
        process.send_signal(number)
        process.communicate(timeout=60)
        found = note(project, request)
        assert found
        if number == signal.SIGTERM:
            assert (found.error, found.exit_code) == ("stopped by SIGTERM", 143)
        else:
            assert found == running


def test_a_second_process_waits_and_finds_the_artefact(project: Path) -> None:
    request = plan(project, "wait")
    first = start(project, request)
    assert first.stdout
    assert first.stdout.readline() == "waiting\n"
    second = start(project, request)
    assert second.stderr
    assert f"waiting for process {first.pid} on" in second.stderr.readline()
    assert len(results(project)) == 1
    (project / "go").touch()
    assert first.wait(timeout=60) == 0
    assert "is there already" in second.communicate(timeout=60)[1]
    assert second.returncode == 0
    assert results(project) == [json.loads(request)["key"]]


def test_a_process_of_another_host_is_alive_while_its_note_changes(tmp_path: Path) -> None:
    out = tmp_path / KEY
    begin(out, "prune", KEY).fail("", 1, permanent=False)
    mine = read_attempt(out)
    assert mine
    other = replace(mine, host="elsewhere", ended=None)
    looks = []

    def silence(seconds: float) -> None:
        looks.append(seconds)

    assert not is_alive(out, other, silence)
    assert sum(looks) == 60

    def sign(seconds: float) -> None:
        os.utime(attempt_path(out), (1, 1))

    assert is_alive(out, other, sign)
    assert not is_alive(out, replace(other, ended=1.0), sign)
