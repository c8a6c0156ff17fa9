"""Measure the perplexity of a checkpoint on the evaluation articles of a text.

Parameters: ``window`` (tokens), ``windows`` (at most; null for all), ``batch_tokens`` (null for the
device's default), ``device``, ``dtype``, ``threads`` (null for torch's default). Inputs:
``checkpoint``, ``text``, and ``adapter`` where there is one.
"""

import json
from pathlib import Path

from prunelib.data.calibration import JOIN, evaluation_ids
from prunelib.data.parameters import required
from prunelib.data.text import read_articles
from prunelib.provenance.step import StepRequest, run_step


def main(request: StepRequest, out: Path) -> None:
    """Write ``metrics.json``."""
    import torch

    from prunelib.data.tokenizer import load_tokenizer
    from prunelib.device import hardware
    from prunelib.evaluation.perplexity import cut_windows, perplexity
    from prunelib.recovery.adapters import load_recovered

    params, inputs = request.params, request.inputs
    window = required(params, "window", int, request.step)
    device, dtype = (required(params, key, str, request.step) for key in ("device", "dtype"))
    if params.get("threads") is not None:
        torch.set_num_threads(required(params, "threads", int, request.step))
    tokenizer = load_tokenizer(inputs["checkpoint"])
    ids = evaluation_ids(read_articles(inputs["text"], "evaluation"), tokenizer)
    windows = cut_windows(ids, window, params.get("windows"))
    model = load_recovered(inputs["checkpoint"], inputs.get("adapter"), device=device, dtype=dtype)
    result = perplexity(model, windows, batch_tokens=params.get("batch_tokens"))
    special = bool(len(ids)) and int(ids[0]) in tokenizer.all_special_ids
    source = json.loads((inputs["text"] / "meta.json").read_text(encoding="utf-8"))["source"]
    metrics = {
        "perplexity": result.perplexity,
        "nll_mean": result.nll_mean,
        "nll_sum": result.nll_sum,
        "targets": result.targets,
        "windows": len(result.window_nll),
        "window_nll": result.window_nll,
        "convention": {
            "dataset": source,
            "split": "evaluation",
            "window": window,
            "stride": window,
            "windows": "all" if params.get("windows") is None else "spread evenly over the text",
            "bos": "start of the text" if special else "none",
            "dtype": dtype,
            "join": JOIN,
        },
        "seconds": result.seconds,
        "tokens_per_second": result.tokens / result.seconds,
        "hardware": hardware(model.device),
        "dtype": dtype,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_step(main)
