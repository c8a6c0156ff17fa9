from __future__ import annotations

import json
import math
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prunelib.errors import InputError, NonFiniteError
from prunelib.evaluation.harness import evaluate_tasks
from prunelib.evaluation.tasks import TaskSpec, read_definition

REPOSITORY = Path(__file__).resolve().parents[1]
WORDS = ["<s>", "a", "bb", "ccc", "dd", "e", "ff", "ggg", "h"]
ITEMS = [
    {"context": "a bb ccc", "endings": ["dd", "e ff", "ggg h a", "h"], "label": 1},
    {"context": "h ggg", "endings": ["a", "bb ccc", "ff e", "dd dd dd"], "label": 0},
    {"context": "e", "endings": ["ccc ccc", "a", "h h", "ggg"], "label": 3},
]


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<s>", pad_token="<s>", unk_token="<s>"
    )


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def local(tmp_path: Path) -> TaskSpec:
    definition = read_definition(REPOSITORY / "config" / "tasks" / "local_continuation.yaml")
    path = tmp_path / "continuation.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS), encoding="utf-8")
    return TaskSpec("local_continuation", definition, path)


def by_hand(model: Any) -> dict[str, list[int]]:
    """Right or wrong per item: sums of fp64 log-probabilities, one choice at a time."""
    model = model.double()
    right: dict[str, list[int]] = {"acc": [], "acc_norm": []}
    for item in ITEMS:
        context = [WORDS.index(word) for word in item["context"].split()]
        scores = []
        for ending in item["endings"]:
            tokens = [WORDS.index(word) for word in ending.split()]
            with torch.no_grad():
                logits = model(torch.tensor([context + tokens])).logits[0]
            log_p = logits.log_softmax(-1)
            scores.append(
                sum(float(log_p[len(context) + i - 1, token]) for i, token in enumerate(tokens))
            )
        lengths = [len(ending) for ending in item["endings"]]
        normed = [score / length for score, length in zip(scores, lengths, strict=True)]
        right["acc"].append(int(scores.index(max(scores)) == item["label"]))
        right["acc_norm"].append(int(normed.index(max(normed)) == item["label"]))
    return right


def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a local task tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_local_task_equals_a_hand_computation_offline(
    local: TaskSpec, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_network(monkeypatch)
    result = evaluate_tasks(llama(), tokenizer(), [local], batch_size=3)["local_continuation"]
    expected = by_hand(llama())
    assert 0 < sum(expected["acc"] + expected["acc_norm"]) < 6  # the answers differ by item
    for metric in ("acc", "acc_norm"):
        items = expected[metric]
        assert result["items"][metric] == items
        mean = sum(items) / 3
        assert result[metric] == pytest.approx(mean)
        # Standard error of a mean: sample deviation over the root of n.
        error = math.sqrt(sum((x - mean) ** 2 for x in items) / 2 / 3)
        assert result[f"{metric}_stderr"] == pytest.approx(error)
    assert result["n"] == 3
    assert result["items"]["doc_id"] == [0, 1, 2]
    assert capsys.readouterr().out == ""


GENERATION = [
    {"prompt": "a bb ccc", "reference": "ff ggg h"},
    {"prompt": "h ggg", "reference": "e e dd"},
    {"prompt": "e", "reference": "bb"},
]


def chrf(text: str, reference: str) -> float:
    """Popovic 2015: F with beta 2 of character n-grams up to 6, over the orders that both have."""
    shares = []
    texts = [part.replace(" ", "") for part in (text, reference)]
    for n in range(1, 7):
        ours, theirs = (
            Counter(part[i : i + n] for i in range(len(part) - n + 1)) for part in texts
        )
        if ours and theirs:
            common = sum((ours & theirs).values())
            shares.append((common / sum(ours.values()), common / sum(theirs.values())))
    precision, recall = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    return 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


def test_generation_equals_greedy_decoding_and_chrf_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_network(monkeypatch)
    definition = read_definition(REPOSITORY / "config" / "tasks" / "local_completion.yaml")
    definition["generation_kwargs"]["max_gen_toks"] = 5
    path = tmp_path / "completion.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in GENERATION), encoding="utf-8")
    spec = TaskSpec("local_completion", definition, path)
    result = evaluate_tasks(llama(), tokenizer(), [spec], batch_size=2)["local_completion"]
    texts, scores = [], []
    model = llama().double()
    for item in GENERATION:
        tokens = [WORDS.index(word) for word in item["prompt"].split()]
        start = len(tokens)
        for _ in range(5):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == 0:  # <s> ends a text, too
                break
        texts.append(" ".join(WORDS[token] for token in tokens[start:] if token))
        scores.append(chrf(texts[-1], item["reference"]))
    assert [text.strip() for text in result["items"]["text"]] == texts
    assert 0 < max(scores) < 1
    assert len(set(scores)) > 1
    assert result["items"]["chrf"] == pytest.approx(scores)
    mean = sum(scores) / 3
    assert result["chrf"] == pytest.approx(mean)
    error = math.sqrt(sum((x - mean) ** 2 for x in scores) / 2 / 3)
    assert result["chrf_stderr"] == pytest.approx(error)
    assert result["exact_match"] is None
    assert "acc" not in result


def test_exact_match_takes_the_first_way_of_cutting_answers(tmp_path: Path) -> None:
    definition = read_definition(REPOSITORY / "config" / "tasks" / "local_completion.yaml")
    definition["generation_kwargs"]["max_gen_toks"] = 1
    definition["metric_list"] = [{"metric": "exact_match", "aggregation": "mean"}]
    cut = [{"function": "regex", "regex_pattern": pattern} for pattern in ("(.*)", "(nothing)")]
    definition["filter_list"] = [
        {"name": name, "filter": [way, {"function": "take_first"}]}
        for name, way in zip(("whole", "none"), cut, strict=True)
    ]
    model = llama().double()
    items = []
    for item in GENERATION:
        tokens = [WORDS.index(word) for word in item["prompt"].split()]
        with torch.no_grad():
            best = WORDS[int(model(torch.tensor([tokens])).logits[0, -1].argmax())]
        items.append({"prompt": item["prompt"], "reference": best})
    items[1]["reference"] += "x"
    path = tmp_path / "completion.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    spec = TaskSpec("local_completion", definition, path)
    result = evaluate_tasks(llama(), tokenizer(), [spec])["local_completion"]
    assert result["items"]["exact_match"] == [1, 0, 1]
    assert result["exact_match"] == pytest.approx(2 / 3)
    assert result["chrf"] is None


def test_limit_takes_the_first_documents_and_changes_the_fingerprint(local: TaskSpec) -> None:
    def run(limit: int | None) -> dict[str, Any]:
        return evaluate_tasks(llama(), tokenizer(), [local], limit=limit)["local_continuation"]

    whole, first = run(None), run(1)
    assert first["items"]["acc"] == whole["items"]["acc"][:1]
    assert first["acc_stderr"] is None  # one document has no spread
    assert whole["documents_sha256"] == run(None)["documents_sha256"]
    assert whole["documents_sha256"] != first["documents_sha256"]


def test_changed_documents_are_read_again(local: TaskSpec) -> None:
    before = evaluate_tasks(llama(), tokenizer(), [local])["local_continuation"]
    assert local.documents is not None
    flipped = [item | {"label": (int(str(item["label"])) + 1) % 4} for item in ITEMS]
    text = "".join(json.dumps(item) + "\n" for item in flipped)
    local.documents.write_text(text, encoding="utf-8")
    after = evaluate_tasks(llama(), tokenizer(), [local])["local_continuation"]
    assert after["documents_sha256"] != before["documents_sha256"]


def test_bf16_weights_answer_as_fp32_does(local: TaskSpec) -> None:
    model = llama().to(torch.bfloat16)
    half = evaluate_tasks(model, tokenizer(), [local])
    assert half == evaluate_tasks(model.float(), tokenizer(), [local])


def test_non_finite_likelihoods_are_an_error(local: TaskSpec) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="local_continuation, document 0"):
        evaluate_tasks(model, tokenizer(), [local])


