"""Calibration windows and the local multiple-choice tasks."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_sources import request, script

from prunelib.data.calibration import evaluation_ids, packed_windows, sample_windows, tokenise
from prunelib.data.tasks import (
    ENDING_WORDS,
    analogy_items,
    completion_items,
    continuation_items,
    sentences,
)
from prunelib.data.text import Article, write_articles
from prunelib.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def documents(*lengths: int) -> list[np.ndarray]:
    """Return documents whose tokens say where they come from: 1000 * document + position."""
    return [1000 * i + np.arange(length) for i, length in enumerate(lengths)]


# --- sampling -----------------------------------------------------------------------------------


def test_windows_are_spans_of_their_documents():
    windows, chosen, offsets = sample_windows(documents(50, 7, 200, 8), 3, 8, seed=42)
    assert windows.shape == (3, 8)
    assert windows.dtype == np.int64
    for window, document, offset in zip(windows, chosen, offsets, strict=True):
        assert window.tolist() == [1000 * document + offset + i for i in range(8)]
    # The document shorter than the window is rejected; as in the reference, none comes twice.
    assert sorted(chosen) == [0, 2, 3]


def test_sampling_is_seeded():
    texts = documents(*range(100, 140))
    first, again, other = (sample_windows(texts, 10, 16, seed) for seed in (1, 1, 2))
    assert first[0].tolist() == again[0].tolist()
    assert first[1:] == again[1:]
    assert first[1:] != other[1:]


def test_documents_and_offsets_are_uniform():
    texts = documents(10, 19, 9, 100)
    first = [sample_windows(texts, 1, 10, seed) for seed in range(3000)]
    counts = Counter(chosen[0] for _, chosen, _ in first)
    # A document is as likely as any other, whatever its length: 1000 each, sigma 26.
    assert set(counts) == {0, 1, 3}
    assert all(abs(count - 1000) < 110 for count in counts.values())
    offsets = Counter(offset[0] for _, chosen, offset in first if chosen[0] == 1)
    assert set(offsets) == set(range(10)), "both ends can be drawn"
    assert all(abs(count - counts[1] / 10) < 50 for count in offsets.values())


def test_more_windows_than_documents_start_a_new_round_without_repeats():
    _, chosen, offsets = sample_windows(documents(40, 60), 7, 10, seed=0)
    assert len(set(zip(chosen, offsets, strict=True))) == 7
    assert Counter(chosen[:6]) == {0: 3, 1: 3}
    # A document of exactly one window is left out once its only place is used.
    _, chosen, _ = sample_windows(documents(10, 100), 6, 10, seed=0)
    assert chosen.count(0) == 1


@pytest.mark.parametrize("n", [6, 100])
def test_text_too_short_is_refused_with_what_was_asked_and_what_is_there(n):
    with pytest.raises(InputError) as caught:
        sample_windows(documents(39, 25, 9), n, 10, seed=0)
    assert f"{n} windows of 10 tokens" in str(caught.value)
    assert "only 2 of its 3 articles" in str(caught.value)
    assert "5 windows" in str(caught.value)
    sample_windows(documents(39, 25, 9), 5, 10, seed=0)
    with pytest.raises(InputError, match="both must be at least 1"):
        sample_windows(documents(39), 0, 10, seed=0)


def test_packed_windows():
    packed = packed_windows(documents(7, 2, 3), 3)
    assert packed.tolist() == [[0, 1, 2], [3, 4, 5], [2000, 2001, 2002]]
    with pytest.raises(InputError, match="the longest of its 2 articles has 3"):
        packed_windows(documents(2, 3), 4)
    with pytest.raises(InputError, match="at least 1"):
        packed_windows(documents(2, 3), 0)


def bos_tokenizer():
    """Return a word tokenizer that puts BOS first, as LLaMA's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "<unk>": 1, "a": 2, "b": 3, "c": 4, "\n\n": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def test_special_tokens_stand_once_in_evaluation_and_never_in_calibration():
    articles = [Article(0, "", "a b"), Article(1, "", "c")]
    assert evaluation_ids(articles, bos_tokenizer()).tolist() == [0, 2, 3, 5, 4]
    assert [ids.tolist() for ids in tokenise(articles, bos_tokenizer())] == [[2, 3], [4]]


