"""What would run after which change: exactly so, in the tree of the first run and in a clone.

The results are forged, the keys, the code and the workflow are real; the code is a copy that the
tests edit.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from forged_project import PARSED, REPORT, copy_code, in_process, write_forgeable
from tiny_project import (
    CATALOGUES,
    EXPERIMENT,
    ROOT,
    make_project,
    snakemake_command,
    write_experiment,
)

from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import SCRIPTS, Node, closure
from prunelib.provenance.fingerprint import fingerprint

METHODS = ["random", "magnitude_l2", "wanda_sp", "element1"]
TARGET = "groups-0.34-protect-1-0"


def chain(method: str, seed: str = "/seed0") -> list[str]:
    """The steps of one method: its scores and all that follows from them."""
    pruned = f"tiny/{method}/{TARGET}"
    return [
        f"scores tiny/{method}{seed}",
        f"prune {pruned}{seed}",
        f"perplexity {pruned}{seed}/none",
        f"efficiency {pruned}{seed}/none",
        f"recover {pruned}/seed0/lora",
        f"perplexity {pruned}/seed0/lora",
    ]


WANDA = chain("wanda_sp")
MAGNITUDE = chain("magnitude_l2", seed="")
# The baseline is pruned to 0 % as well.
ELEMENT1 = [
    *chain("element1"),
    "prune tiny/element1/parameters-0/seed0",
    "perplexity tiny/element1/parameters-0/seed0/none",
]


@dataclass(frozen=True)
class Tree:
    """A copy of the code, and the project that was run with it."""

    code: Path
    project: Path

    def would_run(self) -> list[str]:
        found: list[str] = in_process(self.code, self.project, "would_run")
        return found

    def forge(self) -> None:
        in_process(self.code, self.project, "forge")

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.code / name
        text = path.read_text()
        assert text.count(old) == 1, name
        path.write_text(text.replace(old, new))

    def catalogue(self, name: str, entries: Any) -> None:
        (self.project / "catalogue" / f"{name}.yaml").write_text(
            yaml.safe_dump(entries, sort_keys=False)
        )


@pytest.fixture(scope="module")
def forged(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    directory = tmp_path_factory.mktemp("matrix")
    tree = Tree(copy_code(ROOT, directory / "code"), directory / "project")
    write_forgeable(tree.project, {"methods": METHODS})
    assert REPORT in tree.would_run()
    tree.forge()
    return tree


def copy_of(tree: Tree, directory: Path) -> Tree:
    for source in (tree.code, tree.project):
        shutil.copytree(source, directory / source.name)
    return Tree(directory / tree.code.name, directory / tree.project.name)


def clone_of(tree: Tree, directory: Path) -> Tree:
    """What another laboratory has: the files, at other times, and nothing of Snakemake's."""
    copied = copy_of(tree, directory)
    (copied.project / PARSED).unlink()
    scramble_times(directory)
    return copied


def scramble_times(directory: Path) -> None:
    """Set the times of everything to any second from 1970 to 2100."""
    rng = random.Random(0)
    for path in sorted(directory.rglob("*")):
        os.utime(path, (rng.randint(1, 4 * 10**9),) * 2)


def change_method(tree: Tree) -> None:
    tree.edit("prunelib/criteria/wanda.py", "abs().mean(0)", "abs().sum(0)")


def change_method_back(tree: Tree) -> None:
    tree.edit("prunelib/criteria/wanda.py", "abs().sum(0)", "abs().mean(0)")


def comment_everywhere(tree: Tree) -> None:
    for path in sorted((tree.code / "prunelib").rglob("*.py")):
        path.write_text(f"# A comment.\n\n{path.read_text()}\n\n# Another one.\n")
    tree.edit("prunelib/criteria/wanda.py", '"""Return the mean', '"""Compute the mean')


def change_shared_module(tree: Tree) -> None:
    # All methods fold scores; calibration, statistics and unpruned models do not.
    tree.edit("prunelib/criteria/fold.py", "astype(np.float64)", "astype(np.float64) * 2")


