"""A whole experiment on a tiny random model and a made-up text, in a directory of its own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from conftest import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]

CATALOGUES: dict[str, Any] = {
    "models": {"tiny": {"source": "dir:tiny", "licence": "Apache-2.0"}},
    "texts": {
        "made-up": {
            "source": "dir:text/articles.jsonl",
            "format": "jsonl",
            "split": {"calibration": 0.4, "recovery": 0.3, "evaluation": 0.3},
            "seed": 0,
            "licence": "CC0-1.0",
        }
    },
    "methods": {
        "random": {"method": "random"},
        "magnitude_l2": {"method": "magnitude", "parameters": {"order": 2}},
        "wanda_sp": {"method": "wanda_sp"},
        "element1": {"method": "llm_pruner"},
        "shortgpt": {"method": "shortgpt"},
    },
    "calibration": {"small": {"text": "made-up", "windows": 4, "length": 16}},
    "recovery": {
        "lora": {
            "method": "lora",
            "text": "made-up",
            "recipe": {
                "batch": 2,
                "micro_batch": 2,
                "max_steps": 4,
                "warmup_steps": 0,
                "length": 16,
                "save_every": 2,
            },
        }
    },
    "evaluation": {
        "small": {
            "perplexity": {"text": "made-up", "window": 16, "windows": 8},
            "efficiency": {"batch": 1, "length": 8, "new_tokens": 2, "warmup": 0, "repeats": 1},
        }
    },
}

EXPERIMENT: dict[str, Any] = {
    "name": "tiny",
    "description": "A tiny random model through the whole workflow.",
    "models": ["tiny"],
    "methods": ["random", "element1"],
    "baseline": "element1",
    "targets": [{"groups": 0.34, "protect": {"first": 1, "last": 0}}],
    "calibration": "small",
    "recovery": ["lora"],
    "evaluation": "small",
    "seeds": [0],
    "compute": {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "batch_windows": 4,
        "hardware_class": "test",
    },
}


def write_text(directory: Path) -> None:
    """Thirty articles of pronounceable words."""
    rng = random.Random(0)
    syllables = [c + v for c in "bdfgklmnprst" for v in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(300)]
    directory.mkdir(parents=True)
    with (directory / "articles.jsonl").open("w", encoding="utf-8") as file:
        for number in range(30):
            sentences = [" ".join(rng.choices(words, k=9)).capitalize() + "." for _ in range(12)]
            file.write(json.dumps({"title": f"Article {number}", "text": " ".join(sentences)}))
            file.write("\n")


def make_project(directory: Path, experiment: Mapping[str, Any] = EXPERIMENT) -> Path:
    """Write model, text, catalogues and experiment into ``directory``; return the experiment."""
    tiny_model("llama").save_pretrained(directory / "tiny")
    tiny_tokenizer().save_pretrained(directory / "tiny")
    write_text(directory / "text")
    catalogue = directory / "catalogue"
    catalogue.mkdir()
    for name, entries in CATALOGUES.items():
        (catalogue / f"{name}.yaml").write_text(yaml.safe_dump(entries), encoding="utf-8")
    return write_experiment(directory, experiment)


def write_experiment(directory: Path, experiment: Mapping[str, Any]) -> Path:
    path = directory / "experiment.yaml"
    path.write_text(yaml.safe_dump(dict(experiment)), encoding="utf-8")
    return path


def snakemake_command(*options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(ROOT / "Snakefile"),
        "--cores",
        "2",
        *options,
        "--config",
        "experiment=experiment.yaml",
        "catalogue=catalogue",
    ]


def snakemake(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the workflow in ``directory``."""
    return subprocess.run(
        snakemake_command(*options),
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )


def start(directory: Path) -> subprocess.Popen[bytes]:
    """Start the workflow in ``directory`` as a process group of its own."""
    return subprocess.Popen(
        snakemake_command(),
        cwd=directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
