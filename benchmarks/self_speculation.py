"""Self-speculative decoding of a real model: is the text the same, and what is gained.

Drafts are the model without some blocks, attentions or MLPs: those of least influence, those that
a greedy search by the loss removes first (SLEB), those that SWIFT's search finds while it decodes;
and a FlexiGPT model's without the blocks that share weights. One row is drawn at a temperature.
For each prompt, plain decoding (the same loop without drafts) and the row's decoding run in turns;
the speed-up is the median over prompts of plain over speculative time, with a bootstrap interval
over prompts. Greedy text is held against plain decoding's, and that (row ``generate``) against
``generate``'s. Where one differs, the logits of the two tokens are compared in one pass over the
text without any cache: kernels for one and for several tokens round differently, and what is closer
than that (``tie_limit``) has no order of its own.

``GPU`` is arithmetic, not a measurement: passes counted in this run, drafts' and searches' at the
share of the weights that they read, as where reading weights is all that takes time; without the
search's passes beside it, as once the search has ended. Without a threshold also the formula at
its best draft length (Leviathan et al., theorem 3.8).

A row is a file of ``--out``, written after every prompt; the same command goes on where it was
ended, rows can be run one by one (``--rows``), and a row's first prompt says how long it will take.

    OMP_NUM_THREADS=1 python benchmarks/self_speculation.py --out self_speculation
    OMP_NUM_THREADS=1 python benchmarks/self_speculation.py --out self_speculation --report
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from artefacts import newest_artefact
from scoring import embedded

from prunelib.command import reporting_errors
from prunelib.errors import InputError

if TYPE_CHECKING:
    import torch

    from prunelib.speculation.decoding import Decoded, DecodingSettings

RESAMPLES = 10_000
ROWS = ("generate", "block", "attention", "mlp", "greedy", "swift", "shared_blocks", "sampled")
# More units in the last place than this are no rounding of a logit: passes of SmolLM2-135M over one
# and over five tokens differ by up to 15 of those of its largest logit.
MOST_ULPS = 64
# What changes a row's figures, beside the model and the text.
OPTIONS = (
    *("prompt_tokens", "new_tokens", "draft_length", "blocks", "parts", "skip_ratio", "window"),
    *("windows", "temperature"),
)
COUNTED = ("drafted", "accepted", "judged", "passes", "searches", "draft_work", "search_work")


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the limits of its 95 % percentile bootstrap interval."""
    array = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(np.median(array[drawn], axis=1), [0.025, 0.975])
    return float(np.median(array)), float(low), float(high)