def change_config(tree: Tree) -> None:
    methods = copy.deepcopy(CATALOGUES["methods"])
    methods["magnitude_l2"]["parameters"] = {"order": 1}
    tree.catalogue("methods", methods)


@dataclass(frozen=True)
class Row:
    """One row of the matrix: what is done, and what would run then."""

    changes: tuple[Callable[[Tree], None], ...]
    would_run: list[str]


MATRIX = {
    "nothing changed": Row((), []),
    "one method changed": Row((change_method,), [*WANDA, REPORT]),
    "changed back": Row((change_method, change_method_back), []),
    "changed back after a run": Row((change_method, Tree.forge, change_method_back), [REPORT]),
    "comments only": Row((comment_everywhere,), []),
    "shared module changed": Row(
        (change_shared_module,), [*chain("random"), *WANDA, *MAGNITUDE, *ELEMENT1, REPORT]
    ),
    "one method's config changed": Row((change_config,), [*MAGNITUDE, REPORT]),
}


# That a run in between leaves nothing behind is seen by Snakemake, below.
@pytest.mark.parametrize("row", [row for row in MATRIX if "after a run" not in row])
def test_exactly_what_changed_would_run_in_a_clone(forged: Tree, tmp_path: Path, row: str) -> None:
    tree = clone_of(forged, tmp_path)
    for change in MATRIX[row].changes:
        change(tree)
    assert tree.would_run() == sorted(MATRIX[row].would_run)


