"""Streamed text: windows without gaps, places to go on from, steps, refusals."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer
from test_recovery import RECIPE, _pruned, _request, losses, read, run, tiny

from prunelib.data import stream
from prunelib.data.sources import parse_source
from prunelib.errors import InputError, IntegrityError
from prunelib.recovery import data as data_module
from prunelib.recovery.data import StreamedWindows
from prunelib.recovery.recipe import parse_recipe, total_steps

STREAM = replace(RECIPE, tokens=280, schedule="cosine", warmup_steps=1)


def documents(count: int = 30) -> list[str]:
    return [f"{n}: {'ab c' * (n % 7)}.\nEnd of {n}" for n in range(count)]


def write(kind: str, directory: Path, texts: list[str]) -> dict:
    """Write the texts as a source of one kind; return its catalogue entry."""
    directory.mkdir(parents=True, exist_ok=True)
    third = math.ceil(len(texts) / 3)
    parts = [texts[start : start + third] for start in range(0, len(texts), third)]
    if kind == "file":
        rows = "".join(json.dumps({"body": text}) + "\n\n" for text in texts)
        (directory / "all.jsonl").write_text(rows)
        return {"source": f"dir:{directory}/all.jsonl", "format": "jsonl", "text_field": "body"}
    if kind == "plain":
        for number, text in enumerate(texts):
            (directory / f"{number:03}.txt").write_text(text)
        return {"source": f"dir:{directory}", "format": "plain"}
    for number, part in enumerate(parts):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (directory / f"train-{number}.jsonl").write_text(rows)
    return {"source": f"dir:{directory}", "format": "jsonl" if kind == "files" else "dataset"}


def opened(entry: dict, length: int = 12, least: int = 0) -> StreamedWindows:
    source = parse_source(entry["source"])
    description = stream.describe(source, Path(source.name), entry)
    found = StreamedWindows(
        stream.open_documents(description), tiny_tokenizer(), length, least, description
    )
    found.check(length, 97)
    return found


def expected(texts: list[str], windows: int, length: int = 12) -> torch.Tensor:
    """The documents, each closed with EOS, over and over."""
    tokenizer = tiny_tokenizer()
    once = [token for text in texts for token in [*tokenizer(text)["input_ids"], 1]]
    flat = list(itertools.islice(itertools.cycle(once), windows * length))
    return torch.tensor(flat).view(windows, length)


@pytest.mark.parametrize("kind", ["file", "files", "plain", "dataset"])
def test_windows_have_no_gaps_and_every_place_can_be_gone_on_from(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "_CHUNK", 4)
    monkeypatch.setattr(stream, "_PLAIN_BYTES", 8)
    texts = documents(13)
    entry = write(kind, tmp_path / "text", texts)
    windows = opened(entry)
    seen, places = [], []
    # 13 documents are about 30 windows: the stream is read more than twice.
    for step in range(20):
        places.append((json.dumps(windows.place), windows.waiting.clone()))
        seen.append(windows.pick(step, RECIPE, 0))
        (batch, _) = windows.batches(seen[-1], 2)
        assert (batch.tokens, batch.targets, batch.mask) == (24, 22, None)
    assert torch.equal(torch.cat(seen), expected(texts, 80))
    assert windows.record()["stream_passes"] >= 2
    for step, (place, waiting) in enumerate(places):
        again = opened(entry)
        again.seek(json.loads(place), waiting)
        rest = [again.pick(later, RECIPE, 0) for later in range(step, 20)]
        assert torch.equal(torch.cat(rest), torch.cat(seen[step:])), step
        assert again.record() == windows.record()


def test_short_documents_are_left_out(tmp_path):
    entry = write("files", tmp_path, ["long enough", "", "short", "long enough, too"])
    found = opened(entry, least=6).pick(0, RECIPE, 0)
    assert torch.equal(found, expected(["long enough", "long enough, too"], 4))


def test_no_more_is_read_than_a_step_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "_CHUNK", 2)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 30}) + "\n" * 5)
    good = path.read_text() * 4
    path.write_text(good + "what follows is not JSON\n")
    windows = opened({"source": f"dir:{path}", "format": "jsonl"}, length=12)
    # 4 windows are 48 tokens, the first two documents 62; two more are read for the second step.
    windows.pick(0, RECIPE, 0)
    windows.pick(1, RECIPE, 0)
    with pytest.raises(InputError, match=rf"a.jsonl, byte {len(good)}: not a JSON object"):
        windows.pick(2, RECIPE, 0)


def test_training_on_a_stream_is_training_on_its_windows(tmp_path):
    texts = documents()
    entry = write("file", tmp_path / "text", texts)
    result = run(tmp_path / "stream", STREAM, windows=opened(entry), model=tiny(vocab_size=97))
    # 280 tokens are 6 steps of 4 windows; one window a time, in this order, without shuffling.
    assert (result.steps, result.tokens, result.useful_share) == (6, 288, 1.0)
    order = expected(texts, 24)

    class Ordered(data_module.PackedWindows):
        def pick(self, step, recipe, seed):
            return torch.arange(4 * step, 4 * step + 4)

    run(tmp_path / "held", STREAM, windows=Ordered(order), model=tiny(vocab_size=97))
    assert losses(tmp_path / "stream") == losses(tmp_path / "held")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert read(tmp_path / "stream")[name] == read(tmp_path / "held")[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e | {"format": "wikipedia"}, "'wikipedia' cannot be streamed"),
        (lambda e: e | {"text_field": "content"}, "byte 0: 'content' is missing or no string"),
        (lambda e: e | {"source": e["source"].replace("all.jsonl", "none")}, r"no \*.jsonl file"),
        (lambda e: e | {"min": 10**6}, "no document has min_characters = 1000000"),
    ],
)
def test_streams_refused(change, message, tmp_path):
    (tmp_path / "none").mkdir()
    entry = change(write("file", tmp_path, documents(3)))
    with pytest.raises(InputError, match=message):
        opened(entry, least=entry.pop("min", 0)).pick(0, RECIPE, 0)


def test_a_stream_needs_an_end_and_a_closing_token(tmp_path):
    with pytest.raises(InputError, match="neither tokens nor max_steps is given"):
        total_steps(None, RECIPE)
    assert total_steps(None, replace(RECIPE, max_steps=7)) == 7
    assert total_steps(None, replace(RECIPE, tokens=10**9)) == math.ceil(10**9 / 48)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        StreamedWindows(stream.FileDocuments([], None), tokenizer, 12)


def test_fetch_and_recover_steps(tiny_checkpoint, tmp_path):
    from workflow_scripts import fetch_text
    from workflow_scripts import recover as recover_step

    entry = write("dataset", tmp_path / "hub", documents())
    params = entry | {"name": "big", "stream": True, "licence": "CC0-1.0"}
    text = tmp_path / "text"
    text.mkdir()
    fetch_text.main(_request("fetch_text", text, params), text)
    assert sorted(path.name for path in text.iterdir()) == ["meta.json", "stream.json"]
    checkpoint = _pruned(tiny_checkpoint("llama-tied"), tmp_path / "pruned")
    recipe = {"tokens": 500, "warmup_steps": 0, "batch": 4, "length": 16, "schedule": "cosine"}
    params = {"recipe": recipe, "seed": 0, "device": "cpu", "dtype": "float32", "threads": 1}
    out = tmp_path / "recover"
    inputs = {"checkpoint": checkpoint, "text": text}
    recover_step.main(_request("recover", out, params, **inputs), out)
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["steps"], meta["tokens"], meta["useful_share"]) == (8, 512, 1.0)
    assert meta["stream"]["files"] == ["train-0.jsonl", "train-1.jsonl", "train-2.jsonl"]
    # All documents go to the tokenizer at once.
    assert (meta["stream_documents"], meta["stream_passes"]) == (30, 1)
    assert len(meta["windows_sha256_chain"]) == 64
    with (tmp_path / "hub" / "train-1.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(IntegrityError, match=r"train-1.jsonl has \d+ bytes; it had"):
        recover_step.main(_request("recover", out, params, **inputs), out)


def test_an_unpinned_stream_is_not_opened(tmp_path):
    from workflow_scripts import fetch_text

    params = {"name": "s", "source": "hf:org/data@unpinned", "format": "dataset", "stream": True}
    with pytest.raises(InputError, match="the revision is not pinned"):
        fetch_text.main(_request("fetch_text", tmp_path, params), tmp_path)


def test_recipe_of_the_catalogue_reads_a_billion_tokens():
    import yaml

    catalogue = yaml.safe_load((Path(__file__).parents[1] / "config/recovery.yaml").read_text())
    recipe = parse_recipe(catalogue["flexigpt_1b"]["recipe"])
    steps = total_steps(None, recipe)
    assert (steps - 1) * 480 * 2048 < 10**9 <= steps * 480 * 2048