def tie_limit(difference: float, largest: float) -> float:
    """Return how far two fp32 logits may be apart and have no order of their own.

    Each of them may be off by what was measured between passes of different shapes, but by no more
    than ``MOST_ULPS`` units in the last place of the largest logit, which is more than rounding.

    Args:
        difference: the largest between the same logits of passes of different shapes.
        largest: magnitude among the logits.
    """
    return 2 * min(difference, MOST_ULPS * float(np.spacing(np.float32(largest))))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return (wall seconds, result)."""
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def first_difference(model: Any, ids: torch.Tensor, one: list[int], other: list[int]) -> Any:
    """Return the place where two texts part, and by how much their logits differ there.

    ``rounding`` is the largest difference, over the vocabulary, to the logits of a cached pass over
    the last token alone; ``largest`` the magnitude of the logits.
    """
    import torch

    from prunelib.speculation.draft import DraftCache

    place = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    if place == min(len(one), len(other)):
        return {"place": place, "gap": float("inf"), "rounding": 0.0, "largest": 0.0}
    text = torch.cat([ids, ids.new_tensor([one[:place]])], 1)
    cache = DraftCache()
    with torch.inference_mode():
        logits = model(input_ids=text, use_cache=False).logits[0, -1].float()
        model(input_ids=text[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        alone = model(input_ids=text[:, -1:], past_key_values=cache, use_cache=True).logits[0, -1]
    return {
        "place": place,
        "gap": abs(float(logits[one[place]] - logits[other[place]])),
        "rounding": float((logits - alone.float()).abs().max()),
        "largest": float(logits.abs().max()),
    }


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
        "largest_logit": float(one.abs().max()),
        "least_gap": float((top[:, 0] - top[:, 1]).min()),
    }


def shared_checkpoint(source: Path, windows: torch.Tensor, blocks: int, out: Path) -> None:
    """Write a FlexiGPT checkpoint: blocks of least influence use the nearest one's weights.

    The adapters begin as truncated differences and are not trained. Nearest by index, which spares
    the decompositions that the paper's distance needs.
    """
    from prunelib.checkpoint import WeightReader, load_model, prune_checkpoint, read_config
    from prunelib.families import family_of
    from prunelib.methods import create
    from prunelib.methods.base import ScoringInputs
    from prunelib.rules import Target
    from prunelib.selection import select
    from prunelib.statistics import activations
    from prunelib.statistics.inputs import PassInputs

    config = read_config(source)
    family = family_of(config)
    method = create("flexigpt", {"rank": 0.0625, "distance": "nearest"})
    inputs = PassInputs(load_model(source), family, config, windows, len(windows))
    found = {"activations": activations.collect(inputs)}
    scores = method.scores(ScoringInputs(family, config, WeightReader(source), found, 0))
    plan = select(scores, family, config, Target("blocks", blocks), method.rule(), {})
    out.mkdir()
    prune_checkpoint(source, plan, out)


class Bench:
    """The model, its prompts and its drafts; what no row needs is never made."""

    def __init__(self, options: argparse.Namespace) -> None:
        from prunelib.data.calibration import evaluation_ids
        from prunelib.data.text import read_articles
        from prunelib.data.tokenizer import load_tokenizer
        from prunelib.evaluation.perplexity import cut_windows

        self.options = options
        self.model, self.config, self.windows = embedded(
            options.model, options.text, *options.windows
        )
        articles = read_articles(options.text, "evaluation")
        self.ids = evaluation_ids(articles, load_tokenizer(options.model))
        cut = cut_windows(self.ids, options.prompt_tokens, options.prompts)
        if len(cut) < options.prompts:
            raise InputError(f"prompts {options.prompts} given; the text has {len(cut)}")
        self.prompts = cut.split(1)

    @cached_property
    def shared(self) -> Any:
        """The FlexiGPT model: the one named, or one made of the model."""
        from prunelib.checkpoint import load_model

        if self.options.shared:
            return load_model(self.options.shared)
        with tempfile.TemporaryDirectory() as place:
            out = Path(place, "shared")
            shared_checkpoint(self.options.model, self.windows, self.options.blocks, out)
            return load_model(out)

    def model_of(self, name: str) -> Any:
        """Return the whole model of a row."""
        return self.shared if name == "shared_blocks" else self.model

    def draft(self, name: str) -> Any:
        """Return the draft of a row, a new one each time; None for ``generate``."""
        from prunelib.families import family_of
        from prunelib.speculation.draft import Draft, Skipped, shared_blocks
        from prunelib.speculation.swift import Search, SwiftSettings
        from prunelib.statistics import greedy, influence
        from prunelib.statistics.inputs import PassInputs

        options, family, model = self.options, family_of(self.config), self.model_of(name)
        inputs = (model, family, self.config, self.windows)
        if name == "generate":
            return None
        if name == "shared_blocks":
            return Draft(model, shared_blocks(model.config.to_dict()))
        if name == "swift":
            told = SwiftSettings(skip_ratio=options.skip_ratio, window=options.window)
            return Search(model, told)
        if name == "greedy":
            order = greedy.collect(
                PassInputs(*inputs, 1),
                part="block",
                most=options.blocks / len(family.layers(model)),
                keep_first=1,
                keep_last=1,
                seed=0,
            )["order"]
            return Draft(model, Skipped(block=tuple(order.tolist())))
        part = "block" if name == "sampled" else name
        values = influence.collect(
            PassInputs(*inputs, len(self.windows)), part=part, recompute=False, seed=0
        )["influence"]
        count = options.blocks if part == "block" else options.parts
        return Draft(model, Skipped(**{part: tuple(values.argsort()[:count].tolist())}))

    def settings(self, name: str, threshold: float) -> DecodingSettings:
        """Return how a row decodes."""
        from prunelib.speculation.decoding import DecodingSettings

        return DecodingSettings(
            self.options.new_tokens,
            draft_length=self.options.draft_length,
            threshold=threshold,
            temperature=self.options.temperature if name == "sampled" else 0.0,
        )

    def generate(self, prompt: torch.Tensor) -> list[int]:
        """Return what transformers' own greedy decoding gives."""
        import torch

        whole = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=self.options.new_tokens,
            pad_token_id=0,
        )
        new: list[int] = whole[0, prompt.shape[1] :].tolist()
        return new

    def machine(self) -> dict[str, Any]:
        """Return what the machine does with passes of different shapes."""
        import torch

        from prunelib.device import hardware

        many = self.options.draft_length + 1
        text = torch.tensor(self.ids[None, : self.options.rounding_tokens])
        return {
            "hardware": hardware(),
            "load_average_before": os.getloadavg(),
            "tokens": many,
            "pass_ratio": pass_ratio(self.model, self.prompts[0], many),
            "rounding": rounding(self.model, text, many),
        }