def test_calibration_step(tmp_path):
    from safetensors.numpy import load_file

    model, text, out = (tmp_path / name for name in ("model", "text", "out"))
    for directory in (model, text, out):
        directory.mkdir()
    bos_tokenizer().save_pretrained(model)
    rows = [(Article(10 + i, f"t{i}", "a b c " * 5), "calibration") for i in range(4)]
    write_articles(text, [*rows, (Article(99, "t", "b b b b b b"), "evaluation")])
    params = {"windows": 4, "length": 6, "seed": 5}
    step = script("calibration")
    step.main(request("calibration", params, out, text=text, model=model), out)
    windows = load_file(out / "windows.safetensors")["input_ids"]
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["n"], meta["length"], meta["seed"]) == (4, 6, 5)
    assert sorted(meta["article_ids"]) == [10, 11, 12, 13]
    document = [2, 3, 4] * 5
    for window, offset in zip(windows.tolist(), meta["offsets"], strict=True):
        assert window == document[offset : offset + 6]
    too_many = {**params, "windows": 50}
    with pytest.raises(InputError, match="50 windows of 6 tokens"):
        step.main(request("calibration", too_many, out, text=text, model=model), out)


def test_calibration_catalogue_names_known_texts():
    texts = yaml.safe_load((ROOT / "config/texts.yaml").read_text())
    for entry in yaml.safe_load((ROOT / "config/calibration.yaml").read_text()).values():
        assert texts[entry["text"]]["split"]["calibration"] > 0
        assert entry["windows"] > 0
        assert entry["length"] > 1


# --- tasks ----------------------------------------------------------------------------------------


def test_sentences():
    text = "Dr. A. Smith came in 1999. He left. “Why?” 3.5 km on, etc. And so."
    assert sentences(text) == [
        "Dr. A. Smith came in 1999.",
        "He left.",
        "“Why?” 3.5 km on, etc. And so.",
    ]


def prose(n_articles: int, n_sentences: int) -> list[Article]:
    def sentence(article: int, number: int) -> str:
        middle = " ".join(f"word{article}x{number}" for _ in range(12))
        return f"Sentence {middle} ends."

    return [
        Article(a, f"t{a}", " ".join(sentence(a, s) for s in range(n_sentences)))
        for a in range(n_articles)
    ]


def test_continuation_items_are_true_distinct_balanced_and_reproducible():
    articles = prose(3, 20)
    items = continuation_items(articles, 40, seed=1)
    assert Counter(item["label"] for item in items) == {0: 10, 1: 10, 2: 10, 3: 10}
    for item in items:
        true = item["endings"][item["label"]]
        home = [a.text for a in articles if f"{item['context']} {true}" in a.text]
        assert len(home) == 1, "the true ending follows the context in its article"
        assert len(set(item["endings"])) == 4
        for ending in item["endings"]:
            assert ENDING_WORDS[0] <= len(ending.split()) <= ENDING_WORDS[1]
            assert ending not in item["context"]
            assert ending in home[0]
            assert (f"{item['context']} {ending}" in home[0]) == (ending == true)
    assert len({item["context"] for item in items}) == 40
    assert len({item["endings"][item["label"]] for item in items}) == 40
    assert continuation_items(articles, 40, seed=1) == items
    assert continuation_items(articles, 40, seed=2) != items


@pytest.mark.parametrize("n", [0, 55])
def test_continuation_refuses_more_than_the_text_has(n):
    # 3 articles of 20 sentences of 14 words: 18 have at least 20 words before them.
    assert len(continuation_items(prose(3, 20), 54, seed=0)) == 54
    with pytest.raises(InputError, match=f"{n} items were asked for; .* yield 54"):
        continuation_items(prose(3, 20), n, seed=0)


def analogies(**sizes: int) -> list[dict[str, str]]:
    return [
        {"category": c, "a": f"{c}a", "b": f"{c}b", "c": f"{c}c{i}", "d": f"{c}d{i}"}
        for c, size in sizes.items()
        for i in range(size)
    ]


def test_analogy_items_are_balanced_over_categories_and_labels():
    rows = analogies(x=30, y=8, z=5)
    answers = {(row["a"], row["b"], row["c"]): row for row in rows}
    items = analogy_items(rows, 24, seed=7)
    assert Counter(item["label"] for item in items) == {0: 6, 1: 6, 2: 6, 3: 6}
    categories = Counter()
    for item in items:
        a, _, _, b, _, c, _, _ = item["question"].split()
        row = answers[(a, b, c)]
        categories[row["category"]] += 1
        assert item["choices"][item["label"]] == row["d"]
        assert len(set(item["choices"])) == 4
        assert all(choice.startswith(f"{row['category']}d") for choice in item["choices"])
    # In turn: five each, then z is used up, then y.
    assert categories == {"x": 11, "y": 8, "z": 5}
    assert len({item["question"] for item in items}) == 24
    assert analogy_items(rows, 24, seed=7) == items
    assert analogy_items(rows, 24, seed=8) != items


