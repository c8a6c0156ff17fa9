"""Experiment files: what is refused, and which keys a change moves."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_project import CATALOGUES, EXPERIMENT, ROOT, make_project, write_experiment

from prunelib.errors import InputError, PrunelibError
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import closure
from prunelib.rules import Target
from prunelib.statistics.merges import most_merged


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experiment")
    make_project(directory)
    return directory


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(**changes: Any) -> Experiment:
    content = copy.deepcopy(EXPERIMENT) | changes
    return Experiment.load(write_experiment(Path(), content), Path("catalogue"))


def keys(experiment: Experiment) -> set[str]:
    return set(closure(n for cell in experiment.cells for n in cell.steps.values()))


def edit(catalogue: str, change: Callable[[dict[str, Any]], None]) -> None:
    entries = copy.deepcopy(CATALOGUES[catalogue])
    change(entries)
    Path("catalogue", f"{catalogue}.yaml").write_text(yaml.safe_dump(entries))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["element1", "gone"]}, "methods 'gone' is not in the catalogue; known: "),
        ({"colour": "red"}, "'colour' was unexpected.*allowed keys: baseline"),
        (
            {"targets": [{"parameters": 1.5}]},
            r"targets\[0\]\.parameters: 1\.5 .*um 1",
        ),
        ({"targets": [{"parameters": 0.5, "groups": 0.5}]}, r"targets\[0\]"),
        (
            {"targets": [{"parameters": 0.5, "protect": {"first": 2, "last": 1}}]},
            "can lose at most",
        ),
        ({"targets": [{"groups": 0.3, "protect": {"first": 4}}]}, "cover all 4 layers"),
        (
            {"targets": [{"groups": 0.3, "protect": {"first": 1.5}}]},
            r"targets\[0\]: target protect: first 1\.5 given; a whole number from 0, or a share",
        ),
        (
            {"targets": [{"groups": 0.3, "protect": {"layers": [1, 4]}}]},
            r"layer 4 given; the model has layers 0\.\.3",
        ),
        ({"targets": [{"groups": 0.3, "protect": {"layers": [1, 1]}}]}, r"protect\.layers"),
        ({"baseline": "shortgpt"}, "baseline: 'shortgpt' is not one of the methods"),
        ({"models": ["../etc"]}, r"models\[0\]"),
        ({"methods": ["<script>"]}, r"methods\[0\]"),
        ({"methods": ["a; rm -rf x"]}, r"methods\[0\]"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"compute": EXPERIMENT["compute"] | {"dtype": "float16"}}, "compute.dtype: 'float16'"),
    ],
)
def test_bad_experiments_are_refused_in_one_line(
    project: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        load(**changes).cells  # noqa: B018
    assert "\n" not in str(refusal.value)
    assert "experiment.yaml" in str(refusal.value)


@pytest.mark.parametrize(
    ("parameters", "target", "message"),
    [
        # The tiny model has four layers; the first merge begins layers_per_merge below the last.
        ({}, {"blocks": 1}, r"with laco on tiny: lowest 0, highest 3, .*: the model has layers 0"),
        ({"layers_per_merge": 2, "highest": 4}, {"blocks": 1}, r"the model has layers 0\.\.3"),
        # Merges begin at layers 1 and 0; with an interval of two, at one of them alone.
        ({"layers_per_merge": 2, "interval": 1}, {"blocks": 3}, "interval 1, .* at most 2 can be"),
        ({"layers_per_merge": 2, "interval": 2}, {"groups": 0.5}, "2 of 4 blocks .* at most 1 can"),
    ],
)
def test_merges_that_a_model_s_layers_do_not_allow_are_refused(
    project: Path, parameters: dict[str, Any], target: dict[str, Any], message: str
) -> None:
    laco = {"method": "laco", "parameters": parameters}
    edit("methods", lambda methods: methods.update(laco=laco))
    told = {"methods": ["laco"], "baseline": "laco", "targets": [target]}
    with pytest.raises(InputError, match=message) as refusal:
        load(**told).cells  # noqa: B018
    assert "\n" not in str(refusal.value)
    parameters |= {"layers_per_merge": 2, "interval": 1, "highest": None}
    edit("methods", lambda methods: methods.update(laco=laco))
    assert load(**told | {"targets": [{"blocks": 2}]}).cells


@pytest.mark.parametrize(
    ("layers", "per_merge", "interval", "lowest", "highest"),
    [(9, 3, 1, 1, None), (9, 3, 2, 0, 7), (10, 4, 3, 2, None), (8, 2, 5, 0, None), (9, 7, 1, 0, 8)],
)
def test_most_merged_is_that_of_all_ways_to_merge(
    layers: int, per_merge: int, interval: int, lowest: int, highest: int | None
) -> None:
    def merged(alive: list[int], place: int) -> int:
        if place < lowest:
            return layers - len(alive)
        kept = alive[: place + 1] + alive[place + per_merge :]
        return max(merged(kept, place - interval), merged(alive, place - 1))

    top = layers - 1 if highest is None else highest
    found = most_merged(
        layers, layers_per_merge=per_merge, interval=interval, lowest=lowest, highest=highest
    )
    assert found == merged(list(range(layers)), top - per_merge)


def test_targets_may_be_named(project: Path) -> None:
    spelt = {"groups": 0.34, "protect": {"first": 1, "layers": [3]}}
    Path("catalogue/targets.yaml").write_text(yaml.safe_dump({"third": spelt}))
    named, plain = load(targets=["third"]), load(targets=[spelt])
    assert named.targets == plain.targets == [Target("groups", 0.34, 1, 0, (3,))]
    assert keys(named) == keys(plain)
    with pytest.raises(InputError, match=r"targets\[0\]: target 'half' .* known: third"):
        load(targets=["half"])
    Path("catalogue/targets.yaml").write_text(yaml.safe_dump({"third": {"groups": 2}}))
    with pytest.raises(InputError, match=r"targets\[0\]\.groups: 2"):
        load(targets=["third"])


def test_repeated_keys_and_object_tags_are_refused(project: Path) -> None:
    path = Path("experiment.yaml")
    path.write_text("name: a\nname: b\n")
    with pytest.raises(InputError, match="'name' is given twice"):
        Experiment.load(path, Path("catalogue"))
    path.write_text("name: !!python/object/apply:os.system ['touch sprung']\n")
    with pytest.raises(InputError, match="could not determine a constructor"):
        Experiment.load(path, Path("catalogue"))
    assert not Path("sprung").exists()


def test_a_missing_model_directory_is_refused(project: Path) -> None:
    shutil.rmtree("tiny")
    with pytest.raises(InputError, match="tiny: model directory tiny does not exist"):
        load().cells  # noqa: B018


def test_an_unknown_architecture_is_refused(project: Path) -> None:
    path = Path("tiny/config.json")
    path.write_text(path.read_text().replace('"llama"', '"mamba"'))
    with pytest.raises(InputError, match="architecture 'mamba' is not supported; supported"):
        load().cells  # noqa: B018


def test_unpinned_revisions_plan_but_do_not_run(project: Path) -> None:
    geometry = ROOT / "config" / "models" / "tinyllama-1.1b.json"
    edit(
        "models",
        lambda e: e.update(
            hub={
                "source": "hf:TinyLlama/TinyLlama@unpinned",
                "geometry": str(geometry),
                "licence": "Apache-2.0",
            }
        ),
    )
    experiment = load(models=["hub"])
    assert experiment.cells
    (problem,) = experiment.preflight()
    assert "make pin" in problem


def test_the_catalogue_of_the_project_is_valid() -> None:
    for path in sorted((ROOT / "config" / "experiments").glob("*.yaml")):
        experiment = Experiment.load(path, ROOT / "config")
        assert len({cell.id for cell in experiment.cells}) == len(experiment.cells)


INSTRUCTIONS = {
    "source": "dir:text/records.jsonl",
    "format": "alpaca",
    "validation": 5,
    "seed": 0,
    "licence": "CC0-1.0",
}


def test_validation_and_instructions_belong_together(project: Path) -> None:
    edit("texts", lambda e: e.update(asked=INSTRUCTIONS))
    edit("recovery", lambda e: e["lora"]["recipe"].update(eval_every=2))
    with pytest.raises(InputError, match=r"recovery.yaml: lora: eval_every needs a validation"):
        load()
    entry = copy.deepcopy(CATALOGUES["recovery"]["lora"]) | {"text": "asked"}
    entry["recipe"]["eval_every"] = 2
    edit("recovery", lambda e: e.update(lora=entry))
    recovery = next(c.steps["recovery"] for c in load().cells if "recovery" in c.steps)
    text = recovery.inputs["text"]
    assert (text.step, text.params["validation"]) == ("fetch_text", 5)
    edit("texts", lambda e: e.update(asked=INSTRUCTIONS | {"validation": 6}))
    moved = next(c.steps["recovery"] for c in load().cells if "recovery" in c.steps)
    assert moved.key != recovery.key


STREAM = {"source": "dir:text/a.jsonl", "format": "jsonl", "stream": True, "licence": "CC0-1.0"}


def test_streams_are_for_recovery_and_have_no_epochs(project: Path) -> None:
    edit("texts", lambda e: e.update(endless=STREAM))
    recipe = CATALOGUES["recovery"]["lora"]["recipe"]

    def recovers(**changes: object) -> None:
        entry = {"text": "endless", "recipe": recipe | changes}
        edit("recovery", lambda e: e["lora"].update(entry))

    recovers()
    node = next(c.steps["recovery"] for c in load().cells if "recovery" in c.steps)
    assert node.inputs["text"].params["stream"] is True
    assert "datasets" in node.packages
    recovers(max_steps=None)
    with pytest.raises(InputError, match=r"recovery.yaml: lora: text 'endless' .* has no epochs"):
        load()
    recovers(max_steps=None, tokens=1000)
    load()
    for wrong in ({"format": "wikipedia"}, {"split": {"recovery": 0.5, "evaluation": 0.5}}):
        edit("texts", lambda e, wrong=wrong: e.update(endless=STREAM | wrong))
        with pytest.raises(InputError, match="is a stream, which has no parts but recovery"):
            load()
    edit("texts", lambda e: e.update(endless=INSTRUCTIONS))
    with pytest.raises(InputError, match="holds instructions; tokens is allowed for texts of"):
        load()
    edit("texts", lambda e: e.update(endless=STREAM))
    edit("calibration", lambda e: e["small"].update(text="endless"))
    with pytest.raises(InputError, match=r"calibration.yaml: text 'endless' is a stream"):
        load()


@pytest.mark.parametrize(
    ("catalogue", "change"),
    [
        ("calibration", lambda e: e["small"].update(text="asked")),
        ("evaluation", lambda e: e["small"]["perplexity"].update(text="asked")),
    ],
)
def test_instructions_are_no_articles(
    project: Path, catalogue: str, change: Callable[[dict[str, Any]], None]
) -> None:
    edit("texts", lambda e: e.update(asked=INSTRUCTIONS))
    edit(catalogue, change)
    with pytest.raises(InputError, match=rf"{catalogue}.yaml: text 'asked' holds instructions"):
        load()


@pytest.mark.parametrize("validation", [0, 1.5, "many", None])
def test_a_text_of_instructions_says_what_is_set_aside(project: Path, validation: Any) -> None:
    entry = INSTRUCTIONS | {"validation": validation}
    edit("texts", lambda e: e.update(asked=entry))
    with pytest.raises(InputError, match=r"texts.yaml: asked\.validation"):
        load()
    edit("texts", lambda e: e.update(asked={k: v for k, v in entry.items() if k != "validation"}))
    with pytest.raises(InputError, match="'validation' is a required property"):
        load()


def test_controls_are_rows(project: Path) -> None:
    controls = [cell.control for cell in load().cells]
    for control in ("dense", "random", "prune_zero", "recovery_only"):
        assert control in controls


def test_methods_without_randomness_are_pruned_once(project: Path) -> None:
    cells = load(methods=["magnitude_l2", "element1"], seeds=[0, 1, 2]).cells
    untuned = [c for c in cells if c.method == "magnitude_l2" and c.recovery == "none"]
    tuned = [c for c in cells if c.method == "magnitude_l2" and c.recovery == "lora"]
    assert [c.seed for c in untuned] == [None]
    assert [c.seed for c in tuned] == [0, 1, 2]
    assert len({c.steps["prune"].key for c in tuned}) == 1
    assert len({c.steps["recovery"].key for c in tuned}) == 3


def test_order_and_unrelated_entries_move_no_key(project: Path) -> None:
    before = keys(load(methods=["random", "element1", "shortgpt"]))
    assert keys(load(methods=["shortgpt", "element1", "random"], description="other")) == before
    edit("methods", lambda e: e.update(another={"method": "magnitude"}))
    edit("models", lambda e: e["tiny"].update(citation="@misc{x}"))
    assert keys(load(methods=["random", "element1", "shortgpt"])) == before


def test_one_method_s_parameter_moves_its_keys_alone(project: Path) -> None:
    names = ["random", "magnitude_l2", "element1"]
    before = {c.id: c.steps["perplexity"].key for c in load(methods=names).cells}
    edit("methods", lambda e: e["magnitude_l2"].update(parameters={"order": 1}))
    after = {c.id: c.steps["perplexity"].key for c in load(methods=names).cells}
    moved = {cell for cell, key in before.items() if after[cell] != key}
    assert moved == {cell for cell in before if "magnitude_l2" in cell}


def test_selection_settings_share_scores(project: Path) -> None:
    edit(
        "methods",
        lambda e: e.update(
            element1_global={"method": "llm_pruner", "parameters": {"ranking": "global"}}
        ),
    )
    experiment = load(methods=["element1", "element1_global"])
    by_method = {c.method: c.steps["prune"] for c in experiment.cells if "prune" in c.steps}
    a, b = by_method["element1"], by_method["element1_global"]
    assert a.key != b.key
    assert a.inputs["scores"].key == b.inputs["scores"].key
    # One result has one place, or one of its users would wait for it in vain.
    assert a.inputs["scores"].directory == b.inputs["scores"].directory


@pytest.mark.parametrize("path", sorted((ROOT / "config/experiments").glob("*.yaml")))
def test_every_result_has_one_place(path: Path) -> None:
    nodes = keys(Experiment.load(path, ROOT / "config"))
    assert nodes


def test_two_places_of_one_result_are_refused(project: Path) -> None:
    cells = load().cells
    node = next(cell.steps["prune"] for cell in cells if "prune" in cell.steps)
    twin = replace(node, labels=("elsewhere",))
    assert twin.key == node.key
    with pytest.raises(PrunelibError, match=f"prune of elsewhere .* the key {node.key}"):
        closure([node, twin])


def test_one_pass_serves_all_on_request(project: Path) -> None:
    edit(
        "methods",
        lambda e: e.update(
            element2={"method": "llm_pruner", "parameters": {"criterion": "element2"}}
        ),
    )

    def passes(**changes: Any) -> dict[str, Any]:
        """Method -> the pass of its scores on the first seed."""
        cells = load(**changes).cells
        scores = {c.method: c.steps["prune"].inputs["scores"] for c in cells if "prune" in c.steps}
        found = {"element1": "gradients", "element2": "fisher"}
        return {method: scores[method].inputs[found[method]] for method in scores}

    both = ["element1", "element2"]
    apart, merged = passes(methods=both), passes(methods=both, merge_passes=True)
    assert [node.params["name"] for node in apart.values()] == ["gradients", "fisher"]
    assert apart["element2"].key == merged["element2"].key == merged["element1"].key
    # Without second order there is nothing to take its place.
    alone = passes(methods=["element1"], merge_passes=True)
    assert alone["element1"].key == apart["element1"].key


def test_numbers_of_one_value_are_one_target(project: Path) -> None:
    def target(first: float, parameters: float) -> dict[str, Any]:
        return {"parameters": parameters, "protect": {"first": first}}

    assert keys(load(targets=[target(1, 0)])) == keys(load(targets=[target(1.0, 0.0)]))


def test_planning_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path;"
        "from prunelib.experiment.experiment import Experiment;"
        f"e = Experiment.load(Path({str(ROOT / 'config/experiments/quickstart.yaml')!r}),"
        f" Path({str(ROOT / 'config')!r})); e.cells;"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
