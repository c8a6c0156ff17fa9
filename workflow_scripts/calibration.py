"""Sample a calibration set from the calibration articles of a text.

Parameters: ``windows``, ``length``, ``seed``. Inputs: ``text``, and ``model`` for its tokenizer.
"""

import json
from pathlib import Path

from prunelib.data.calibration import sample_windows, tokenise
from prunelib.data.parameters import required
from prunelib.data.text import read_articles
from prunelib.data.tokenizer import load_tokenizer
from prunelib.provenance.step import StepRequest, run_step


def main(request: StepRequest, out: Path) -> None:
    """Write ``windows.safetensors`` (input_ids, int64 [n, length]) and ``meta.json``."""
    from safetensors.numpy import save_file

    n, length, seed = (
        required(request.params, key, int, request.step) for key in ("windows", "length", "seed")
    )
    articles = read_articles(request.inputs["text"], "calibration")
    tokens = tokenise(articles, load_tokenizer(request.inputs["model"]))
    windows, documents, offsets = sample_windows(tokens, n, length, seed)
    save_file({"input_ids": windows}, out / "windows.safetensors")
    meta = {
        "n": n,
        "length": length,
        "seed": seed,
        "article_ids": [articles[index].id for index in documents],
        "offsets": offsets,
    }
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_step(main)
