"""Instruction data and recovery on it: prompts, padding, the best adapter, interruption."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_config, tiny_tokenizer
from safetensors.torch import load_file
from test_recovery import FILES, _pruned, _request, losses, read, tiny
from test_sources import request, script
from torch.nn import functional as F

from prunelib.data.instructions import (
    PARTS,
    Instruction,
    encode,
    load_records,
    prompt,
    read_records,
    split_records,
    write_records,
)
from prunelib.errors import InputError, IntegrityError, NonFiniteError
from prunelib.families import family_of
from prunelib.recovery import adapters, lora
from prunelib.recovery.data import IGNORED, Examples
from prunelib.recovery.lora import recover
from prunelib.recovery.recipe import LoraRecipe, batch_indices, parse_recipe

# Written out once more, as Stanford Alpaca prints them.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n"
    "\n"
    "### Instruction:\nAdd.\n"
    "\n"
    "### Input:\n1, 2\n"
    "\n"
    "### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n"
    "\n"
    "### Instruction:\nAdd.\n"
    "\n"
    "### Response:\n"
)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = {
    "opt": (["q_proj", "k_proj", "v_proj", "out_proj"], ["fc1", "fc2"]),
    "bloom": (["query_key_value", "dense"], ["dense_h_to_4h", "dense_4h_to_h"]),
    "glm": (LINEARS[:4], ["gate_up_proj", "down_proj"]),
}
RECIPE = LoraRecipe(
    r=4,
    alpha=8,
    lr=0.05,
    batch=6,
    micro_batch=3,
    epochs=4,
    warmup_steps=1,
    length=14,
    save_every=3,
    eval_every=2,
)


def records(n: int) -> list[Instruction]:
    return [Instruction(i, f"Say {i}.", "" if i % 2 else f"in {i}", f"{i}!") for i in range(n)]


# --- records


def test_prompts_by_hand():
    assert prompt("Add.", "1, 2") == WITH_INPUT
    assert prompt("Add.") == WITHOUT_INPUT


def test_records_are_read_as_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"instruction": "a", "input": "b", "output": "c", "more": 1},
        {"instruction": "d", "input": None, "output": ""},
    ]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    assert list(read_records(path)) == [Instruction(0, "a", "b", "c"), Instruction(1, "d", "", "")]
    # LaMini's records have no input and call the output otherwise.
    path.write_text('{"instruction": "a", "response": "c", "instruction_source": "x"}\n')
    assert list(read_records(path, "response")) == [Instruction(0, "a", "", "c")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not a JSON object"),
        ("[1]", "record 2: 'instruction' is missing or no string"),
        ('{"instruction": "a"}', "record 2: 'output' is missing or no string"),
        ('{"instruction": "a", "output": 1}', "record 2: 'output' is missing or no string"),
        ('{"instruction": "a", "input": [1], "output": "b"}', "record 2: 'input' is no string"),
    ],
)
def test_bad_records_are_named(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n' + line + "\n")
    with pytest.raises(InputError, match=message) as caught:
        list(read_records(path))
    assert str(path) in str(caught.value)


def parts(pairs) -> dict[str, set[str]]:
    return {p: {r.instruction for r, part in pairs if part == p} for p in PARTS}


@pytest.mark.parametrize(("validation", "count"), [(20, 20), (0.2, 20), (0.29, 29), (1, 1)])
def test_split_has_the_number_asked_for(validation, count):
    found = parts(split_records(records(100), validation, 0, "x"))
    assert len(found["validation"]) == count
    assert len(found["recovery"]) == 100 - count
    assert not found["validation"] & found["recovery"]


def test_split_depends_on_seed_and_content_alone():
    found = parts(split_records(records(100), 20, 0, "x"))
    shuffled = records(100)
    random.Random(1).shuffle(shuffled)
    assert parts(split_records(shuffled, 20, 0, "x")) == found
    assert parts(split_records(records(100), 20, 1, "x")) != found
    doubled = [*records(100), *(replace(record, id=record.id + 100) for record in records(100))]
    pairs = split_records(doubled, 20, 0, "x")
    assert len(pairs) == 100
    assert parts(pairs) == found


@pytest.mark.parametrize("validation", [0, -1, 10, 11, 1.5, 0.05])
def test_a_split_without_both_parts_is_refused(validation):
    with pytest.raises(InputError, match=f"here: {validation} of 10 different records"):
        split_records(records(10), validation, 0, "here")


def test_artefact_round_trip(tmp_path):
    pairs = [(Instruction(0, "Ä", "a\u2028b", "c\n"), "recovery"), (records(2)[1], "validation")]
    assert write_records(tmp_path, pairs) == {"records": {"recovery": 1, "validation": 1}}
    assert [load_records(tmp_path, part) for part in PARTS] == [[pairs[0][0]], [pairs[1][0]]]
    with pytest.raises(InputError, match="allowed: recovery, validation"):
        load_records(tmp_path, "evaluation")
    write_records(tmp_path, pairs[:1])
    with pytest.raises(InputError, match="no record in the part 'validation'"):
        load_records(tmp_path, "validation")
    for broken in ("{", "[]", '{"id": 1}', '{"id": 1, "split": "validation"}'):
        (tmp_path / "instructions.jsonl").write_text(broken + "\n")
        with pytest.raises(IntegrityError):
            load_records(tmp_path, "validation")


def test_fetch_text_step(tmp_path):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    out.mkdir()
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}!"} for i in range(10)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = {"name": "mine", "source": f"dir:{source}", "format": "alpaca", "validation": 3}
    params |= {"seed": 3, "licence": "CC0"}
    step = script("fetch_text")
    step.main(request("fetch_text", params, out), out)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["records"] == {"recovery": 7, "validation": 3}
    assert meta["licence"] == "CC0"
    assert sorted(p.name for p in out.iterdir()) == ["instructions.jsonl", "meta.json"]
    found = [r.output for part in PARTS for r in load_records(out, part)]
    assert sorted(found) == [f"{i}!" for i in range(10)]
    for changes, message in (
        ({"validation": None}, "text mine: validation is None"),
        ({"validation": True}, "text mine: validation is True"),
        ({"validation": 10}, "text mine: validation: 10 of 10 different records"),
        ({"source": "dir:/nowhere"}, "does not exist"),
        ({"source": "hf:a/b@unpinned"}, "make pin"),
        ({"output_field": "response"}, "record 1: 'response' is missing"),
    ):
        with pytest.raises(InputError, match=message):
            step.main(request("fetch_text", params | changes, out), out)


def test_fetch_text_step_on_a_dataset(tmp_path, monkeypatch):
    """A hub dataset's rows: the library's own reader on a directory in the hub's layout."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "data").mkdir()
    rows = [{"instruction": f"Say {i}.", "response": f"{i}!"} for i in range(10)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "train.jsonl").write_text(text)
    step, asked = script("fetch_text"), []

    def load_rows(name, **place):
        import datasets

        asked.append((name, place))
        return datasets.load_dataset(str(tmp_path / "data"), split=place["split"])

    monkeypatch.setattr(step, "load_rows", load_rows)
    commit = "0123456789" * 4
    params = {"name": "mine", "source": f"hf:a/b@{commit}", "format": "alpaca", "validation": 0.3}
    params |= {"seed": 3, "output_field": "response"}
    step.main(request("fetch_text", params, tmp_path), tmp_path)
    assert asked == [("a/b", {"revision": commit, "config": None, "split": "train"})]
    assert len(load_records(tmp_path, "validation")) == 3
    with pytest.raises(InputError, match="a hub text has the format 'dataset', not 'plain'"):
        step.main(
            request(
                "fetch_text", params | {"format": "plain", "split": {"evaluation": 1}}, tmp_path
            ),
            tmp_path,
        )


