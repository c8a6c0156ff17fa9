"""Publishing and obtaining results: laboratories, remotes, faults, merges, the light form."""

from __future__ import annotations

import csv
import errno
import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from remotes import REMOTES, Remote, local_remote, ssh_remote
from tiny_project import (
    CATALOGUES,
    EXPERIMENT,
    ROOT,
    make_project,
    snakemake,
    snakemake_command,
)

from prunelib.errors import InputError, IntegrityError, PrunelibError
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import Node, needed
from prunelib.provenance import artefact
from prunelib.provenance.step import StepRequest, execute
from prunelib.sharing import obtain as obtaining
from prunelib.sharing import publish as publishing
from prunelib.sharing.repository import (
    HELD,
    IN_GIT,
    awaited,
    in_words,
    is_shared,
    pointer_of,
    readable,
    record_of,
    restore_deleted,
    set_merge_driver,
    sharing,
    steps_of,
    write_record,
)
from prunelib.sharing.store import read_pointer

# Without statistics, so that a row costs little; the variants differ in their names alone.
METHODS = {
    "random": {"method": "random"},
    "magnitude_l2": {"method": "magnitude", "parameters": {"order": 2}},
    "magnitude_l1": {"method": "magnitude", "parameters": {"order": 1}},
    "random_a": {"method": "random"},
    "random_b": {"method": "random"},
}
SMALL = EXPERIMENT | {
    "name": "small",
    "methods": ["random", "magnitude_l2"],
    "baseline": "magnitude_l2",
    "evaluation": "plain",
}
WEIGHTS, CONFIG = "model.safetensors", "sub/config.json"
SHARED_FILES = (".gitignore", ".gitattributes", ".dvcignore", "dvc.yaml")


# ------------------------------------------------------------------------------------ laboratories


