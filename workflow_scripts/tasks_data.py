"""Build the local tasks: two of multiple choice and, where asked for, one of generation.

Parameters: ``continuation``, ``analogies`` and, optionally, ``completion`` (numbers of items),
``seed``. Inputs: ``text``, ``analogies``.
"""

import json
from pathlib import Path

from prunelib.data.analogies import read_analogies
from prunelib.data.parameters import required
from prunelib.data.tasks import analogy_items, completion_items, continuation_items, write_items
from prunelib.data.text import read_articles
from prunelib.provenance.step import StepRequest, run_step


def main(request: StepRequest, out: Path) -> None:
    """Write ``continuation.jsonl``, ``analogies.jsonl`` and ``meta.json``."""
    counts = {
        key: required(request.params, key, int, request.step)
        for key in ("continuation", "analogies", "seed", "completion")
        if key != "completion" or key in request.params
    }
    articles = read_articles(request.inputs["text"], "evaluation")
    rows = read_analogies(request.inputs["analogies"])
    continuation = continuation_items(articles, counts["continuation"], counts["seed"])
    write_items(out / "continuation.jsonl", continuation)
    write_items(out / "analogies.jsonl", analogy_items(rows, counts["analogies"], counts["seed"]))
    if "completion" in counts:
        items = completion_items(articles, counts["completion"], counts["seed"])
        write_items(out / "completion.jsonl", items)
    (out / "meta.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_step(main)