# --- tokens


def ids(text: str) -> list[int]:
    """The tiny tokenizer by hand: newline is 2, the printable characters follow from 3."""
    return [2 if character == "\n" else ord(character) - 29 for character in text]


def test_encoding_by_hand():
    short, long = Instruction(0, "Add.", "1, 2", "3"), Instruction(1, "Add.", "", "x" * 99)
    unanswered = Instruction(2, "Add " * 60, "", "4")
    empty = Instruction(3, "Add.", "", "")
    size = len(WITH_INPUT)
    encoded = encode([short, long, unanswered, empty], tiny_tokenizer(), size + 10)
    rows = [
        ids(WITH_INPUT) + ids("3") + [1],
        # Cut off: no end of sequence, for there was none.
        (ids(WITHOUT_INPUT) + ids("x" * 99))[: size + 10],
        [*ids(WITHOUT_INPUT), 1],
    ]
    assert encoded.tokens.tolist() == [token for row in rows for token in row]
    assert np.diff(encoded.starts).tolist() == [len(row) for row in rows]
    assert encoded.prompts.tolist() == [size, len(WITHOUT_INPUT), len(WITHOUT_INPUT)]
    assert encoded.dropped == 1
    with pytest.raises(InputError, match=f"none of 1 prompts is shorter than {size} tokens"):
        encode([short], tiny_tokenizer(), size)
    # One token more has room for the answer alone.
    assert encode([short], tiny_tokenizer(), size + 1).tokens.tolist() == rows[0][:-1]


