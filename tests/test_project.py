"""The project's own promises: pins, layers, no pickles, a clean tree of imports."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import yaml
from tiny_project import ROOT

# Lower layers first; a module may import its own layer and those before it.
LAYERS = [
    ["errors", "device", "provenance", "command"],
    ["data"],
    ["plan", "families", "discovery"],
    ["low_rank"],
    ["surgery", "replacement", "merging", "emulation"],
    ["checkpoint"],
    ["statistics"],
    ["criteria"],
    ["rules"],
    ["depth_selection"],
    ["selection"],
    ["methods"],
    ["recovery"],
    ["evaluation", "speculation"],
    ["reporting", "experiment"],
    ["cluster"],
    ["sharing"],
]
PICKLERS = {"pickle", "dill", "joblib", "cloudpickle"}


def lock_pins() -> list[str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_environment_file_and_lock_file_carry_the_same_pins() -> None:
    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict))
    assert pip == lock_pins()
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", pin) for pin in pip)


def test_the_lock_covers_what_the_package_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        name for extra in project["optional-dependencies"].values() for name in extra
    ]
    pinned = {re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() for pin in lock_pins()}
    names = {re.split(r"[<>=]", name)[0] for name in wanted}
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in names} <= pinned


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_go_downwards() -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    for path in sorted((ROOT / "prunelib").rglob("*.py")):
        parts = path.relative_to(ROOT / "prunelib").with_suffix("").parts
        if parts == ("__init__",):
            continue
        assert parts[0] in level, f"{path} belongs to no layer"
        for module in imported_modules(path):
            pieces = module.split(".")
            if pieces[0] != "prunelib" or len(pieces) < 2 or pieces[1] == parts[0]:
                continue
            assert level[pieces[1]] <= level[parts[0]], f"{path} imports {module}"


def test_reporting_and_planning_never_import_torch() -> None:
    for name in ("reporting", "experiment", "cluster", "sharing"):
        for path in (ROOT / "prunelib" / name).rglob("*.py"):
            assert not any(m.split(".")[0] == "torch" for m in imported_modules(path)), path


def test_nothing_unpickles() -> None:
    for folder in ("prunelib", "workflow_scripts", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            # Naming pickle's error class is all that a module may do with it.
            used = {m for m in imported_modules(path) if m.split(".")[0] in PICKLERS}
            assert used <= {"pickle"}, path
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                    "torch.load",
                    "pickle.load",
                    "pickle.loads",
                    "pickle.Unpickler",
                    "np.load",
                    "numpy.load",
                    "pd.read_pickle",
                ):
                    assert "weights_only=True" in ast.unparse(node), path
                if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    assert ast.unparse(node.value) == "False", path


def test_profile_needs_the_commit_protocol() -> None:
    profile = yaml.safe_load((ROOT / "profiles" / "default" / "config.yaml").read_text())
    assert profile["rerun-triggers"] == ["mtime"]
    for rule in (ROOT / "rules").glob("*.smk"):
        assert "script:" not in rule.read_text(), "steps are shell commands, see docs/design.md"
