"""Why steps would run: the part of the key that differs, told once, at its root."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from forged_project import copy_code, experiment, forge, forge_artefact, write_forgeable
from tiny_project import CATALOGUES, EXPERIMENT, ROOT, write_experiment

from prunelib.errors import InputError
from prunelib.provenance import keys
from prunelib.provenance.step import StepRequest, execute
from prunelib.sharing.explain import (
    ABSENT,
    CODE,
    DAMAGED,
    INPUT,
    KEYS,
    PACKAGE,
    PARAMETER,
    Cause,
    Reason,
    changed_definitions,
    changed_parameters,
    explain,
    render,
    select,
)

TARGET = "groups-0.34-protect-1-0"
METHODS = {"methods": ["magnitude_l2", "wanda_sp"], "baseline": "wanda_sp"}


@pytest.fixture(scope="module")
def forged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("explain") / "project"
    write_forgeable(directory, METHODS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        forge()
    return directory


@pytest.fixture
def project(forged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(forged, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def catalogue(name: str, entries: Any) -> None:
    Path("catalogue", f"{name}.yaml").write_text(yaml.safe_dump(entries))


def reasons(*names: str) -> list[Reason]:
    return explain(select(experiment(), names)[0])


def causes(found: list[Reason]) -> set[Cause]:
    return {cause for reason in found for cause in reason.causes}


def artefact(step: str, *labels: str) -> Path:
    (found,) = Path("results", step, *labels).iterdir()
    return found


# --- as a command --------------------------------------------------------------------------------


def command(code: Path, project: Path, *names: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--experiment", "experiment.yaml", "--catalogue", "catalogue", *names]
    return subprocess.run(
        [sys.executable, "-P", str(code / "workflow_scripts" / "explain.py"), *arguments],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_one_changed_line_is_traced_to_its_function(project: Path, tmp_path: Path) -> None:
    code = copy_code(ROOT, tmp_path / "code")
    path = code / "prunelib" / "criteria" / "wanda.py"
    path.write_text(path.read_text().replace("abs().mean(0)", "abs().sum(0)"))
    done = command(code, project)
    assert done.returncode == 0, done.stderr
    before = artefact("scores", "tiny", "wanda_sp", "seed0")
    assert done.stdout.splitlines() == [
        "8 steps because: changed code: prunelib.criteria.wanda:wanda_columns",
        f"  scores of tiny/wanda_sp/seed0 (compared with {before})",
        f"  prune of tiny/wanda_sp/{TARGET}/seed0",
        "  prune of tiny/wanda_sp/parameters-0/seed0",
        "  also 1 efficiency, 3 perplexity, 1 recover",
        "the report would be made anew: it does not show these cells",
    ]
    # A cell of another method has nothing to do with it.
    done = command(code, project, f"tiny/magnitude_l2/{TARGET}/no-seed/none", "scores")
    first, second, _ = done.stdout.splitlines()
    assert first == f"tiny/magnitude_l2/{TARGET}/no-seed/none: nothing would run"
    assert second == "1 step because: changed code: prunelib.criteria.wanda:wanda_columns"


def test_bad_input_is_one_line_and_an_exit_code(project: Path) -> None:
    done = command(ROOT, project, "perplexities")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: explain: 'perplexities' is neither a step (")


# --- every part of the key -----------------------------------------------------------------------


def test_when_nothing_would_run_nothing_is_explained(project: Path) -> None:
    assert reasons() == []
    key = artefact("scores", "tiny", "wanda_sp", "seed0").name
    assert select(experiment(), [key]) == (
        [],
        [f"{key}: nothing would run, results/scores/tiny/wanda_sp/seed0/{key} is there"],
    )
    shutil.rmtree(Path("results", "scores"))
    assert select(experiment(), [key])[1] == [
        f"{key}: nothing would run, results/scores/tiny/wanda_sp/seed0/{key} is not there, "
        "but nothing that is missing needs it"
    ]


def test_a_changed_parameter_is_named_with_both_values(project: Path) -> None:
    methods = copy.deepcopy(CATALOGUES["methods"])
    methods["magnitude_l2"]["parameters"] = {"order": 1}
    catalogue("methods", methods)
    found = reasons()
    assert causes(found) == {Cause(PARAMETER, "parameters.order: 2 -> 1")}
    assert {r.node.step for r in found if r.direct} == {"scores", "prune"}
    assert {r.node.labels[1] for r in found} == {"magnitude_l2"}


def test_a_cause_far_upstream_is_told_once(project: Path) -> None:
    texts = copy.deepcopy(CATALOGUES["texts"])
    texts["made-up"]["seed"] = 1
    catalogue("texts", texts)
    found = reasons()
    assert causes(found) == {Cause(PARAMETER, "seed: 0 -> 1")}
    assert [reason.node.step for reason in found if reason.direct] == ["fetch_text"]
    told = render(found)
    assert told.count("seed: 0 -> 1") == 1
    assert told.splitlines()[1].startswith("  fetch_text of made-up (compared with results/")
    # Once the text is there under its new key, the cause of the rest is still the same.
    (text,) = (reason.node for reason in found if reason.direct)
    execute(StepRequest.from_json(text.request()), forge_artefact)
    rest = reasons()
    assert len(rest) == len(found) - 1
    assert causes(rest) == causes(found)
    assert not any(reason.direct for reason in rest)


def test_several_causes_are_told_together(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = copy.deepcopy(CATALOGUES["methods"])
    methods["magnitude_l2"]["parameters"] = {"order": 1}
    catalogue("methods", methods)
    version = keys.metadata.version
    keys._version.cache_clear()
    monkeypatch.setattr(
        keys.metadata, "version", lambda name: "99" if name == "safetensors" else version(name)
    )
    try:
        found = {reason.node.name: reason for reason in reasons()}
    finally:
        keys._version.cache_clear()
    now = Cause(PACKAGE, f"safetensors: {version('safetensors')} -> 99")
    both = tuple(sorted((now, Cause(PARAMETER, "parameters.order: 2 -> 1"))))
    assert found["fetch_model of tiny"].causes == (now,)
    assert found[f"prune of tiny/magnitude_l2/{TARGET}"].causes == both
    assert found["scores of tiny/wanda_sp/seed0"].causes == (now,)
    assert not found["scores of tiny/wanda_sp/seed0"].direct


def test_a_new_method_is_compared_with_the_nearest(project: Path) -> None:
    write_experiment(project, EXPERIMENT | {"methods": ["element1", "wanda_sp", "magnitude_l2"]})
    found = reasons("scores")
    (reason,) = found
    assert reason.causes == (Cause(ABSENT, "no artefact is there under these names"),)
    assert reason.direct
    assert "results/scores/tiny/wanda_sp/seed0/" in reason.note
    for part in ('method: "wanda_sp" -> "llm_pruner"', "prunelib.methods.llm_pruner (added)"):
        assert part in reason.note


def test_what_was_never_made_is_told(project: Path) -> None:
    shutil.rmtree("results/efficiency")
    found = reasons()
    assert causes(found) == {Cause(ABSENT, "no artefact of this step is there yet")}
    assert render(found).startswith("3 steps because: no artefact of this step is there yet\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "forged.json").write_text("short"), "forged.json has 5 bytes, its record"),
        (lambda d: (d / "forged.json").unlink(), "forged.json is missing"),
        (lambda d: (d / "provenance.json").write_text("{"), "provenance.json: is not JSON"),
        (
            lambda d: (d / "provenance.json").write_text('{"schema": 0, "key": "x"}'),
            "is not a record of schema version 1",
        ),
    ],
)
def test_a_damaged_artefact_is_named_with_its_file(project: Path, damage: Any, words: str) -> None:
    damage(artefact("prune", "tiny", "magnitude_l2", TARGET))
    shutil.rmtree(Path("results", "perplexity", "tiny", "magnitude_l2", TARGET, "none"))
    found = {reason.node.step: reason for reason in reasons()}
    (cause,) = found["prune"].causes
    assert cause.kind == DAMAGED
    assert "results/prune/tiny/magnitude_l2" in cause.text
    assert words in cause.text


def test_a_record_of_another_key_is_named(project: Path) -> None:
    place = artefact("recover", "tiny", "recovery_only", "seed0", "lora")
    record = json.loads((place / "provenance.json").read_text())
    (place / "provenance.json").write_text(json.dumps(record | {"key": "f" * 16}))
    (reason,) = reasons()
    assert reason.causes == (Cause(DAMAGED, f"{place} holds the record of {'f' * 16}"),)


def test_keys_made_in_another_way_are_told(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_KEY_RULES", 0)
    found = reasons()
    assert causes(found) == {Cause(KEYS, "all parts are equal: keys are made in another way now")}
    assert len(render(found).splitlines()) == 4  # all are one group


def test_an_old_upstream_that_is_gone_is_told(project: Path) -> None:
    texts = copy.deepcopy(CATALOGUES["texts"])
    texts["made-up"]["seed"] = 1
    catalogue("texts", texts)
    old = artefact("fetch_text", "made-up").name
    shutil.rmtree("results/fetch_text")
    found = {reason.node.step: reason for reason in reasons()}
    told = Cause(INPUT, f"text: was {old}, which is not here to compare with")
    assert found["calibration"].causes == (told,)
    assert found["fetch_text"].causes == (Cause(ABSENT, "no artefact of this step is there yet"),)


def test_names_that_are_not_known_are_refused(project: Path) -> None:
    with pytest.raises(InputError, match="its cells begin with tiny/dense/unpruned/no-seed/none"):
        select(experiment(), ["0" * 16])


# --- differences ---------------------------------------------------------------------------------


def test_parameters_are_compared_as_json_and_by_their_dotted_names() -> None:
    old = {"a": {"b": 1, "c": [1, {"x": 1, "y": 2}]}, "d": 1, "e": None, "f": {}}
    new = {"a": {"b": 2, "c": (1, {"y": 2, "x": 1})}, "d": 1.0, "f": {"g": True}}
    assert [cause.text for cause in changed_parameters(old, new)] == [
        "a.b: 1 -> 2",
        "d: 1 -> 1.0",
        "e: null -> none",
        "f: {} -> none",
        "f.g: none -> true",
    ]
    assert changed_parameters(new, new) == ()


def test_definitions_are_named_and_whole_modules_once() -> None:
    old = {"m:f": "1", "m:g": "1", "m:h": "1", "gone:a": "1", "gone:b": "1"}
    new = {"m:f": "2", "m:g": "1", "m:i": "1", "new:a": "1", "new:b": "1"}
    assert [cause.text for cause in changed_definitions(old, new)] == [
        "gone (removed)",
        "m:f",
        "m:h (removed)",
        "m:i (added)",
        "new (added)",
    ]
    assert {cause.kind for cause in changed_definitions(old, new)} == {CODE}