@pytest.mark.parametrize("closing", [False, True])
def test_the_tokenizer_s_own_specials_stay(closing):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "|"
    template = "<s> $A |" if closing else "<s> $A"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("|", ids("|")[0])]
    )
    encoded = encode([Instruction(0, "Add.", "", "3")], tokenizer, 300)
    assert encoded.tokens.tolist() == [1, *ids(WITHOUT_INPUT), *ids("3|")]
    assert encoded.prompts.tolist() == [1 + len(WITHOUT_INPUT)]


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        encode(records(1), tokenizer, 300)


# --- batches


def examples(n: int, seed: int = 5, longest: int = 14, padding: int = 0) -> Examples:
    """Random examples of 4 to ``longest`` tokens with 1 to 3 masked ones."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, longest + 1, (n,), generator=generator)
    return Examples(
        tokens=torch.randint(0, 67, (int(lengths.sum()),), generator=generator),
        starts=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        prompts=torch.randint(1, 4, (n,), generator=generator),
        padding=padding,
    )


def unpadded(data: Examples) -> list[tuple[torch.Tensor, int]]:
    starts = data.starts.tolist()
    return [
        (data.tokens[starts[i] : starts[i + 1]], int(data.prompts[i])) for i in range(len(data))
    ]


def test_batches_by_hand():
    data = Examples(torch.arange(10, 18), torch.tensor([0, 3, 8]), torch.tensor([1, 3]), padding=9)
    (batch,) = data.batches(torch.tensor([1, 0]), 2)
    assert batch.ids.tolist() == [[13, 14, 15, 16, 17], [10, 11, 12, 9, 9]]
    none = IGNORED
    assert batch.labels.tolist() == [[none, none, none, 16, 17], [none, 11, 12, none, none]]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert (batch.tokens, batch.targets) == (8, 4)
    hidden = torch.arange(10.0).reshape(2, 5, 1)
    states, targets = batch.predictions(hidden)
    assert states.flatten().tolist() == [2, 3, 5, 6]
    assert targets.tolist() == [16, 17, 11, 12]
    first, second = data.batches(torch.tensor([1, 0]), 1)
    assert first.mask is second.mask is None
    assert second.ids.tolist() == [[10, 11, 12]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": torch.tensor([3, 3])}, "needs a target"),
        ({"starts": torch.tensor([0, 1, 8]), "prompts": torch.tensor([0, 3])}, "needs a target"),
        ({"starts": torch.tensor([0, 2, 8])}, "has 6 tokens; allowed: 5"),
        ({"tokens": torch.arange(93, 101)}, "examples hold token ids 93..100; allowed: 0..66"),
    ],
)
def test_examples_that_do_not_fit_are_refused(change, message, tmp_path):
    good = Examples(torch.arange(10, 18), torch.tensor([0, 3, 8]), torch.tensor([1, 3]))
    recipe = replace(RECIPE, length=5, eval_every=None)
    with pytest.raises(InputError, match=message):
        train(tmp_path, recipe, data=replace(good, **change), validation=None)


# --- training


def train(path: Path, recipe: LoraRecipe = RECIPE, model=None, **changes):
    fixed = {"data": examples(20), "validation": examples(7, seed=6), "seed": 3}
    fixed |= {"state": path / "state", "out": path / "out", "base": "../../prune/abc"}
    fixed |= {"device": "cpu", "dtype": "float32"} | changes
    return recover(model or tiny(), fixed.pop("data"), recipe=recipe, **fixed)


def mean_loss(model, data: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """Independent: every example alone, unpadded, full logits; the mean over all targets."""
    total, count = torch.zeros(()), 0
    for sequence, masked in data:
        logits = model(input_ids=sequence[None]).logits[0, masked - 1 : -1]
        total = total + F.cross_entropy(logits, sequence[masked:], reduction="sum")
        count += len(sequence) - masked
    return total / count


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trained")
    train(path)
    return path


def test_training_equals_a_plain_loop_without_padding(tmp_path):
    """Independent: one example at a time, transformers' schedule, peft's own model."""
    from peft import LoraConfig, get_peft_model
    from transformers import get_linear_schedule_with_warmup

    recipe = replace(RECIPE, dropout=0.0)
    result = train(tmp_path, recipe)
    data, validation = unpadded(examples(20)), unpadded(examples(7, seed=6))
    base = tiny()
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, bias="none")
    model = get_peft_model(base, config).train()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(parameters.values(), lr=0.05, weight_decay=0.0)
    # 20 examples in batches of 6 are 4 steps an epoch.
    schedule = get_linear_schedule_with_warmup(optimiser, 1, 16)
    expected, validated, kept = [], {}, {}
    tokens = positions = 0
    for step in range(16):
        picked = [data[i] for i in batch_indices(step, 20, recipe, 3)]
        loss = mean_loss(model, picked)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimiser.step()
        schedule.step()
        expected.append(loss.item())
        tokens += sum(len(sequence) for sequence, _ in picked)
        for row in (0, 3):
            lengths = [len(sequence) for sequence, _ in picked[row : row + 3]]
            positions += len(lengths) * max(lengths, default=0)
        if step % 2:
            with torch.no_grad():
                validated[step + 1] = mean_loss(model, validation).item()
            kept[step + 1] = {name: p.detach().clone() for name, p in parameters.items()}
    rows = losses(tmp_path)
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)
    found = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert found == pytest.approx(validated, rel=1e-5)
    assert rows[-1]["tokens"] == result.tokens == tokens
    # Micro-batches are padded to their longest.
    assert result.useful_share == tokens / positions < 1
    assert json.loads(read(tmp_path)["meta.json"])["useful_share"] == result.useful_share
    best = min(validated, key=validated.__getitem__)
    # Else the last adapter would do, and the test could not fail.
    assert 2 < best < 16
    assert result.best_step == best
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, parameter in kept[best].items():
        ours = stored[name.replace(".default", "")]
        torch.testing.assert_close(ours, parameter, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(ours, kept[16][name], rtol=1e-3, atol=1e-4)


def test_a_token_budget_needs_windows(tmp_path):
    with pytest.raises(InputError, match="tokens is 100 with examples; allowed: null"):
        train(tmp_path, replace(RECIPE, tokens=100))


def test_padding_changes_nothing(tmp_path):
    recipe = replace(RECIPE, dropout=0.0)
    train(tmp_path / "padded", recipe)
    # Another token in the same places: not one bit.
    other = examples(20, padding=66), examples(7, seed=6, padding=66)
    train(tmp_path / "other", recipe, data=other[0], validation=other[1])
    for name in ("adapter_model.safetensors", "loss.jsonl"):
        assert read(tmp_path / "other")[name] == read(tmp_path / "padded")[name]
    # One example at a time is never padded.
    train(tmp_path / "alone", replace(recipe, micro_batch=1))
    for padded, alone in zip(losses(tmp_path / "padded"), losses(tmp_path / "alone"), strict=True):
        assert alone["positions"] == alone["tokens"] < padded.pop("positions")
        assert padded == pytest.approx({name: alone[name] for name in padded}, rel=1e-5)


def test_the_artefact_is_the_best_adapter_and_says_so(trained):
    meta = json.loads(read(trained)["meta.json"])
    rows = [row for row in losses(trained) if "validation_loss" in row]
    assert [row["step"] for row in rows] == list(range(2, 17, 2))
    assert meta["validation_losses"] == [
        {"step": row["step"], "loss": row["validation_loss"]} for row in rows
    ]
    lowest = min(row["validation_loss"] for row in rows)
    assert meta["best_validation_loss"] == lowest
    assert [row["step"] for row in rows if row["validation_loss"] == lowest] == [meta["best_step"]]
    assert meta["best_step"] < 16
    assert (meta["examples"], meta["dropped_examples"]) == (20, 0)
    assert "windows_sha256" not in meta
    attached = adapters.attach(tiny(), trained / "out")
    with torch.no_grad():
        value = mean_loss(attached, unpadded(examples(7, seed=6))).item()
    assert value == pytest.approx(lowest, rel=1e-5)


def test_the_last_step_is_validated_too(tmp_path):
    train(tmp_path, replace(RECIPE, max_steps=5, eval_every=3))
    steps = [row["step"] for row in losses(tmp_path) if "validation_loss" in row]
    assert steps == [3, 5]


def test_without_eval_every_the_last_adapter_is_kept(trained, tmp_path):
    result = train(tmp_path, replace(RECIPE, eval_every=None), validation=None)
    assert result.best_step is None
    meta = json.loads(read(tmp_path)["meta.json"])
    assert not {"best_step", "validation_losses", "validation_sha256"} & set(meta)
    # Looking at the validation part does not move the training by a bit.
    plain = [{k: v for k, v in row.items() if k != "validation_loss"} for row in losses(trained)]
    assert losses(tmp_path) == plain
    name = "adapter_model.safetensors"
    assert read(tmp_path)[name] != read(trained)[name]


@pytest.mark.parametrize("steps", [4, 8, 13, 15])
def test_a_resumed_run_ends_with_the_same_bytes(steps, trained, tmp_path, monkeypatch):
    original = lora.train_step

    def step(*args):
        if args[6] > steps:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(lora, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    best = json.loads(read(trained)["meta.json"])["best_step"]
    # The best adapter is found before the run breaks off in some cases, after it in others.
    assert 4 < best < 13
    assert train(tmp_path).resumed_from == steps // 3 * 3
    assert read(tmp_path) == read(trained)


def test_the_state_of_other_validation_data_is_not_taken(tmp_path, monkeypatch, caplog):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lora, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    assert train(tmp_path, validation=examples(7, seed=8)).resumed_from == 0
    assert caplog.text.partition("different: ")[2].startswith("validation")


def test_a_non_finite_validation_loss_stops_the_run(tmp_path, monkeypatch):
    values = iter([4.0, math.inf])
    monkeypatch.setattr(lora, "validation_loss", lambda *args: next(values))
    message = r"the validation loss is inf at step 4; state of step 3 kept in"
    with pytest.raises(NonFiniteError, match=message):
        train(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "validation", "message"),
    [
        (RECIPE, None, "eval_every is 2 with no validation part"),
        (replace(RECIPE, eval_every=None), examples(2), "eval_every is None with a validation"),
    ],
)
def test_validation_needs_data_and_an_interval(recipe, validation, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(tmp_path, recipe, validation=validation)
    with pytest.raises(InputError, match="eval_every is 0"):
        parse_recipe({"eval_every": 0})


# --- roles


@pytest.mark.parametrize("name", TINY)
def test_families_tell_attention_from_mlp(name):
    config = tiny_config(name)
    family = family_of(config)
    attention, mlp = NAMES.get(config["model_type"], (LINEARS[:4], LINEARS[4:]))
    assert sorted(family.linears(config, "attention")) == sorted(attention)
    assert sorted(family.linears(config, "mlp")) == sorted(mlp)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("attention",), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (("mlp",), {"gate_proj", "up_proj", "down_proj"}),
        (("mlp", "q_proj"), {"gate_proj", "up_proj", "down_proj", "q_proj"}),
        (("attention", "mlp"), set(LINEARS)),
    ],
)
def test_roles_name_linears(targets, names, tmp_path):
    train(tmp_path, replace(RECIPE, targets=targets, max_steps=1))
    config = json.loads(read(tmp_path)["adapter_config.json"])
    assert set(config["target_modules"]) == names
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in stored} == names


# --- the step


def test_recover_step_on_a_pruned_checkpoint(tiny_checkpoint, tmp_path):
    """Fetched, pruned to other widths in every layer, recovered; the record is complete."""
    from workflow_scripts import recover as recover_step

    rng, text = random.Random(0), tmp_path / "text"
    text.mkdir()
    rows = [
        {"instruction": f"Add {a} and {b}.", "input": "", "output": str(a + b)}
        for a, b in ((rng.randrange(50), rng.randrange(50)) for _ in range(24))
    ]
    rows.append({"instruction": "Wait. " * 60, "input": "", "output": "No."})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = {"name": "sums", "source": f"dir:{tmp_path / 'a.jsonl'}", "format": "alpaca"}
    params |= {"validation": 0.25, "seed": 0}
    script("fetch_text").main(request("fetch_text", params, text), text)
    checkpoint = _pruned(tiny_checkpoint("llama"), tmp_path / "prune")
    out = tmp_path / "recover"
    out.mkdir()
    recipe = {"targets": ["attention", "mlp"], "batch": 4, "micro_batch": 2, "max_steps": 4}
    recipe |= {"warmup_steps": 0, "lr": 0.01, "length": 256, "eval_every": 2}
    params = {"recipe": recipe, "seed": 0, "device": "cpu", "dtype": "float32", "threads": 1}
    recover_step.main(_request("recover", out, params, checkpoint=checkpoint, text=text), out)
    meta = json.loads((out / "meta.json").read_text())
    records = json.loads((text / "meta.json").read_text())["records"]
    assert meta["examples"] + meta["dropped_examples"] == records["recovery"]
    assert [row["step"] for row in meta["validation_losses"]] == [2, 4]
    assert meta["recipe"]["targets"] == ["attention", "mlp"]
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
    adapters.load_recovered(checkpoint, out)
    (tmp_path / "plain").mkdir()
    row = {"id": 1, "title": "a", "text": "The cat sat. " * 99, "split": "recovery"}
    (tmp_path / "plain" / "articles.jsonl").write_text(json.dumps(row) + "\n")
    inputs = {"checkpoint": checkpoint, "text": tmp_path / "plain"}
    with pytest.raises(InputError, match="articles have no validation part"):
        recover_step.main(_request("recover", out, params, **inputs), out)
