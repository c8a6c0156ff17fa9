"""A tiny project whose results are forged: whole artefacts with true keys and records, no figures.

What would run can be asked in seconds then. This file is also a command, so that the planning is
done by the code that ``PYTHONPATH`` names: a copy that a test may edit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import Node, closure, needed, report_key
from prunelib.provenance.fingerprint import load_parsed, save_parsed
from prunelib.provenance.step import StepRequest, execute

REPORT = "report"
PARSED = Path("results", ".parsed.json")


def experiment() -> Experiment:
    """The experiment of the current directory."""
    return Experiment.load(Path("experiment.yaml"), Path("catalogue"))


def terminal(made: Experiment) -> list[Node]:
    return [node for cell in made.cells for node in cell.steps.values()]


def stamp(made: Experiment) -> Path:
    return Path("results", f".report-{report_key(made.report(), closure(terminal(made)))}")


def forge_artefact(request: StepRequest, out: Path) -> None:
    (out / "forged.json").write_text(json.dumps([request.step, request.out.as_posix()]))


def forge() -> None:
    """Make what is missing in the current directory, as its steps would, and the report's stamp."""
    made = experiment()
    missing = needed(terminal(made))

    def make(node: Node) -> None:
        if missing.pop(node.key, None):
            for upstream in node.inputs.values():
                make(upstream)
            execute(StepRequest.from_json(node.request()), forge_artefact)

    for node in list(missing.values()):
        make(node)
    for old in Path("results").glob(".report-*"):
        old.unlink()
    stamp(made).touch()


def would_run() -> list[str]:
    """Step and labels of everything that the workflow would run, the report included."""
    made = experiment()
    names = [f"{node.step} {'/'.join(node.labels)}" for node in needed(terminal(made)).values()]
    return sorted([*names, *([] if stamp(made).exists() else [REPORT])])


def in_process(code: Path, project: Path, what: str) -> Any:
    """Run one of the two functions with the library in ``code``, in ``project``."""
    done = subprocess.run(
        [sys.executable, "-P", __file__, what],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def copy_code(root: Path, code: Path) -> Path:
    """Copy what a run needs of the repository."""
    for name in ("prunelib", "workflow_scripts", "rules", "profiles", "config", "docs"):
        shutil.copytree(root / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "Snakefile", code)
    return code


def write_forgeable(directory: Path, changes: Mapping[str, Any]) -> None:
    """Write a project without weights: planning reads the model's config alone."""
    import yaml
    from conftest import tiny_config
    from tiny_project import CATALOGUES, EXPERIMENT, write_experiment, write_text

    (directory / "tiny").mkdir(parents=True)
    (directory / "tiny" / "config.json").write_text(json.dumps(tiny_config("llama")))
    write_text(directory / "text")
    (directory / "catalogue").mkdir()
    for name, entries in CATALOGUES.items():
        (directory / "catalogue" / f"{name}.yaml").write_text(yaml.safe_dump(entries))
    write_experiment(directory, EXPERIMENT | dict(changes))


if __name__ == "__main__":
    # As the Snakefile does.
    load_parsed(PARSED)
    print(json.dumps({"forge": forge, "would_run": would_run}[sys.argv[1]]()))
    save_parsed(PARSED)
