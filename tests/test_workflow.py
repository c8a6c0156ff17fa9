"""The workflow itself, through Snakemake, on a tiny model: rerun, faults, kills, new methods."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_model, tiny_tokenizer
from tiny_project import (
    CATALOGUES,
    EXPERIMENT,
    ROOT,
    make_project,
    snakemake,
    snakemake_command,
    start,
    write_experiment,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose whole experiment has run once."""
    directory = tmp_path_factory.mktemp("workflow")
    make_project(directory)
    run = snakemake(directory)
    assert run.returncode == 0, run.stderr[-3000:]
    return directory


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project, file times kept."""
    shutil.copytree(finished, tmp_path / "project", dirs_exist_ok=True)
    return tmp_path / "project"


def records(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        str(path.relative_to(directory)): json.loads(path.read_text())
        for path in sorted((directory / "results").glob("*/**/provenance.json"))
    }


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "results" / "benchmark.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def artefact(directory: Path, step: str, label: str) -> Path:
    (found,) = (
        path.parent
        for path in (directory / "results" / step).glob("**/provenance.json")
        if label in str(path.relative_to(directory))
    )
    return found


def temporary_directories(directory: Path) -> list[Path]:
    # os.walk, since directories come and go while a run works; a glob would raise.
    return [
        Path(parent) / name
        for parent, names, _ in os.walk(directory / "results")
        for name in names
        if ".tmp-" in name
    ]


def test_the_whole_experiment(finished: Path) -> None:
    table = rows(finished)
    assert len(table) == 1 + 1 + 1 + 2 * 2
    assert all(float(row["perplexity"]) > 1 for row in table)
    page = (finished / "results" / "report.html").read_text(encoding="utf-8")
    assert "LLM-Pruner" in page
    assert 'src="http' not in page
    summary = json.loads((finished / "results" / "summary.json").read_text())
    assert "tiny" in json.dumps(summary)
    zero = next(row for row in table if row["control"] == "prune_zero")
    dense = next(row for row in table if row["control"] == "dense")
    assert zero["perplexity"] == dense["perplexity"]
    assert not temporary_directories(finished)


def test_every_loaded_module_is_in_its_fingerprint(finished: Path) -> None:
    """Steps ran as processes, which refuse to commit otherwise; hold one against its record."""
    for name, record in records(finished).items():
        modules = {definition.partition(":")[0] for definition in record["definitions"]}
        assert any(module.startswith("workflow_scripts/") for module in modules), name
        if record["step"] == "scores" and "element1" in name:
            assert "prunelib.methods.llm_pruner" in modules
            assert "prunelib.methods.random" not in modules
            assert "prunelib.families.llama" in modules


def test_nothing_is_left_to_do(finished: Path) -> None:
    before = records(finished)
    run = snakemake(finished)
    assert run.returncode == 0
    assert "Nothing to be done" in run.stdout + run.stderr
    assert records(finished) == before


def test_the_scheduler_sleeps_while_steps_run(project: Path) -> None:
    """It looks for work once at the start and once for every step that ends."""
    shutil.rmtree(project / "results" / "perplexity")
    run = snakemake(project, "--cores", "1", "--verbose")
    assert run.returncode == 0, run.stderr[-3000:]
    lines = (run.stdout + run.stderr).splitlines()
    ended = sum(line.startswith("Finished jobid") for line in lines)
    rounds = sum(line.startswith("Resources before job selection") for line in lines)
    assert ended == 7 + 2
    assert 0 < rounds <= 1 + ended


def test_file_times_and_snakemake_s_metadata_do_not_matter(project: Path) -> None:
    shutil.rmtree(project / ".snakemake")
    for number, path in enumerate(sorted((project / "results").rglob("*"))):
        os.utime(path, (10**9 + number % 7, 10**9 + number % 7))
    run = snakemake(project, "-n")
    assert "Nothing to be done" in run.stdout + run.stderr


@pytest.mark.long
def test_one_model_of_each_other_family(tmp_path: Path) -> None:
    make_project(tmp_path)
    models = {"opt": "opt", "bloom": "bloom", "glm": "glm-tied"}
    for name, tiny in models.items():
        tiny_model(tiny).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    entries = {name: {"source": f"dir:{name}", "licence": "Apache-2.0"} for name in models}
    (tmp_path / "catalogue" / "models.yaml").write_text(yaml.safe_dump(entries))
    evaluation = {"small": {"perplexity": CATALOGUES["evaluation"]["small"]["perplexity"]}}
    (tmp_path / "catalogue" / "evaluation.yaml").write_text(yaml.safe_dump(evaluation))
    experiment = {"models": list(models), "methods": ["element1"], "recovery": []}
    write_experiment(tmp_path, EXPERIMENT | experiment)
    run = snakemake(tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    for name in models:
        perplexity = {
            row["control"]: float(row["perplexity"])
            for row in rows(tmp_path)
            if row["model"].startswith(name)
        }
        assert len(perplexity) == 3
        assert perplexity["prune_zero"] == perplexity["dense"]
        assert len(set(perplexity.values())) == 2
        record = json.loads(
            (
                artefact(tmp_path, "prune", f"{name}/element1/groups-0.34") / "provenance.json"
            ).read_text()
        )
        assert any(d.startswith(f"prunelib.families.{name}:") for d in record["definitions"])
        assert f"modeling_pruned_{name}.py" in record["files"]


@pytest.mark.long
def test_a_changed_parameter_reruns_its_method_alone(project: Path) -> None:
    before = records(project)
    methods = copy.deepcopy(CATALOGUES["methods"])
    methods["element1"]["parameters"] = {"ranking": "global"}
    (project / "catalogue" / "methods.yaml").write_text(yaml.safe_dump(methods))
    run = snakemake(project)
    assert run.returncode == 0, run.stderr[-3000:]
    after = records(project)
    new = [name for name in after if name not in before]
    assert new
    # Recovery-only and dense rows, random, statistics and scores stay.
    assert all("/element1/" in name and "/scores/" not in name for name in new)
    assert all(after[name] == before[name] for name in before)
    (project / "catalogue" / "methods.yaml").write_text(yaml.safe_dump(CATALOGUES["methods"]))
    run = snakemake(project, "-n", "-q", "rules")
    counts = [line.split() for line in run.stdout.splitlines()]
    # Back again: only the page is made anew.
    assert ["report", "1"] in counts
    assert ["total", "2"] in counts, run.stdout


@pytest.mark.long
def test_a_tampered_checkpoint_is_refused_and_nothing_else_is_lost(project: Path) -> None:
    weights = artefact(project, "prune", "element1/groups") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    shutil.rmtree(artefact(project, "perplexity", "element1/groups-0.34-protect-1-0/seed0/none"))
    shutil.rmtree(artefact(project, "perplexity", "random/groups-0.34-protect-1-0/seed0/none"))
    run = snakemake(project)
    assert run.returncode != 0
    assert "model.safetensors" in run.stderr
    assert "sha256" in run.stderr
    # The other cell was finished, and the page names what is missing.
    assert artefact(project, "perplexity", "random/groups-0.34-protect-1-0/seed0/none")
    page = (project / "results" / "report.html").read_text(encoding="utf-8")
    assert "missing" in page
    # A file that is gone is noticed without reading: the artefact is made again.
    weights.unlink()
    run = snakemake(project)
    assert run.returncode == 0, run.stderr[-3000:]
    assert weights.is_file()


@pytest.mark.long
def test_one_broken_method_does_not_stop_the_others(project: Path) -> None:
    (project / "plug").mkdir()
    write_outside_package(project / "plug", "raise ValueError('no luck today')")
    add_outside_method(project)
    run = snakemake_with_plug(project)
    assert run.returncode != 0
    assert "no luck today" in run.stderr
    assert (project / "results" / "report.html").is_file()
    table = rows(project)
    assert sum(row["method"] == "outside" and not row["perplexity"] for row in table)
    assert all(row["perplexity"] for row in table if row["method"] != "outside")


def write_outside_package(directory: Path, body: str) -> None:
    """A separately installed package with one method and its entry point."""
    (directory / "outsider.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "import numpy as np\n"
        "from prunelib.methods.base import Method\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Outside(Method):\n"
        "    title: ClassVar[str] = 'Outsider'\n"
        "    citation: ClassVar[str] = '@misc{outside, title = {Outside}}'\n"
        "    def scores(self, inputs):\n"
        f"        {body}\n"
        "METHOD = Outside\n"
    )
    info = directory / "outsider-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[prunelib.methods]\noutside = outsider\n")


def add_outside_method(project: Path) -> None:
    methods = CATALOGUES["methods"] | {"outside": {"method": "outside"}}
    (project / "catalogue" / "methods.yaml").write_text(yaml.safe_dump(methods))
    write_experiment(project, EXPERIMENT | {"methods": ["random", "element1", "outside"]})


def snakemake_with_plug(project: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        snakemake_command(),
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(project / "plug")},
    )


@pytest.mark.long
def test_a_method_of_another_package_appears_in_the_report(project: Path) -> None:
    before = records(project)
    (project / "plug").mkdir()
    write_outside_package(
        project / "plug",
        "return {k: [np.arange(inputs.family.kind(inputs.config, k).count, dtype=float)]"
        " * inputs.layer_count for k in self.kinds}",
    )
    add_outside_method(project)
    run = snakemake_with_plug(project)
    assert run.returncode == 0, run.stderr[-3000:]
    after = records(project)
    assert all(after[name] == before[name] for name in before)
    assert all("/outside/" in name for name in after if name not in before)
    assert any(row["method"] == "outside" and row["perplexity"] for row in rows(project))
    page = (project / "results" / "report.html").read_text(encoding="utf-8")
    assert "Outsider" in page
    assert "@misc{outside" in page


@pytest.mark.long
def test_a_new_method_is_one_file_and_one_entry(project: Path, tmp_path: Path) -> None:
    code = tmp_path / "code"
    for name in ("prunelib", "workflow_scripts", "rules", "profiles", "config", "Snakefile"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, code / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, code / name)
    text = (code / "prunelib" / "methods" / "random.py").read_text()
    text = text.replace('"Random"', '"Widest first"').replace(".random(", ".exponential(1, ")
    (code / "prunelib" / "methods" / "widest.py").write_text(text)
    methods = CATALOGUES["methods"] | {"widest": {"method": "widest"}}
    (project / "catalogue" / "methods.yaml").write_text(yaml.safe_dump(methods))
    write_experiment(project, EXPERIMENT | {"methods": ["random", "element1", "widest"]})
    before = records(project)
    command = snakemake_command()
    command[command.index(str(ROOT / "Snakefile"))] = str(code / "Snakefile")
    # The copy is the library, not the tree that is under test.
    environment = os.environ | {"PYTHONPATH": str(code)}
    run = subprocess.run(
        command, cwd=project, capture_output=True, text=True, check=False, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    after = records(project)
    assert all("/widest/" in name for name in after if name not in before)
    assert any(row["method"] == "widest" and row["perplexity"] for row in rows(project))


def wait_for(condition: Iterator[bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not next(condition):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


@pytest.mark.long
@pytest.mark.parametrize("step", ["statistics", "prune", "recover", "perplexity"])
def test_kill_nine_in_the_middle(step: str, project: Path) -> None:
    """kill -9 of the whole run while a step writes; run again: only unfinished steps run."""
    everything = records(project)
    downstream = {
        "statistics": ("statistics", "scores", "prune", "recover", "perplexity", "efficiency"),
        "prune": ("prune", "recover", "perplexity", "efficiency"),
        "recover": ("recover", "perplexity"),
        "perplexity": ("perplexity",),
    }[step]
    for name in downstream:
        shutil.rmtree(project / "results" / name)

    def writing() -> Iterator[bool]:
        while True:
            yield any(
                below or files
                for directory in temporary_directories(project)
                if f"/results/{step}/" in str(directory)
                for _, below, files in os.walk(directory)
            )

    run = start(project)
    try:
        wait_for(writing(), 120)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    survivors = records(project)
    again = snakemake(project)
    assert again.returncode == 0, again.stderr[-3000:]
    after = records(project)
    assert set(after) == set(everything)
    assert all(after[name] == survivors[name] for name in survivors)
    assert not temporary_directories(project)
    assert not list((project / "results").glob("**/*.state"))
    files = {
        name: {file: facts["sha256"] for file, facts in record["files"].items()}
        for name, record in after.items()
    }
    for name, record in everything.items():
        for file, facts in record["files"].items():
            # Timings differ; everything that was computed is bit-identical.
            if record["step"] not in ("perplexity", "efficiency"):
                assert files[name][file] == facts["sha256"], (name, file)


def test_a_bad_experiment_ends_before_anything_runs(project: Path) -> None:
    write_experiment(project, EXPERIMENT | {"methods": ["element1", "gone"]})
    before = records(project)
    run = snakemake(project)
    assert run.returncode != 0
    lines = [line for line in run.stderr.splitlines() if "'gone' is not in the catalogue" in line]
    assert len(lines) == 1
    assert records(project) == before


@pytest.mark.long
def test_no_network_is_needed_once_sources_are_there(project: Path) -> None:
    shutil.rmtree(project / "results" / "perplexity")
    # A network namespace without interfaces; it needs the rights to make one.
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("network namespaces cannot be made here: the run without network was not tried")
    run = subprocess.run(
        [*alone, *snakemake_command()], cwd=project, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(rows(project)) == 7


@pytest.mark.long
def test_a_step_s_refusal_is_one_line_and_loses_nothing(project: Path) -> None:
    before = records(project)
    sets = copy.deepcopy(CATALOGUES["calibration"])
    sets["huge"] = {"text": "made-up", "windows": 10_000, "length": 64}
    (project / "catalogue" / "calibration.yaml").write_text(yaml.safe_dump(sets))
    write_experiment(project, EXPERIMENT | {"calibration": "huge"})
    run = snakemake(project)
    assert run.returncode != 0
    (line,) = {line for line in run.stderr.splitlines() if line.startswith("error: calibration: ")}
    assert "10000" in line.replace(",", "")
    assert records(project) == before


@pytest.mark.long
def test_what_cannot_be_fetched_is_named_before_any_work(project: Path) -> None:
    models = copy.deepcopy(CATALOGUES["models"])
    geometry = str(ROOT / "config" / "models" / "tinyllama-1.1b.json")
    models["hub"] = {
        "source": "hf:TinyLlama/TinyLlama@unpinned",
        "geometry": geometry,
        "licence": "Apache-2.0",
    }
    (project / "catalogue" / "models.yaml").write_text(yaml.safe_dump(models))
    write_experiment(project, EXPERIMENT | {"models": ["tiny", "hub"], "seeds": [7]})
    before = records(project)
    assert snakemake(project, "-n").returncode == 0
    run = snakemake(project)
    assert run.returncode != 0
    assert "make pin" in run.stderr
    assert records(project) == before


@pytest.mark.long
def test_a_merged_checkpoint_on_request(project: Path) -> None:
    write_experiment(project, EXPERIMENT | {"merge": True})
    run = snakemake(project)
    assert run.returncode == 0, run.stderr[-3000:]
    merged = artefact(project, "merge", "element1")
    assert (merged / "model.safetensors").is_file()
    assert (merged / "plan.json").is_file()


@pytest.mark.long
def test_a_second_launch_is_refused_and_a_dead_one_s_lock_taken_over(project: Path) -> None:
    shutil.rmtree(project / "results" / "perplexity")
    path = project / "results" / ".launch.lock"

    def locked() -> Iterator[bool]:
        while True:
            yield path.exists()

    first = start(project)
    try:
        wait_for(locked(), 60)
        second = snakemake(project)
        assert second.returncode != 0
        assert str(first.pid) in second.stderr
        assert first.poll() is None, "the first launch ended before the second was tried"
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert path.exists()
    assert snakemake(project).returncode == 0
    assert not path.exists()


@pytest.mark.long
def test_export_stock_from_the_command_line(project: Path) -> None:
    pruned = artefact(project, "prune", "element1/groups")
    command = [sys.executable, str(ROOT / "workflow_scripts" / "export.py"), "--stock"]
    command += ["--pruned", str(pruned), "--original", str(project / "tiny")]
    run = subprocess.run(
        [*command, "--out", str(project / "stock")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    assert (project / "stock" / "model.safetensors").is_file()