def dry_run(tree: Tree) -> list[str]:
    """Step and labels of every job that ``snakemake -n`` names."""
    command = snakemake_command("-n", "--nocolor")
    command[command.index(str(ROOT / "Snakefile"))] = str(tree.code / "Snakefile")
    done = subprocess.run(
        command,
        cwd=tree.project,
        env=os.environ | {"PYTHONPATH": str(tree.code)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = done.stdout + done.stderr
    found = re.findall(
        r"^ +output: results/([^/]+)/(.+)/[0-9a-f]{16}/provenance\.json$", text, re.M
    )
    jobs = [f"{step} {labels}" for step, labels in found]
    jobs += [REPORT] * len(re.findall(r"^ +output: results/\.report-[0-9a-f]{16}$", text, re.M))
    # Nothing else runs; `all` only collects.
    rules = re.findall(r"^(?:local)?rule (\w+):$", text, re.M)
    assert len(jobs) == len([rule for rule in rules if rule != "all"])
    assert jobs or "Nothing to be done" in text
    return sorted(jobs)


@pytest.mark.long
@pytest.mark.parametrize(
    ("copying", "row"),
    [
        *((copy_of, row) for row in MATRIX),
        *((clone_of, row) for row in ("nothing changed", "one method changed")),
    ],
)
def test_snakemake_would_run_the_same(
    forged: Tree, tmp_path: Path, copying: Callable[[Tree, Path], Tree], row: str
) -> None:
    tree = copying(forged, tmp_path)
    for change in MATRIX[row].changes:
        change(tree)
    assert dry_run(tree) == sorted(MATRIX[row].would_run)


def test_what_does_not_concern_the_experiment_changes_no_key(forged: Tree, tmp_path: Path) -> None:
    tree = copy_of(forged, tmp_path)
    entries = copy.deepcopy(CATALOGUES)
    # Something new in every catalogue, and all keys of all files the other way round.
    entries["methods"]["magnitude_l1"] = {"method": "magnitude", "parameters": {"order": 1}}
    entries["models"]["other"] = {"source": "dir:elsewhere", "licence": "MIT"}
    entries["texts"]["more"] = entries["texts"]["made-up"] | {"seed": 1}
    entries["calibration"]["large"] = entries["calibration"]["small"] | {"windows": 8}
    entries["recovery"]["long"] = entries["recovery"]["lora"] | {"text": "more"}
    entries["evaluation"]["brief"] = {"perplexity": {"text": "more", "window": 8, "windows": 8}}
    for name, content in entries.items():
        tree.catalogue(name, backwards(content))
    experiment = backwards(EXPERIMENT | {"methods": METHODS})
    (tree.project / "experiment.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))
    shutil.copy(
        tree.code / "prunelib" / "methods" / "random.py",
        tree.code / "prunelib" / "methods" / "unrelated.py",
    )
    for path in sorted((tree.code / "docs").glob("*.md")):
        path.write_text(f"{path.read_text()}\nOne more line.\n")
    assert tree.would_run() == []


def backwards(value: Any) -> Any:
    """Mappings in the other order, at every depth; lists as they are."""
    if isinstance(value, dict):
        return {key: backwards(value[key]) for key in reversed(value)}
    return value


# --- one declared input at a time ----------------------------------------------------------------


def rebuilt(nodes: dict[str, Node], changed: Node, new: Node) -> dict[str, Node]:
    """The graph with one node replaced; old key to new node."""
    made: dict[str, Node] = {}

    def make(node: Node) -> Node:
        if node.key not in made:
            inputs = {name: make(upstream) for name, upstream in node.inputs.items()}
            source = new if node is changed else node
            made[node.key] = Node(source.step, source.labels, source.params, inputs, source.modules)
        return made[node.key]

    for node in nodes.values():
        make(node)
    return made


def dependants(nodes: dict[str, Node], changed: Node) -> set[str]:
    """Keys of a node and of all that follows from it, found without any hashing."""
    found = {changed.key}
    while more := {
        node.key
        for node in nodes.values()
        if node.key not in found and any(up.key in found for up in node.inputs.values())
    }:
        found |= more
    return found


def mutations(value: Any) -> list[Any]:
    """Every way to change one leaf of a value by the least."""
    if isinstance(value, dict):
        return [
            *(value | {key: new} for key in value for new in mutations(value[key])),
            {name: item for name, item in value.items() if name != next(iter(value), None)},
            value | {"added": 0},
        ][: None if value else -2]
    if isinstance(value, list):
        return [[*value, 0], *([*value[:-1], new] for new in mutations(value[-1:] and value[-1]))]
    if isinstance(value, bool) or value is None:
        return [not value]
    if isinstance(value, int):
        return [value + 1, float(value)]
    if isinstance(value, float):
        return [value * (1 + 2**-52) or 5e-324]
    return [f"{value} "]


def test_one_changed_parameter_moves_the_keys_that_depend_on_it_and_no_other(
    forged: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(forged.project)
    cells = Experiment.load(Path("experiment.yaml"), Path("catalogue")).cells
    nodes = closure(node for cell in cells for node in cell.steps.values())
    # One node of each step is enough; they are made by the same lines.
    seen = {node.step: node for node in nodes.values()}
    assert len(seen) == 9
    tried = 0
    for node in seen.values():
        expected = dependants(nodes, node)
        for params in mutations(dict(node.params)):
            new = Node(node.step, node.labels, params, node.inputs, node.modules)
            after = rebuilt(nodes, node, new)
            assert {key for key, made in after.items() if made.key != key} == expected, params
            tried += 1
    assert tried > 60


@pytest.mark.parametrize(
    ("package", "steps"),
    [
        ("mwparserfromhell", {"fetch_text"}),
        ("gguf", {"fetch_model"}),
        ("peft", {"recover"}),
        ("tokenizers", {"calibration", "recover", "perplexity"}),
    ],
)
def test_another_version_of_a_package_moves_what_uses_it(
    forged: Tree, monkeypatch: pytest.MonkeyPatch, package: str, steps: set[str]
) -> None:
    from prunelib.provenance import keys

    monkeypatch.chdir(forged.project)

    def graph() -> dict[str, Node]:
        keys._version.cache_clear()
        cells = Experiment.load(Path("experiment.yaml"), Path("catalogue")).cells
        return closure(node for cell in cells for node in cell.steps.values())

    before = graph()
    version = keys.metadata.version
    with monkeypatch.context() as patch:
        patch.setattr(
            keys.metadata, "version", lambda name: "99" if name == package else version(name)
        )
        after = graph()
    keys._version.cache_clear()
    expected: set[str] = set()
    for node in before.values():
        # An adapter brings peft into the evaluations that load it.
        if node.step in steps or (package == "peft" and "adapter" in node.inputs):
            expected |= dependants(before, node)
    assert before.keys() - after.keys() == expected
    assert len(before) == len(after)


# --- what steps load -----------------------------------------------------------------------------

WATCH = """
import atexit, json, os, sys
def tell():
    names = [n for n, m in list(sys.modules.items())
             if n.split(".")[0] == "prunelib" and getattr(m, "__file__", None)]
    with open(os.environ["LOADED"], "w") as file:
        json.dump(sorted(names), file)
if "LOADED" in os.environ:
    atexit.register(tell)
"""


@pytest.mark.long
def test_every_step_s_fingerprint_has_all_modules_that_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of each of the thirteen steps, looked at from outside."""
    make_project(tmp_path)
    # An item's letters are its tokens here.
    config = tmp_path / "tiny" / "config.json"
    longer = json.loads(config.read_text()) | {"max_position_embeddings": 1024}
    config.write_text(json.dumps(longer))
    # Continuation items want many sentences of at least twelve words.
    text = tmp_path / "text" / "articles.jsonl"
    rows = [json.loads(line) for line in text.read_text().splitlines()]
    for row in rows:
        words = row["text"].replace(".", "").lower().split()
        row["text"] = " ".join(
            " ".join(words[start : start + 12]).capitalize() + "." for start in range(0, 108, 9)
        )
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pairs").mkdir()
    pairs = "\n".join(f"w{i} x{i} w{i + 1} x{i + 1}" for i in range(12))
    (tmp_path / "pairs" / "questions.txt").write_text(f": one\n{pairs}\n: two\n{pairs}\n")
    texts = CATALOGUES["texts"] | {
        "pairs": {"source": "dir:pairs/questions.txt", "format": "analogies", "licence": "CC0-1.0"}
    }
    local = {"text": "made-up", "analogies_text": "pairs"}
    local |= {"continuation": 4, "analogies": 4, "seed": 0}
    tasks = {"tasks": ["local_continuation", "local_analogies"], "limit": 4, "local": local}
    small = CATALOGUES["evaluation"]["small"] | {"tasks": tasks | {"batch_size": 4, "seed": 0}}
    for name, entries in (("texts", texts), ("evaluation", {"small": small})):
        (tmp_path / "catalogue" / f"{name}.yaml").write_text(yaml.safe_dump(entries))
    shutil.copytree(ROOT / "config" / "tasks", tmp_path / "catalogue" / "tasks")
    write_experiment(tmp_path, EXPERIMENT | {"methods": ["wanda_sp", "element1"], "merge": True})
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    monkeypatch.chdir(tmp_path)
    cells = Experiment.load(Path("experiment.yaml"), Path("catalogue")).cells
    nodes = closure(node for cell in cells for node in cell.steps.values())
    # The last of each step, which has an adapter where there are any, and both passes.
    chosen = {node.step: node for node in sorted(nodes.values(), key=lambda n: len(n.inputs))}
    assert set(chosen) == set(SCRIPTS)
    chosen["another"] = next(n for n in nodes.values() if "activations" in n.labels)
    chosen["of it"] = next(n for n in nodes.values() if n.labels[:2] == ("tiny", "wanda_sp"))
    waiting = closure(chosen.values())
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'watch'}{os.pathsep}{ROOT}"}
    while waiting:
        key = next(
            k for k, n in waiting.items() if not any(u.key in waiting for u in n.inputs.values())
        )
        node = waiting.pop(key)
        done = subprocess.run(
            [sys.executable, "-P", str(ROOT / SCRIPTS[node.step]), "--request", node.request()],
            env=environment | {"LOADED": str(tmp_path / "loaded.json")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (node.name, done.stderr[-2000:])
        loaded = set(json.loads((tmp_path / "loaded.json").read_text()))
        assert "prunelib.provenance.step" in loaded
        (tmp_path / "loaded.json").unlink()
        neutral = re.compile(r"prunelib(\.errors|\.provenance.*|\.cluster.*)?")
        loaded = {name for name in loaded if not neutral.fullmatch(name)}
        assert loaded <= fingerprint(node.entry).modules, node.name