def told(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a row's figures depend on; prompts may become more."""
    return {name: getattr(options, name) for name in OPTIONS} | {
        name: str(getattr(options, name)) for name in ("model", "text", "shared")
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a kill leaves the old file or the new one."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def begun(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the prompts of a row that are there already.

    Raises:
        InputError: they are of other settings.
    """
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    other = [name for name, value in settings.items() if content["settings"].get(name) != value]
    if other:
        raise InputError(f"{path}: is of other {', '.join(other)}; name another --out")
    prompts: list[dict[str, Any]] = content["prompts"]
    return prompts


def run_row(bench: Bench, name: str, threshold: float) -> None:
    """Decode all prompts that a row lacks; write its file after each."""
    from prunelib.speculation.swift import Search

    options = bench.options
    path = options.out / f"{name}-{threshold:g}.json"
    settings = json.loads(json.dumps(told(options) | {"row": name, "threshold": threshold}))
    done = begun(path, settings)
    if len(done) >= options.prompts:
        return
    draft, model = bench.draft(name), bench.model_of(name)
    if isinstance(draft, Search):
        draft.resume([score for one in done for score in one["scores"]])
    decoding = bench.settings(name, threshold)
    # Nothing of the first pass is measured.
    decode_one(bench, name, None, decoding, 0)
    began, first = time.perf_counter(), len(done)
    for number in range(first, options.prompts):
        known = len(draft.scores) if isinstance(draft, Search) else 0
        runs: dict[str, Callable[[], Any]] = {
            "plain": partial(decode_one, bench, name, None, decoding, number),
            "row": partial(decode_one, bench, name, draft, decoding, number),
        }
        if draft is None:
            runs["row"] = partial(bench.generate, bench.prompts[number])
        # In turns, and not always in the same order: a drift of the machine falls on both.
        found = {key: timed(runs[key]) for key in (list(runs) if number % 2 else list(runs)[::-1])}
        (plain_seconds, plain), (seconds, one) = found["plain"], found["row"]
        text = list(one) if draft is None else list(one.tokens)
        entry: dict[str, Any] = {
            "plain_seconds": plain_seconds,
            "seconds": seconds,
            "tokens": len(text),
            "differing": None,
            "scores": draft.scores[known:] if isinstance(draft, Search) else [],
        }
        if draft is not None:
            entry |= {key: value for key, value in asdict(one).items() if key in COUNTED}
        if name != "sampled" and text != list(plain.tokens):
            entry["differing"] = first_difference(
                model, bench.prompts[number], list(plain.tokens), text
            )
        done.append(entry)
        used = draft.draft if isinstance(draft, Search) else draft
        write(
            path,
            {
                "settings": settings,
                "skipped": vars(used.skipped) if used else {},
                "cost": used.cost if used else 1.0,
                "prompts": done,
            },
        )
        if number == first:
            left = (options.prompts - first - 1) * (time.perf_counter() - began)
            print(f"{path.stem}: about {left / 60:.1f} min for the other prompts", flush=True)


def decode_one(
    bench: Bench, name: str, draft: Any, decoding: DecodingSettings, number: int
) -> Decoded:
    """Decode one prompt; what is drawn depends on its number alone."""
    import torch

    from prunelib.speculation.decoding import decode

    generator = torch.Generator().manual_seed(number) if name == "sampled" else None
    prompt = bench.prompts[number]
    return decode(bench.model_of(name), prompt, draft, decoding, generator=generator)


def summary(content: Mapping[str, Any], rounding_seen: float) -> dict[str, Any]:
    """Return a row's figures over its prompts.

    Args:
        content: of the row's file.
        rounding_seen: the largest difference of a logit between passes of different shapes.
    """
    from prunelib.speculation.arithmetic import (
        best_draft_length,
        counted_speed_up,
        expected_speed_up,
    )

    prompts, settings = content["prompts"], content["settings"]
    median, low, high = median_interval([one["plain_seconds"] / one["seconds"] for one in prompts])
    differing = [
        one["differing"] | {"prompt": number}
        for number, one in enumerate(prompts)
        if one["differing"]
    ]
    row: dict[str, Any] = {
        "row": settings["row"],
        "threshold": settings["threshold"],
        "prompts": len(prompts),
        "minutes": sum(one["plain_seconds"] + one["seconds"] for one in prompts) / 60,
        "speed_up": median,
        "interval": [low, high],
        "differing": differing,
        "beyond": [
            one
            for one in differing
            if one["gap"] > tie_limit(max(one["rounding"], rounding_seen), one["largest"])
        ],
    }
    if settings["row"] == "generate":
        return row
    total = {key: sum(one[key] for one in prompts) for key in COUNTED}
    # The prompt's pass gives the first token of each text.
    tokens = sum(one["tokens"] for one in prompts) - len(prompts)
    row |= total | {
        "cost": content["cost"],
        "acceptance_rate": total["accepted"] / total["judged"] if total["judged"] else float("nan"),
        "tokens_per_pass": tokens / total["passes"],
        "gpu": counted_speed_up(
            tokens, total["passes"], total["draft_work"] + total["search_work"]
        ),
        "gpu_after_search": counted_speed_up(tokens, total["passes"], total["draft_work"]),
    }
    if not settings["threshold"] and total["judged"]:
        best = best_draft_length(row["acceptance_rate"], content["cost"])
        row["gpu_best"] = [
            best,
            expected_speed_up(row["acceptance_rate"], best, content["cost"]),
        ]
    return row


HEADS = (
    *("row", "threshold", "prompts", "weights read", "differing", "acceptance", "tokens/pass"),
    *("speed-up", "GPU", "GPU after the search", "GPU at the best length"),
)


def line(row: Mapping[str, Any]) -> list[str]:
    """Return a row of the table."""
    low, high = row["interval"]
    same = "drawn" if row["row"] == "sampled" else f"{len(row['differing'])}"
    begin = [row["row"], f"{row['threshold']:g}", f"{row['prompts']}"]
    speed = f"{row['speed_up']:.2f} [{low:.2f}, {high:.2f}]"
    if "cost" not in row:
        return [*begin, "1", same, "", "", speed, "", "", ""]
    best = "{1:.2f} ({0})".format(*row["gpu_best"]) if "gpu_best" in row else ""
    return [
        *begin,
        *(f"{row['cost']:.3f}", same, f"{row['acceptance_rate']:.3f}"),
        *(f"{row['tokens_per_pass']:.2f}", speed, f"{row['gpu']:.2f}"),
        *(f"{row['gpu_after_search']:.2f}" if row["searches"] else "", best),
    ]


def report(out: Path) -> int:
    """Print the table of all rows that are there; return 1 where a text differs by more than a tie.

    Raises:
        InputError: there is none.
    """
    paths = sorted(path for path in out.glob("*.json") if path.stem != "machine")
    if not paths or not (out / "machine.json").exists():
        raise InputError(f"{out}: no row is there")
    machine = json.loads((out / "machine.json").read_text(encoding="utf-8"))
    seen = machine["rounding"]["largest_difference"]
    found = [summary(json.loads(path.read_text(encoding="utf-8")), seen) for path in paths]
    found.sort(key=lambda row: (ROWS.index(row["row"]), row["threshold"]))
    print(
        f"a pass over {machine['tokens']} tokens takes {machine['pass_ratio']:.2f} times as long "
        f"as one over one; load {machine['load_average_before'][0]:.2f}"
    )
    print(
        "logits of one against several tokens: {flipped} of {positions} choices differ, logits by "
        "at most {largest_difference:.2g}; least gap of the two first {least_gap:.2g}".format(
            **machine["rounding"]
        )
    )
    print("| " + " | ".join(HEADS) + " |")
    print("|---" * len(HEADS) + "|")
    for row in found:
        print("| " + " | ".join(line(row)) + " |")
    for row in found:
        for one in row["differing"]:
            verdict = "more than rounding" if one in row["beyond"] else "a tie"
            print(
                f"{row['row']}, threshold {row['threshold']:g}: prompt {one['prompt']} parts at "
                f"token {one['place']}, logits {one['gap']:.2g} apart: {verdict}"
            )
    return int(any(row["beyond"] for row in found))


@reporting_errors("self_speculation")
def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit code is 1 where a text differs by more than rounding."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the rows' files")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing, print what is there"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--thresholds", nargs="+", type=float, default=[0.0, 0.6])
    parser.add_argument("--model", type=Path, help="checkpoint directory")
    parser.add_argument("--text", type=Path, help="directory with articles.jsonl")
    parser.add_argument("--shared", type=Path, help="FlexiGPT checkpoint; else one is made")
    parser.add_argument("--windows", nargs=2, type=int, default=[4, 64], help="of the ranking")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.7, help="of the row sampled")
    parser.add_argument("--blocks", type=int, default=4, help="blocks that a draft leaves out")
    parser.add_argument("--parts", type=int, default=8, help="the same of attentions or MLPs")
    parser.add_argument("--skip-ratio", type=float, default=0.25, help="of SWIFT's search")
    parser.add_argument("--window", type=int, default=32, help="tokens that it scores a set on")
    parser.add_argument("--rounding-tokens", type=int, default=512, help="compared in both ways")
    options = parser.parse_args(arguments)
    if not options.report:
        options.model = options.model or newest_artefact("fetch_model")
        options.text = options.text or newest_artefact("fetch_text")
        options.out.mkdir(parents=True, exist_ok=True)
        bench = Bench(options)
        if not (options.out / "machine.json").exists():
            write(options.out / "machine.json", bench.machine())
        for name in options.rows:
            # Without drafts a threshold says nothing.
            for threshold in options.thresholds[:1] if name == "generate" else options.thresholds:
                run_row(bench, name, threshold)
    return report(options.out)


if __name__ == "__main__":
    sys.exit(main())
