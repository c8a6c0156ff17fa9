"""Self-speculative decoding of a real model: is the text the same, and what is gained.

Drafts are the model without some blocks, attentions or MLPs: those of least influence, those that
a greedy search by the loss removes first (SLEB), and those that SWIFT's search finds while it
decodes. For each prompt, plain decoding (the same loop without drafts) and all drafts run in turns;
the speed-up is the median over prompts of plain over speculative time, with a bootstrap interval
over prompts. Every text is held against ``generate``'s. Where one differs, the logits of the two
tokens are compared in one pass over the text without any cache: kernels for one and for several
tokens round differently, and what is closer than that has no order of its own.

``GPU`` is arithmetic, not a measurement: the expected speed-up (Leviathan et al., theorem 3.8) at
the acceptance rate found and a cost ratio equal to the share of the weights that a draft pass
reads, as where reading weights is all that takes time; at the draft length used and at the best.

    OMP_NUM_THREADS=1 python benchmarks/self_speculation.py --json self_speculation.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from artefacts import newest_artefact
from scoring import embedded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from prunelib.speculation.decoding import Decoded
    from prunelib.speculation.draft import Draft
    from prunelib.speculation.swift import Search

RESAMPLES = 10_000


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the limits of its 95 % percentile bootstrap interval."""
    array = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(np.median(array[drawn], axis=1), [0.025, 0.975])
    return float(np.median(array)), float(low), float(high)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return (wall seconds, result)."""
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def drafts_of(options: argparse.Namespace, model: Any, config: Any, windows: Any) -> dict[str, Any]:
    """Return the drafts by name."""
    from prunelib.families import family_of
    from prunelib.speculation.draft import Draft, Skipped
    from prunelib.speculation.swift import Search, SwiftSettings
    from prunelib.statistics import greedy, influence
    from prunelib.statistics.inputs import PassInputs

    family = family_of(config)
    found: dict[str, Draft | Search] = {}
    for part, count in (
        ("block", options.blocks),
        ("attention", options.parts),
        ("mlp", options.parts),
    ):
        values = influence.collect(
            PassInputs(model, family, config, windows, len(windows)),
            part=part,
            recompute=False,
            seed=0,
        )["influence"]
        least = tuple(values.argsort()[:count].tolist())
        found[f"influence, {part}"] = Draft(model, Skipped(**{part: least}))
    order = greedy.collect(
        PassInputs(model, family, config, windows, 1),
        part="block",
        most=options.blocks / len(family.layers(model)),
        keep_first=1,
        keep_last=1,
        seed=0,
    )["order"]
    found["greedy, block"] = Draft(model, Skipped(block=tuple(order.tolist())))
    settings = SwiftSettings(skip_ratio=options.skip_ratio, window=options.window)
    found["swift"] = Search(model, settings)
    return found


def first_difference(model: Any, ids: torch.Tensor, one: list[int], other: list[int]) -> Any:
    """Return the place where two texts part, and by how much their logits differ there."""
    import torch

    place = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    text = torch.cat([ids, ids.new_tensor([one[:place]])], 1)
    with torch.inference_mode():
        logits = model(input_ids=text, use_cache=False).logits[0, -1].float()
    return {"place": place, "gap": float(logits[one[place]] - logits[other[place]])}


def pass_ratio(model: Any, ids: torch.Tensor, many: int, repeats: int = 9) -> float:
    """Return the time of a cached pass over ``many`` tokens over that of one over one token."""
    import torch

    from prunelib.speculation.draft import DraftCache

    cache, length, ratios = DraftCache(), ids.shape[1], []
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for _ in range(repeats):
            spent = []
            for count in (1, many):
                read = ids[:, -1:].expand(1, count)
                run = lambda read=read: model(  # noqa: E731
                    input_ids=read, past_key_values=cache, use_cache=True
                )
                spent.append(timed(run)[0])
                cache.shorten(length)
            ratios.append(spent[1] / spent[0])
    return statistics.median(ratios)


def rounding(model: Any, ids: torch.Tensor, many: int) -> dict[str, Any]:
    """Compare the logits of cached passes over one and over ``many`` tokens of a text [1, n]."""
    import torch

    from prunelib.speculation.draft import DraftCache

    found = []
    with torch.inference_mode():
        for size in (1, many):
            cache = DraftCache()
            parts = (
                model(input_ids=part, past_key_values=cache, use_cache=True).logits[0]
                for part in ids.split(size, dim=1)
            )
            found.append(torch.cat(list(parts)))
    one, several = found
    top = one.topk(2).values
    return {
        "positions": len(one),
        "flipped": int((one.argmax(-1) != several.argmax(-1)).sum()),
        "largest_difference": float((one - several).abs().max()),
        "least_gap": float((top[:, 0] - top[:, 1]).min()),
    }


def figures(options: argparse.Namespace) -> dict[str, Any]:
    """Decode all prompts in all ways; print a line per prompt."""
    import torch

    from prunelib.data.calibration import evaluation_ids
    from prunelib.data.text import read_articles
    from prunelib.data.tokenizer import load_tokenizer
    from prunelib.device import hardware
    from prunelib.evaluation.perplexity import cut_windows
    from prunelib.speculation.arithmetic import (
        best_draft_length,
        counted_speed_up,
        expected_speed_up,
    )
    from prunelib.speculation.decoding import DecodingSettings, decode
    from prunelib.speculation.swift import Search

    options.model = options.model or newest_artefact("fetch_model")
    options.text = options.text or newest_artefact("fetch_text")
    model, config, windows = embedded(options.model, options.text, *options.windows)
    drafts: dict[str, Any] = {"plain": None} | drafts_of(options, model, config, windows)
    articles = read_articles(options.text, "evaluation")
    ids = evaluation_ids(articles, load_tokenizer(options.model))
    prompts = cut_windows(ids, options.prompt_tokens, options.prompts).split(1)
    settings = DecodingSettings(
        options.new_tokens, draft_length=options.draft_length, threshold=options.threshold
    )
    load = os.getloadavg()
    seconds: dict[str, list[float]] = {name: [] for name in ("generate", *drafts)}
    decoded: dict[str, list[Decoded]] = {name: [] for name in drafts}
    differing: dict[str, list[Any]] = {name: [] for name in drafts}

    def generate(prompt: torch.Tensor) -> list[int]:
        whole = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=options.new_tokens,
            pad_token_id=0,
        )
        new: list[int] = whole[0, prompt.shape[1] :].tolist()
        return new

    generate(prompts[0])
    for number, prompt in enumerate(prompts):
        spent, expected = timed(lambda prompt=prompt: generate(prompt))  # type: ignore[misc]
        seconds["generate"].append(spent)
        # In turns, and not always in the same order: a drift of the machine falls on all alike.
        names = list(drafts)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            spent, found = timed(
                lambda name=name, prompt=prompt: decode(model, prompt, drafts[name], settings)  # type: ignore[misc]
            )
            seconds[name].append(spent)
            decoded[name].append(found)
            if list(found.tokens) != expected:
                difference = first_difference(model, prompt, expected, list(found.tokens))
                differing[name].append({"prompt": number} | difference)
        gains = (f"{name} {seconds['plain'][-1] / seconds[name][-1]:.2f}" for name in names[1:])
        print(f"prompt {number}: {', '.join(gains)}", flush=True)
    rows = []
    for name, draft in drafts.items():
        runs = decoded[name]
        row: dict[str, Any] = {
            "draft": name,
            "texts": len(runs),
            "differing": differing[name],
            "passes": sum(run.passes for run in runs),
            "tokens": sum(len(run.tokens) for run in runs),
            "seconds": seconds[name],
        }
        if draft is not None:
            used = draft.draft if isinstance(draft, Search) else draft
            accepted, judged, drafted = (
                sum(getattr(run, key) for run in runs) for key in ("accepted", "judged", "drafted")
            )
            ratios = [a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)]
            median, low, high = median_interval(ratios)
            row |= {
                "skipped": vars(used.skipped),
                "cost": used.cost,
                "drafted": drafted,
                "accepted": accepted,
                "judged": judged,
                "acceptance_rate": accepted / judged,
                "tokens_per_pass": (row["tokens"] - len(runs)) / row["passes"],
                "speed_up": median,
                "interval": [low, high],
            }
            row["counted"] = counted_speed_up(
                row["tokens"] - len(runs), row["passes"], drafted, used.cost
            )
            best = best_draft_length(row["acceptance_rate"], used.cost)
            row["gpu"] = {
                length: expected_speed_up(row["acceptance_rate"], length, used.cost)
                for length in (options.draft_length, best)
            }
            if isinstance(draft, Search):
                row |= {"scores": draft.scores, "searches": sum(run.searches for run in runs)}
        rows.append(row)
    return {
        "model": str(options.model),
        "hardware": hardware(),
        "load_average_before": load,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "draft_length": options.draft_length,
        "threshold": options.threshold,
        "generate_seconds": seconds["generate"],
        "pass_ratio": pass_ratio(model, prompts[0], options.draft_length + 1),
        "rounding": rounding(
            model, torch.tensor(ids[None, : options.rounding_tokens]), options.draft_length + 1
        ),
        "rows": rows,
    }


def report(found: dict[str, Any]) -> None:
    """Print the table."""
    plain = next(row["seconds"] for row in found["rows"] if row["draft"] == "plain")
    ratio = statistics.median(a / b for a, b in zip(found["generate_seconds"], plain, strict=True))
    print(
        f"generate / plain time {ratio:.2f}; a pass over {found['draft_length'] + 1} tokens takes "
        f"{found['pass_ratio']:.2f} times as long as one over one; load "
        f"{found['load_average_before'][0]:.2f}"
    )
    print(
        "logits of one against several tokens: {flipped} of {positions} choices differ, logits by "
        "at most {largest_difference:.2g}; least gap of the two first {least_gap:.2g}".format(
            **found["rounding"]
        )
    )
    print(
        "| draft | weights read | differing | acceptance | tokens/pass | speed-up | counted | GPU |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in found["rows"]:
        same = f"{len(row['differing'])} of {row['texts']}"
        if "cost" not in row:
            print(f"| {row['draft']} | 1 | {same} | | 1 | 1 | 1 | 1 |")
            continue
        low, high = row["interval"]
        gpu = ", ".join(f"{value:.2f} ({length})" for length, value in row["gpu"].items())
        print(
            f"| {row['draft']} | {row['cost']:.3f} | {same} | {row['acceptance_rate']:.3f} | "
            f"{row['tokens_per_pass']:.2f} | {row['speed_up']:.2f} [{low:.2f}, {high:.2f}] | "
            f"{row['counted']:.2f} | {gpu} |"
        )
    for row in found["rows"]:
        for one in row["differing"]:
            print(
                f"{row['draft']}: prompt {one['prompt']} parts at token {one['place']}, where the "
                f"logits of the two tokens differ by {one['gap']:.2g}"
            )


def main() -> int:
    """Measure and print; the exit code is 1 where a text differs by more than rounding."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint directory")
    parser.add_argument("--text", type=Path, help="directory with articles.jsonl")
    parser.add_argument("--windows", nargs=2, type=int, default=[4, 64], help="of the ranking")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.0)
    parser.add_argument("--blocks", type=int, default=4, help="blocks that a draft leaves out")
    parser.add_argument("--parts", type=int, default=8, help="the same of attentions or MLPs")
    parser.add_argument("--skip-ratio", type=float, default=0.25, help="of SWIFT's search")
    parser.add_argument("--window", type=int, default=32, help="tokens that it scores a set on")
    parser.add_argument("--rounding-tokens", type=int, default=512, help="compared in both ways")
    parser.add_argument("--rounding", type=float, default=1e-3, help="gap of logits that may flip")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    found = figures(options)
    report(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    gaps = [one["gap"] for row in found["rows"] for one in row["differing"]]
    return 0 if all(abs(gap) <= options.rounding for gap in gaps) else 1


if __name__ == "__main__":
    sys.exit(main())