def test_bad_tasks_are_refused(local: TaskSpec, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="each once"):
        evaluate_tasks(llama(), tokenizer(), [local, local])
    with pytest.raises(InputError, match="at least 1"):
        evaluate_tasks(llama(), tokenizer(), [local], limit=0)
    missing = TaskSpec(local.name, local.definition, tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match=r"missing\.jsonl does not exist"):
        evaluate_tasks(llama(), tokenizer(), [missing])
    with pytest.raises(InputError, match="neither local nor known"):
        evaluate_tasks(llama(), tokenizer(), [TaskSpec("no_such_task")])
    with pytest.raises(InputError, match="needs both"):
        TaskSpec("half", local.definition)
    with pytest.raises(InputError, match="its definition says"):
        TaskSpec("other", local.definition, local.documents)


def test_a_definition_cannot_carry_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("task: evil\nprocess_docs: !function os.system\n", encoding="utf-8")
    with pytest.raises(InputError, match="not a plain YAML file"):
        read_definition(path)


def test_perplexity_and_tasks_steps_write_metrics(local: TaskSpec, tmp_path: Path) -> None:
    from prunelib.provenance.step import StepRequest
    from workflow_scripts import perplexity, tasks

    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text"
    text.mkdir()
    articles = [("calibration", "a a a a"), ("evaluation", "a bb ccc dd"), ("evaluation", "e ff h")]
    rows = [
        {"id": i, "title": "", "text": words, "split": split}
        for i, (split, words) in enumerate(articles)
    ]
    (text / "articles.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (text / "meta.json").write_text('{"source": "dir:here"}', encoding="utf-8")
    common = {"device": "cpu", "dtype": "float32", "threads": 1}
    inputs = {"checkpoint": tmp_path / "model", "text": text, "tasks_data": tmp_path}

    def run(module: Any, params: dict[str, Any]) -> dict[str, Any]:
        request = StepRequest("step", "key", common | params, inputs, tmp_path, (), ())
        module.main(request, tmp_path)
        metrics: dict[str, Any] = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
        return metrics

    figures = run(perplexity, {"window": 3, "windows": None, "batch_tokens": None})
    # Seven tokens, the calibration article left out: two windows of two targets.
    assert (figures["windows"], figures["targets"]) == (2, 4)
    with torch.no_grad():
        logits = llama().double()(torch.tensor([[1, 2, 3], [4, 5, 6]])).logits.log_softmax(-1)
    nll = -sum(float(logits[w, i, t]) for w, i, t in ((0, 0, 2), (0, 1, 3), (1, 0, 5), (1, 1, 6)))
    assert figures["perplexity"] == pytest.approx(math.exp(nll / 4), rel=1e-6)
    assert figures["convention"]["dataset"] == "dir:here"
    assert figures["convention"]["bos"] == "none"

    assert local.documents is not None
    params = {
        "tasks": [local.name],
        "definitions": {local.name: local.definition},
        "limit": 2,
        "batch_size": 4,
        "seed": 0,
    }
    result = run(tasks, params)
    assert result["lm_eval"]
    expected = by_hand(llama())
    assert result["tasks"][local.name]["items"]["acc"] == expected["acc"][:2]