def git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"git {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def dvc(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"dvc {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def introduce(directory: Path, name: str) -> None:
    git(directory, "config", "user.name", name)
    git(directory, "config", "user.email", f"{name}@example.org")


def make_lab(directory: Path) -> Path:
    """A clone of the project, as far as sharing goes: settings, configuration, one commit."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in SHARED_FILES:
        shutil.copy(ROOT / name, directory / name)
    (directory / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, directory / ".dvc" / name)
    git(directory, "init", "-q", "-b", "main")
    introduce(directory, "a")
    return directory


def make_small_lab(directory: Path) -> Path:
    make_lab(directory)
    make_project(directory, SMALL)
    plain = {k: v for k, v in CATALOGUES["evaluation"]["small"].items() if k == "perplexity"}
    for name, content in (("methods", METHODS), ("evaluation", {"plain": plain})):
        (directory / "catalogue" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    git(directory, "add", "-A")
    git(directory, "commit", "-q", "-m", "Begin")
    return directory


def add_remote(directory: Path, remote: Remote) -> None:
    """The URL is everybody's; credentials stay in the clone."""
    dvc(directory, "remote", "add", "--default", "lab", remote.url)
    git(directory, "commit", "-q", "-am", "Name the remote")
    sign_in(directory, remote)


def sign_in(directory: Path, remote: Remote) -> None:
    if remote.settings:
        lines = [f"    {name} = {value}\n" for name, value in remote.settings.items()]
        text = "['remote \"lab\"']\n" + "".join(lines)
        (directory / ".dvc" / "config.local").write_text(text)


def clone(source: Path, directory: Path, remote: Remote | None = None) -> Path:
    git(source.parent, "clone", "-q", str(source), str(directory))
    introduce(directory, "b")
    if remote:
        sign_in(directory, remote)
    return directory


@cache
def script(name: str) -> ModuleType:
    path = ROOT / "workflow_scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(directory: Path, name: str, *options: str, experiment: str = "experiment.yaml") -> Any:
    """Run publish or obtain as its script does; returns exit code, output and errors."""
    out, errors = io.StringIO(), io.StringIO()
    arguments = ["--experiment", experiment, "--catalogue", "catalogue", *options]
    with chdir(directory), redirect_stdout(out), redirect_stderr(errors):
        code = script(name).main(arguments)
    return code, out.getvalue(), errors.getvalue()


def publish(directory: Path, *options: str, experiment: str = "experiment.yaml") -> str:
    code, out, errors = call(directory, "publish", *options, experiment=experiment)
    assert code == 0, out + errors
    return out


def obtain(directory: Path, *options: str, experiment: str = "experiment.yaml") -> str:
    code, out, errors = call(directory, "obtain", *options, experiment=experiment)
    assert code == 0, out + errors
    return out


def command(name: str, *options: str) -> list[str]:
    path = ROOT / "workflow_scripts" / f"{name}.py"
    arguments = ["--experiment", "experiment.yaml", "--catalogue", "catalogue", *options]
    return [sys.executable, "-P", str(path), *arguments]


def load(name: str = "experiment.yaml") -> Experiment:
    return Experiment.load(Path(name), Path("catalogue"))


def compute(directory: Path, experiment: str = "experiment.yaml") -> None:
    """Run the missing steps in this process: the same code, without a start of Python for each."""

    def run(node: Node) -> None:
        for upstream in node.inputs.values():
            if not artefact.is_valid(upstream.directory, upstream.key):
                run(upstream)
        name = {"scores": "score"}.get(node.step, node.step)
        execute(StepRequest.from_json(node.request()), script(name).main)

    with chdir(directory):
        for node in needed(steps_of(load(experiment))).values():
            if not artefact.is_valid(node.directory, node.key):
                run(node)


def with_methods(directory: Path, *methods: str, name: str = "experiment") -> str:
    content = SMALL | {"name": name, "methods": [*SMALL["methods"], *methods]}
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return f"{name}.yaml"


def held(directory: Path, experiment: str = "experiment.yaml") -> list[Path]:
    with chdir(directory):
        return [node.directory for node in steps_of(load(experiment)) if node.step in HELD]


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def table(directory: Path) -> dict[str, str]:
    with (directory / "results" / "benchmark.csv").open(encoding="utf-8") as file:
        return {row["cell"]: row["perplexity"] for row in csv.DictReader(file)}


def has_nothing_to_do(directory: Path, experiment: str = "experiment.yaml") -> bool:
    asked = [part.replace("=experiment.yaml", f"={experiment}") for part in snakemake_command("-n")]
    run = subprocess.run(asked, cwd=directory, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return "Nothing to be done" in run.stdout + run.stderr


def leftovers(directory: Path) -> list[str]:
    names = (path.name for path in (directory / "results").rglob("*"))
    return [name for name in names if ".tmp-" in name or ".old-" in name]


# ----------------------------------------------------------------------------- made-up artefacts


class MadeUp:
    """A laboratory whose artefacts hold a few bytes: enough for all but the report."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        make_lab(directory)
        model = Node("fetch_model", ("tiny",), {"name": "tiny"}, {})
        prune = [Node("prune", ("tiny", m), {"m": m}, {"model": model}) for m in ("x", "y", "z")]
        recover = Node("recover", ("tiny", "x", "lora"), {"r": 1}, {"checkpoint": prune[0]})
        self.nodes = [
            *prune[:2],
            recover,
            Node("perplexity", ("tiny", "x", "none"), {"w": 1}, {"checkpoint": prune[0]}),
            Node("perplexity", ("tiny", "x", "lora"), {"w": 1},
                 {"checkpoint": prune[0], "adapter": recover}),
            Node("perplexity", ("tiny", "y", "none"), {"w": 1}, {"checkpoint": prune[1]}),
            prune[2],
        ]  # fmt: skip
        (directory / "README").write_text("made up\n")
        git(directory, "add", "-A")
        git(directory, "commit", "-q", "-m", "Begin")

    def finish(self, nodes: list[Node] | None = None) -> None:
        for node in self.nodes if nodes is None else nodes:
            fill(self.directory, node)

    def publish(self, **options: Any) -> list[str]:
        lines: list[str] = []
        given = {"remote": None, "push": True, "light": False, "read_back": False} | options
        with chdir(self.directory), sharing():
            publishing.publish("made-up", self.nodes, say=lines.append, **given)
        return lines


def fill(directory: Path, node: Node) -> None:
    files = {
        "prune": ("plan.json", WEIGHTS, CONFIG),
        "recover": ("meta.json", "loss.jsonl", "adapter_model.safetensors"),
        "fetch_model": ("config.json",),
    }.get(node.step, ("metrics.json",))

    def write(out: Path) -> None:
        for name in files:
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text(f"{node.key} {name}\n" * 50)

    upstream = {name: one.key for name, one in node.inputs.items()}
    with chdir(directory):
        artefact.commit(
            node.directory, write, {"step": node.step, "key": node.key, "upstream": upstream}
        )


@pytest.fixture
def lab(tmp_path: Path) -> MadeUp:
    return MadeUp(tmp_path / "lab")


def run_obtain(directory: Path, nodes: list[Node], *, everything: bool) -> tuple[int, list[str]]:
    lines: list[str] = []

    def make(node: Node) -> None:
        fill(Path.cwd(), node)

    with chdir(directory), sharing():
        wanted = obtaining.survey(nodes, everything=everything)
        failed = obtaining.obtain(wanted, remote=None, make=make, say=lines.append)
    return failed, lines


# ------------------------------------------------------------------------- what is where (short)


def test_git_holds_what_is_shared_and_nothing_else(lab: MadeUp) -> None:
    lab.finish()
    directory = lab.directory
    prune, recover, metrics = (lab.nodes[i].directory for i in (0, 2, 3))
    with chdir(directory):
        write_record(lab.nodes[0])
        write_record(lab.nodes[2])
    others = [
        "results/summary.json",
        "results/benchmark.csv",
        "results/plots/size.png",
        f"{prune}.dvc",
        f"{prune}.tmp-host-1/provenance.json",
        f"{prune}.attempt.json",
        f"{recover}.state/step.json",
        f"{metrics}.attempt.json",
        f"{metrics}.tmp-host-1/metrics.json",
        f"{metrics}.old-host-1/metrics.json",
        "results/report.html",
        "results/.report-0123456789abcdef",
        "results/.launch.lock",
        "results/.broken/0123456789abcdef-1",
        "results/scores/tiny/0123456789abcdef/provenance.json",
        "results/statistics/tiny/0123456789abcdef/provenance.json",
        "results/fetch_model/tiny/0123456789abcdef/provenance.json",
        "logs/prune/x.log",
        ".dvc/cache/files/md5/00/1",
        ".dvc/config.local",
    ]
    for name in others:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("x")
    git(directory, "add", "-A")
    tracked = git(directory, "diff", "--cached", "--name-only").split()
    assert set(tracked) == {
        *others[:4],
        *(f"{prune}.record/{name}" for name in ("plan.json", "provenance.json")),
        *(f"{recover}.record/{name}" for name in ("loss.jsonl", "meta.json", "provenance.json")),
        *(
            f"{node.directory}/{name}"
            for node in lab.nodes
            if node.step in IN_GIT
            for name in ("metrics.json", "provenance.json")
        ),
    }


def test_the_search_for_what_is_missing(lab: MadeUp) -> None:
    prune, other, recover, plain, adapted, lonely, _ = lab.nodes
    model = prune.inputs["model"]

    nodes = lab.nodes[:6]

    def keys(nodes: Any) -> set[str]:
        return {node.key for node in nodes}

    lab.finish([prune, recover, plain, adapted])
    with chdir(lab.directory):
        for node in (prune, recover):
            write_record(node)
            shutil.rmtree(node.directory)
        assert [readable(node.directory) for node in (prune, plain)] == [
            record_of(prune.directory),
            plain.directory,
        ]
        # A record alone is a plan; an adapter needs its pointer.
        assert is_shared(prune)
        assert not is_shared(recover)
        pointer_of(recover.directory).write_text("")
        assert is_shared(recover)
        assert keys(awaited(nodes)) == keys([plain, adapted, other, lonely])
        # Nothing waits for what is shared; what nobody has is computed, with all it needs.
        wanted = obtaining.survey(nodes, everything=False)
        assert keys(wanted.here) == keys([prune, recover, plain, adapted])
        assert keys(wanted.compute) == keys([other, lonely, model])
        assert [*wanted.pull, *wanted.rebuild, *wanted.models] == []
        everything = obtaining.survey(nodes, everything=True)
        assert keys(everything.pull) == keys([recover])
        assert keys(everything.rebuild) == keys([prune])
        assert keys(everything.models) == keys([model])
        # A metric that is gone waits for its checkpoint and its adapter.
        shutil.rmtree(adapted.directory)
        wanted = obtaining.survey(nodes, everything=False)
        assert keys(wanted.pull) == keys([recover])
        assert keys(wanted.rebuild) == keys([prune])
        assert adapted.key in keys(wanted.compute)
        # A record of another key, or a damaged one, is none.
        (record_of(prune.directory) / "provenance.json").write_text("{}")
        assert not is_shared(prune)


def test_what_was_made_elsewhere_takes_its_place_whole_or_not_at_all(lab: MadeUp) -> None:
    node = lab.nodes[3]
    lab.finish([node])
    source = lab.directory / node.directory
    out = lab.directory / "results" / "elsewhere" / node.key

    def copy(into: Path) -> None:
        shutil.copytree(source, into, dirs_exist_ok=True)

    def half(into: Path) -> None:
        shutil.copy(source / "provenance.json", into)

    def disk_full(into: Path) -> None:
        (into / "metrics.json").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def compiled_disk_full(into: Path) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    for write, message in (
        (half, "not a whole artefact"),
        (disk_full, "no space left on device .* free"),
        (compiled_disk_full, "no space left on device .* free"),
    ):
        with pytest.raises(PrunelibError, match=message):
            artefact.adopt(out, node.key, write)
        assert list(out.parent.iterdir()) == []
    with pytest.raises(IntegrityError, match="0000000000000000"):
        artefact.adopt(out, "0000000000000000", copy)
    # What is in the way and no artefact gives way; a valid one stays.
    out.mkdir()
    (out / "provenance.json").write_text("{}")
    assert artefact.adopt(out, node.key, copy)
    assert contents(out) == contents(source)
    assert not artefact.adopt(out, node.key, copy)
    assert [path.name for path in out.parent.iterdir()] == [node.key]


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    obtaining.check_room({tmp_path / "a" / "b": 1000})
    with pytest.raises(PrunelibError, match=r"no space left on device: .* free, .* are needed"):
        obtaining.check_room({tmp_path / "a": free // 2, tmp_path / "b" / "c": free // 2})


def test_sizes_in_words() -> None:
    assert [in_words(n) for n in (0, 999, 1000, 2_500_000, 3 * 10**12)] == [
        "0 B", "999 B", "1.0 kB", "2.5 MB", "3.0 TB",
    ]  # fmt: skip


def test_results_of_two_branches_never_conflict(lab: MadeUp) -> None:
    """Different keys, the same key made twice, and a report on each side."""
    directory = lab.directory
    only_a, only_b, both = lab.nodes[3], lab.nodes[4], lab.nodes[5]
    with chdir(directory):
        set_merge_driver()
    report = {
        name: directory / "results" / name
        for name in ("summary.json", "benchmark.csv", "plots/size.png")
    }
    for branch, own in (("a", only_a), ("b", only_b)):
        git(directory, "checkout", "-q", "-b", branch, "main")
        lab.finish([own, both])
        record = directory / both.directory / "provenance.json"
        record.write_text(
            record.read_text().replace('"schema"', f'"made_by": "{branch}", "schema"')
        )
        for path in report.values():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"report of {branch}\n".encode() * 3)
        git(directory, "add", "-A")
        git(directory, "commit", "-q", "-m", branch)
    git(directory, "checkout", "-q", "a")
    git(directory, "merge", "-q", "--no-edit", "b")
    assert git(directory, "status", "--porcelain") == ""
    assert "report of a" in report["summary.json"].read_text()
    for node in (only_a, only_b, both):
        artefact.verify(directory / node.directory)
    assert json.loads(record.read_text())["made_by"] == "a"
    # Where the driver is not set up, git says so and changes nothing silently.
    git(directory, "reset", "-q", "--hard", "HEAD~1")
    git(directory, "config", "--unset", "merge.results.driver")
    merge = subprocess.run(["git", "merge", "b"], cwd=directory, capture_output=True, check=False)
    assert merge.returncode != 0


# ------------------------------------------------------------------------- refusals (short)


def test_what_cannot_be_published_is_refused_early(lab: MadeUp, tmp_path: Path) -> None:
    directory = lab.directory
    with pytest.raises(InputError, match="nothing to publish here: 7 steps are not finished"):
        lab.publish()
    lab.finish()
    with pytest.raises(InputError, match=r"no default remote.*dvc remote add"):
        lab.publish()
    with pytest.raises(InputError, match=r"no remote 'lab'; allowed: none yet"):
        lab.publish(remote="lab")
    (directory / "README").write_text("changed\n")
    git(directory, "add", "README")
    with pytest.raises(InputError, match=r"README is staged for another commit"):
        lab.publish(push=False)
    git(directory, "restore", "--staged", "README")
    (directory / ".git" / "MERGE_HEAD").write_text(git(directory, "rev-parse", "HEAD"))
    with pytest.raises(InputError, match="a git merge is under way"):
        lab.publish(push=False)
    (directory / ".git" / "MERGE_HEAD").unlink()
    weights = directory / lab.nodes[1].directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model.safetensors: sha256 .*nothing was published"):
        lab.publish(push=False)
    # Nothing was left behind by any of these.
    assert git(directory, "log", "--oneline").count("\n") == 1
    assert not list(directory.glob("results/**/*.dvc"))
    with chdir(tmp_path), pytest.raises(InputError, match="not the root of a git repository"):
        sharing().__enter__()
    (tmp_path / "bare").mkdir()
    git(tmp_path / "bare", "init", "-q")
    with chdir(tmp_path / "bare"), pytest.raises(InputError, match=r"\.dvc: missing; `dvc init`"):
        sharing().__enter__()


def test_a_second_publish_is_refused_by_name(lab: MadeUp) -> None:
    with (
        chdir(lab.directory),
        sharing(),
        pytest.raises(InputError, match=f"held by process {os.getpid()}"),
    ):
        sharing().__enter__()


def test_what_a_killed_commit_left_is_no_obstacle(lab: MadeUp) -> None:
    lab.finish()
    dot_git = lab.directory / ".git"
    (dot_git / "index.lock").touch()
    # It may be anybody's ...
    with pytest.raises(PrunelibError, match=r"git .*index\.lock"):
        lab.publish(push=False)
    # ... unless a publish was killed, and no git works here.
    (dot_git / "prunelib-commit").touch()
    assert "committed 19 files" in lab.publish(push=False)[-1]
    assert git(lab.directory, "status", "--porcelain") == ""
    assert not (dot_git / "prunelib-commit").exists()


def test_published_and_obtained(lab: MadeUp, tmp_path: Path) -> None:
    """Made-up artefacts through a directory: what git holds, twice, sizes, a clone, a kill."""
    directory, (prune, *_) = lab.directory, lab.nodes
    with local_remote(tmp_path) as remote:
        add_remote(directory, remote)
        lab.finish()
        # Half a pointer of a publish that was killed.
        (directory / pointer_of(prune.directory)).write_text("outs:\n- md5: 12")
        lines = lab.publish()
        said = "\n".join(lines)
        assert "3 metrics, 4 directories for DVC, 0 plans; not finished: 0" in said
        # 50 lines of a key of 16 digits, a blank and the name of the file.
        plan, weights, config = (50 * (18 + len(n)) for n in ("plan.json", WEIGHTS, CONFIG))
        full, light = 3 * (plan + weights + config) / 1000, 3 * plan / 1000
        assert f"3 checkpoints: {full:.1f} kB in full, {light:.1f} kB as plans (--light)" in said
        assert "20 objects, all there" in said
        assert git(directory, "log", "-1", "--format=%s").strip() == (
            "Publish made-up: 3 checkpoints, 1 adapter, 3 metrics"
        )
        assert git(directory, "status", "--porcelain") == ""
        # Everything that git names is on the remote, and its objects are verified when pulled.
        assert "verify = true" in (directory / ".dvc" / "config.local").read_text()
        before = git(directory, "rev-parse", "HEAD")
        assert "git has all of it" in lab.publish()[-1]
        assert git(directory, "rev-parse", "HEAD") == before
        there = clone(directory, tmp_path / "b")
        failed, lines = run_obtain(there, lab.nodes, everything=True)
        assert not failed
        assert len([line for line in lines if line.startswith("got")]) == 4
        for node in lab.nodes:
            assert contents(there / node.directory) == contents(directory / node.directory)
        assert git(there, "status", "--porcelain") == ""
        assert "verify = true" in (there / ".dvc" / "config.local").read_text()
        assert run_obtain(there, lab.nodes, everything=True) == (0, [])
        # What git holds comes back when it was deleted.
        shutil.rmtree(there / "results")
        with chdir(there):
            assert restore_deleted() == 19
        assert git(there, "status", "--porcelain") == ""
        # DVC would write one for each directory, and they conflict in merges.
        assert not list(tmp_path.glob("*/results/**/.gitignore"))


# ------------------------------------------------------------------- laboratories that work (long)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A laboratory whose experiment has run; no remote yet."""
    directory = make_small_lab(tmp_path_factory.mktemp("finished") / "a")
    compute(directory)
    return directory


def copy_of(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target, symlinks=True)
    return target


@pytest.fixture(params=list(REMOTES))
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Remote]:
    with REMOTES[request.param](tmp_path) as running:
        yield running


@pytest.mark.long
def test_two_laboratories(
    finished: Path, remote: Remote, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A publishes, B obtains and adds a method, A obtains it; both add one and A merges."""
    a = copy_of(finished, tmp_path / "a")
    hub = tmp_path / "hub.git"
    git(tmp_path, "init", "-q", "--bare", "-b", "main", str(hub))
    add_remote(a, remote)
    whole = "local" in request.node.name
    assert "committed" in publish(a)
    git(a, "push", "-q", "-u", str(hub), "main")
    git(a, "remote", "add", "origin", str(hub))

    b = clone(hub, tmp_path / "b", remote)
    # Git has brought the metrics, and the checkpoints have not come.
    assert not any((b / path).exists() for path in held(b))
    said = obtain(b, "--all")
    assert "to compute: 0 steps" in said
    for path in held(b):
        assert contents(b / path) == contents(a / path), path
        artefact.verify(b / path)
    assert table(b) == table(a)
    assert (b / "results/summary.json").read_bytes() == (a / "results/summary.json").read_bytes()
    assert git(b, "status", "--porcelain") == ""
    assert has_nothing_to_do(b)

    rows_before = len(table(a))

    # B adds a method.
    with_methods(b, "magnitude_l1")
    said = obtain(b, "--dry-run", "--all")
    assert "to compute: 7 steps" in said
    assert "prune of tiny/magnitude_l1" in said
    assert "GPU-hours" in said
    known = {path: (b / path / "provenance.json").read_bytes() for path in held(a)}
    if whole:
        # The new steps and the sources that they need; nothing that is finished is done again.
        run = snakemake(b, "-n", "-q", "rules")
        assert ["total", "9"] in [line.split() for line in run.stdout.splitlines()], run.stdout
    compute(b)
    git(b, "commit", "-q", "-am", "Another method")
    said = publish(b)
    assert "1 checkpoint, 1 adapter, 2 metrics" in said
    assert {path: (b / path / "provenance.json").read_bytes() for path in held(a)} == known
    git(b, "push", "-q", "origin", "HEAD:main")

    git(a, "pull", "-q", "--ff-only", "origin", "main")
    said = obtain(a, "--all")
    assert said.count("\ngot ") == 2
    assert table(a) == table(b)
    assert len(table(a)) == rows_before + 2

    # Both add a method in an experiment of their own, neither knows of the other.
    for directory, name in ((a, "a"), (b, "b")):
        experiment = with_methods(directory, f"random_{name}", name=name)
        compute(directory, experiment)
        git(directory, "add", experiment)
        git(directory, "commit", "-q", "-m", f"Plan {name}")
        publish(directory, experiment=experiment)
    git(b, "push", "-q", "origin", "HEAD:theirs")
    git(a, "fetch", "-q", "origin", "theirs")
    git(a, "merge", "-q", "--no-edit", "FETCH_HEAD")
    assert git(a, "status", "--porcelain") == ""
    joint = with_methods(a, "random_a", "random_b", name="joint")
    assert "to compute: 0 steps" in obtain(a, "--all", experiment=joint)
    assert not whole or has_nothing_to_do(a, joint)
    rows = table(a)
    for theirs in (table(b), rows):
        assert all(rows[name] == value for name, value in theirs.items())
    assert {"random_a", "random_b"} <= {name.split("/")[1] for name in rows}
    assert not leftovers(a)
    assert not leftovers(b)


@pytest.mark.long
def test_damage_on_a_remote_is_named_and_mended(
    lab: MadeUp, remote: Remote, tmp_path: Path
) -> None:
    """A flipped byte, a short object, a missing one: three artefacts are refused, one comes."""
    flipped, short, missing, *_, good = lab.nodes
    add_remote(lab.directory, remote)
    lab.finish()
    lab.publish()

    def stored(node: Node, name: str) -> str:
        return remote.object(md5((lab.directory / node.directory / name).read_bytes()))

    content = bytearray(remote.read(stored(flipped, WEIGHTS)))
    content[100] ^= 1
    remote.write(stored(flipped, WEIGHTS), bytes(content))
    remote.write(stored(short, WEIGHTS), remote.read(stored(short, WEIGHTS))[:-7])
    remote.delete(stored(missing, "adapter_model.safetensors"))

    there = clone(lab.directory, tmp_path / "b", remote)
    held = [flipped, short, missing, good]

    def attempt() -> tuple[int, dict[Path, str]]:
        failed, lines = run_obtain(there, held, everything=True)
        errors = (line.split(maxsplit=2) for line in lines if line.startswith("error"))
        assert not leftovers(there)
        return failed, {Path(place.rstrip(":")): words for _, place, words in errors}

    for _ in range(2):  # The second try finds the same, whatever the first left in the cache.
        failed, errors = attempt()
        assert failed == 3
        assert f"{WEIGHTS} is damaged on remote lab" in errors[flipped.directory]
        assert f"{WEIGHTS} is damaged on remote lab" in errors[short.directory]
        assert "adapter_model.safetensors is missing on remote lab" in errors[missing.directory]
        assert not any((there / node.directory).exists() for node in held[:3])
        artefact.verify(there / good.directory)

    # Who has the artefacts publishes again: sizes are looked at always, contents on request.
    mended = [line for line in lab.publish() if line.startswith("mended")]
    assert len(mended) == 2
    assert attempt()[0] == 1
    # Not that of the flipped one: DVC sends all files of a directory whose listing is gone.
    oid = read_pointer(lab.directory / pointer_of(good.directory))
    listing = next(name for name in remote.names() if name.endswith(oid[2:]))
    remote.delete(listing)
    mended = [line for line in lab.publish(read_back=True) if line.startswith("mended")]
    # DVC's own push has sent the listing.
    assert [line.split()[1] for line in mended] == [f"{flipped.directory}/{WEIGHTS}:"]
    assert remote.object(Path(listing).parent.name + Path(listing).name) == listing
    assert attempt() == (0, {})
    for node in held:
        assert contents(there / node.directory) == contents(lab.directory / node.directory)


@pytest.mark.long
def test_a_remote_that_does_not_answer(lab: MadeUp, tmp_path: Path) -> None:
    lab.finish()
    with ssh_remote(tmp_path) as remote:
        add_remote(lab.directory, remote)
        lab.publish()
        there = clone(lab.directory, tmp_path / "b", remote)
    with pytest.raises(PrunelibError, match=r"^remote lab does not answer: .*127\.0\.0\.1"):
        run_obtain(there, lab.nodes, everything=True)
    assert not leftovers(there)
    fill(lab.directory, node := Node("prune", ("tiny", "w"), {}, {}))
    lab.nodes.append(node)
    with pytest.raises(PrunelibError, match=r"^dvc push failed: .*127\.0\.0\.1"):
        lab.publish()
    assert git(lab.directory, "log", "--oneline").count("\n") == 3


@pytest.mark.long
def test_damage_in_the_cache_is_found_and_forgotten(lab: MadeUp, tmp_path: Path) -> None:
    node = lab.nodes[0]
    with local_remote(tmp_path) as remote:
        add_remote(lab.directory, remote)
        lab.finish()
        lab.publish()
        there = clone(lab.directory, tmp_path / "b")
        assert run_obtain(there, [node], everything=True)[0] == 0
        shutil.rmtree(there / node.directory)
        digest = md5((lab.directory / node.directory / WEIGHTS).read_bytes())
        cached = there / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]
        cached.chmod(0o644)
        cached.write_bytes(cached.read_bytes()[:-1] + b"x")
        failed, lines = run_obtain(there, [node], everything=True)
        assert failed == 1
        assert f"{WEIGHTS}: sha256 is" in lines[-1]
        assert "removed from DVC's cache, run again" in lines[-1]
        assert not (there / node.directory).exists()
        assert run_obtain(there, [node], everything=True)[0] == 0
        artefact.verify(there / node.directory)


@pytest.mark.long
def test_the_same_key_made_twice_stays_that_of_who_came_first(lab: MadeUp, tmp_path: Path) -> None:
    """Two laboratories computed the same cells before either published."""
    a = lab.directory
    with local_remote(tmp_path) as remote:
        add_remote(a, remote)
        b = clone(a, tmp_path / "b")
        other = MadeUp.__new__(MadeUp)
        other.directory, other.nodes = b, lab.nodes
        lab.finish()
        time.sleep(1.1)  # Records name the second.
        other.finish()
        lab.publish()
        other.publish()
        git(b, "pull", "-q", "--no-rebase", "--no-edit", "origin", "main")
        assert git(b, "status", "--porcelain") == ""
        assert "git has all of it" in other.publish()[-1]
        git(a, "pull", "-q", "--ff-only", str(b), "main")
        # A's directories stay, and so does what git says, which is B's now.
        lines = lab.publish()
        assert len([line for line in lines if line.startswith("kept")]) == 4
        assert "git has all of it" in lines[-1]
        c = clone(a, tmp_path / "c")
        assert run_obtain(c, lab.nodes, everything=True)[0] == 0
        for node in lab.nodes:
            assert contents(c / node.directory) == contents(b / node.directory)


@contextmanager
def small_disk(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here: the full disk was not tried")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=False)


@pytest.mark.long
def test_no_space_on_the_device(lab: MadeUp, tmp_path: Path) -> None:
    with (
        local_remote(tmp_path) as remote,
        small_disk(tmp_path / "disk", "size=64m,nr_inodes=2000") as disk,
    ):
        add_remote(lab.directory, remote)
        lab.finish()
        lab.publish()
        there = clone(lab.directory, disk / "b")
        filler = disk / "filler"
        filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - 8 * 2**20))
        with pytest.raises(PrunelibError, match=r"no space left on device: .* are needed"):
            run_obtain(there, lab.nodes, everything=True)
        filler.unlink()
        # Enough bytes, too few inodes: the disk fills up in the middle.
        filler.mkdir()
        held = [node for node in lab.nodes if node.step in HELD]
        seen = set()
        for left in (30, 45, 60, 75):
            for file in filler.iterdir():
                file.unlink()
            for number in range(os.statvfs(disk).f_ffree - left):
                (filler / str(number)).touch()
            try:
                failed, lines = run_obtain(there, lab.nodes, everything=True)
                said = "\n".join(lines)
            except (PrunelibError, OSError) as error:
                failed, said = 1, str(error)
            if failed:
                assert "No space left on device" in said or "no space left" in said, said
            for node in held:
                if artefact.is_valid(there / node.directory):
                    artefact.verify(there / node.directory)
                else:
                    assert not (there / node.directory).exists()
            assert not leftovers(there)
            seen.add(bool(failed))
        assert True in seen, "the disk was never full"
        shutil.rmtree(filler)
        assert run_obtain(there, lab.nodes, everything=True)[0] == 0
        for node in held:
            artefact.verify(there / node.directory)


@pytest.fixture
def published(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A laboratory whose experiment has run, with a directory for a remote; not published yet."""
    a = copy_of(finished, tmp_path / "a")
    with local_remote(tmp_path) as remote:
        add_remote(a, remote)
        yield a


@pytest.mark.long
def test_two_publishes_at_once_and_kills(published: Path, tmp_path: Path) -> None:
    """kill -9 at every stage of a publish; what git names is always on the remote."""
    a, remote = published, tmp_path / "remote"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command("publish"),
            cwd=a,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait(run: subprocess.Popen[str], happened: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 120
        while not happened():
            assert run.poll() is None, run.stdout and run.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.001)

    stages: list[Callable[[], Any]] = [
        (a / "results" / ".sharing.lock").exists,
        lambda: list(a.glob("results/prune/**/*.dvc")),
        lambda: list(a.glob("results/recover/**/*.record/*")),
        lambda: list(remote.rglob("files/md5/*/*")),
        (a / ".git" / "prunelib-commit").exists,
    ]
    before = git(a, "rev-parse", "HEAD")
    for happened in stages:
        run = start()
        wait(run, happened)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        named = git(a, "ls-tree", "-r", "--name-only", "HEAD").split()
        if git(a, "rev-parse", "HEAD") == before:
            assert not any(name.endswith(".dvc") for name in named)
        for path in held(a):
            assert artefact.is_valid(a / path)
    first = start()
    lock = a / "results" / ".sharing.lock"
    # The lock of the one that was killed may still be there.
    wait(first, lambda: lock.exists() and f'"pid": {first.pid},' in lock.read_text())
    second = subprocess.run(command("publish"), cwd=a, capture_output=True, text=True, check=False)
    assert second.returncode == InputError.exit_code
    assert f"held by process {first.pid}" in second.stderr
    said, _ = first.communicate()
    assert first.returncode == 0, said
    assert git(a, "status", "--porcelain") == ""
    b = clone(a, tmp_path / "b")
    obtain(b, "--all")
    for path in held(a):
        assert contents(b / path) == contents(a / path)


@pytest.mark.long
def test_checkpoints_as_plans(published: Path, tmp_path: Path) -> None:
    a = published
    code, said, _ = call(a, "publish", "--dry-run", "--light")
    assert code == 0
    assert "3 checkpoints: " in said
    assert " as plans (--light); 3 adapters: " in said
    assert not list(a.glob("results/**/*.record"))
    said = publish(a, "--light")
    assert "3 adapters, 7 metrics" in said
    plans = [path for path in held(a) if "prune" in path.parts]
    adapters = [path for path in held(a) if "recover" in path.parts]
    assert all((a / pointer_of(path)).is_file() for path in adapters)
    assert not any((a / pointer_of(path)).exists() for path in plans)

    # By default nothing is pulled: the report needs plans and metrics, and the workflow no more.
    b = clone(a, tmp_path / "b")
    said = obtain(b)
    assert "to get: 0 by DVC (0 B), 0 from plans; to compute: 0 steps" in said
    assert not any((b / path).exists() for path in held(a))
    assert table(b) == table(a)
    assert has_nothing_to_do(b)

    # A plan that was changed is not what its provenance says; the others come, bit by bit.
    plan = b / record_of(plans[0]) / "plan.json"
    content = plan.read_text()
    plan.write_text(content.replace('"removed_blocks"', '"removed_blockz"'))
    code, said, errors = call(b, "obtain", "--all")
    assert code == IntegrityError.exit_code
    assert "plan.json: sha256 is" in said
    assert "1 artefacts could not be obtained" in errors, said + errors
    assert not (b / plans[0]).exists()
    for path in (*plans[1:], *adapters):
        assert contents(b / path) == contents(a / path)
    plan.write_text(content)
    said = obtain(b, "--all")
    assert said.count("rebuilt") == 1
    assert contents(b / plans[0]) == contents(a / plans[0])
    assert git(b, "status", "--porcelain") == ""

    # The whole form can follow.
    said = publish(a)
    assert "3 checkpoints, 0 adapters, 0 metrics" in said
    c = clone(a, tmp_path / "c")
    said = obtain(c, "--all")
    assert said.count("got ") == 6
    assert contents(c / plans[0]) == contents(a / plans[0])


@pytest.mark.long
def test_another_repository_takes_one_checkpoint(published: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    a = published
    publish(a)
    # The other experiment's numbers are another commit's.
    shown = json.loads(dvc(a, "metrics", "show", "--json"))
    assert "tiny" in json.dumps(shown)
    summary = a / "results" / "summary.json"
    text = summary.read_text()
    value = next(v for v in numbers(json.loads(text)) if f": {v}" in text)
    summary.write_text(text.replace(f": {value}", f": {value + 1}", 1))
    assert '"diff": 1.0' in dvc(a, "metrics", "diff", "--json", "HEAD")
    git(a, "restore", "results/summary.json")
    page = dvc(a, "plots", "show", "-o", str(tmp_path / "plots"))
    assert "index.html" in page
    path = next(path for path in held(a) if "parameters-0" in path.parts)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    git(elsewhere, "init", "-q")
    dvc(elsewhere, "init", "-q")
    dvc(elsewhere, "import", str(a), str(path), "-o", "checkpoint")
    dvc(elsewhere, "get", str(a), str(path), "-o", "once")
    # A name that stays: dvc.yaml and an annotated tag.
    with (a / "dvc.yaml").open("a") as file:
        file.write(f"artifacts:\n  small-chat:\n    path: {path}\n    type: model\n")
    git(a, "commit", "-q", "-am", "Name a checkpoint")
    git(a, "tag", "-a", "small-chat@v1.0.0", "-m", "first")
    dvc(elsewhere, "artifacts", "get", str(a), "small-chat", "-o", "named")
    artefact.verify(elsewhere / "named")
    models = [
        AutoModelForCausalLM.from_pretrained(place)
        for place in (a / path, elsewhere / "checkpoint", elsewhere / "once")
    ]
    window = torch.arange(16)[None]
    with torch.no_grad():
        logits = [model(window).logits for model in models]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    from dvc.api import read

    record = json.loads(read(str(path / "provenance.json"), repo=str(a)))
    assert record["key"] == path.name
    artefact.verify(elsewhere / "checkpoint")


def numbers(tree: Any) -> Iterator[float]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from numbers(value)
    elif isinstance(tree, float):
        yield tree


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