def test_analogy_distractors_are_never_in_the_question():
    rows = [
        {"category": "k", "a": "p", "b": d, "c": "q", "d": e}
        for d, e in [("u", "v"), ("v", "w"), ("w", "x"), ("x", "y"), ("y", "u"), ("u", "y")]
    ]
    for item in analogy_items(rows, 6, seed=0):
        assert item["question"].split()[3] not in item["choices"]


def test_analogies_refuse_what_cannot_be_built():
    with pytest.raises(InputError, match="9 items were asked for; the file holds 8"):
        analogy_items(analogies(x=8), 9, seed=0)
    with pytest.raises(InputError, match="category 'x' has too few"):
        analogy_items(analogies(x=3), 1, seed=0)


def test_completions_are_the_halves_of_a_sentence_and_what_came_before():
    articles = prose(3, 20)
    items = completion_items(articles, 12, seed=0)
    assert items == completion_items(articles, 12, seed=0) != completion_items(articles, 12, seed=1)
    assert len({item["prompt"] for item in items}) == 12
    for item in items:
        whole = f"{item['prompt']} {item['reference']}"
        assert sum(whole in article.text for article in articles) == 1
        sentence = sentences(whole)[-1]
        assert sentence.endswith(f" {item['reference']}")
        words = len(sentence.split())
        assert 12 <= words <= 24
        assert len(item["reference"].split()) == words - words // 2
    with pytest.raises(InputError, match="999 items were asked for; the evaluation articles yield"):
        completion_items(articles, 999, seed=0)


def make_task_data(tmp_path: Path) -> Path:
    from prunelib.data.analogies import write_analogies

    text, words, out = (tmp_path / name for name in ("text", "words", "out"))
    for directory in (text, words, out):
        directory.mkdir()
    write_articles(text, [(article, "evaluation") for article in prose(3, 20)])
    write_analogies(words, analogies(x=8, y=8))
    params = {"continuation": 12, "analogies": 8, "completion": 5, "seed": 0}
    script("tasks_data").main(request("tasks_data", params, out, text=text, analogies=words), out)
    return out


@pytest.mark.parametrize(
    ("task", "file", "keys", "n"),
    [
        ("local_continuation", "continuation", ("context", "endings"), 12),
        ("local_analogies", "analogies", ("question", "choices"), 8),
    ],
)
def test_task_files_are_read_by_lm_eval(tmp_path, monkeypatch, task, file, keys, n):
    """lm-eval's own documents, prompts, choices and targets are those of the data step."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.api.task import ConfigurableTask

    data = make_task_data(tmp_path) / f"{file}.jsonl"
    config = yaml.safe_load((ROOT / "config/tasks" / f"{task}.yaml").read_text())
    config["dataset_kwargs"]["data_files"] = {"test": str(data)}
    built = ConfigurableTask(config=config)
    documents = list(built.test_docs())
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert len(documents) == len(rows) == n
    for document, row in zip(documents, rows, strict=True):
        assert built.doc_to_text(document) == row[keys[0]]
        assert built.doc_to_choice(document) == row[keys[1]]
        assert built.doc_to_target(document) == row["label"]
    built.build_all_requests(rank=0, world_size=1)
    context, choice = built.instances[0].arguments
    assert context == rows[0][keys[0]]
    assert choice == f" {rows[0][keys[1]][0]}"
    scores = built.process_results(
        documents[0], [(-float(i != rows[0]["label"]), False) for i in range(4)]
    )
    assert scores["acc"] == 1.0
    assert set(scores) >= {"acc", "acc_norm"}


def test_completions_are_read_by_lm_eval(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.api.task import ConfigurableTask

    data = make_task_data(tmp_path) / "completion.jsonl"
    config = yaml.safe_load((ROOT / "config/tasks/local_completion.yaml").read_text())
    config["dataset_kwargs"]["data_files"] = {"test": str(data)}
    built = ConfigurableTask(config=config)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    documents = list(built.test_docs())
    assert len(documents) == len(rows) == 5
    for document, row in zip(documents, rows, strict=True):
        assert built.doc_to_text(document) == row["prompt"]
        assert built.doc_to_target(document) == row["reference"]
