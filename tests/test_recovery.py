"""LoRA recovery: the loop against a plain one, interruption, artefacts, refusals."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from prunelib.errors import InputError, IntegrityError, NonFiniteError
from prunelib.recovery import adapters, lora
from prunelib.recovery import data as data_module
from prunelib.recovery import state as state_module
from prunelib.recovery.lora import recover
from prunelib.recovery.loss import frozen_head_loss
from prunelib.recovery.recipe import (
    LoraRecipe,
    batch_indices,
    learning_rate,
    parse_recipe,
    total_steps,
)

ROOT = Path(__file__).parents[1]
RECIPE = LoraRecipe(
    r=4, alpha=8, lr=0.01, batch=4, micro_batch=2, epochs=2, warmup_steps=2, length=12, save_every=2
)
# What LLM-Pruner's recipe adapts in a LLaMA: all linear maps of a layer.
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
FILES = ("adapter_config.json", "adapter_model.safetensors", "loss.jsonl", "meta.json")


def tiny(seed: int = 0, **geometry):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 67}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**shape | heads | geometry)).eval()


def tokens(n: int = 13, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 67, (n, length), generator=torch.Generator().manual_seed(7))


def streamed(path: Path):
    """A stream of documents in two files below ``path``, written if they are not there."""
    from conftest import tiny_tokenizer

    from prunelib.data.stream import FileDocuments
    from prunelib.recovery.data import StreamedWindows

    files = [path / "stream-0.jsonl", path / "stream-1.jsonl"]
    for number, file in enumerate(files):
        if not file.is_file():
            path.mkdir(parents=True, exist_ok=True)
            texts = [f"{number} {index}! " * (index % 5 + 1) for index in range(12)]
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return StreamedWindows(FileDocuments(files, "text"), tiny_tokenizer(), 12)


# Four passes forward and back to a step, along a cosine, into the second pass through the stream.
STREAMED = LoraRecipe(
    r=4, alpha=8, lr=0.01, batch=4, micro_batch=1, tokens=9 * 48, schedule="cosine",
    warmup_steps=2, length=12, save_every=2,
)  # fmt: skip


def run_streamed(path: Path):
    return run(path, STREAMED, tiny(vocab_size=97), streamed(path))


def tiny_shared():
    """Three layers of which the last uses the first one's weights."""
    from prunelib.families.modeling_shared import SharedLlamaConfig, SharedLlamaForCausalLM

    layers = [{}, {}, {"base": 0, "rank": 2, "normalise": True}]
    config = tiny(num_hidden_layers=3).config.to_dict() | {"virtual_layers": layers}
    config.pop("model_type")
    torch.manual_seed(0)
    model = SharedLlamaForCausalLM(SharedLlamaConfig(**config)).eval()
    for parameter in adapters.shared_parameters(model).values():
        torch.nn.init.normal_(parameter.data, std=0.1)
    return model


def run_shared(path: Path, kept_lora: bool = False):
    return run(path, replace(RECIPE, kept_lora=kept_lora), tiny_shared())


def run(path: Path, recipe: LoraRecipe = RECIPE, model=None, windows=None, **changes):
    fixed = {"seed": 3, "state": path / "state", "out": path / "out", "base": "../../prune/abc"}
    fixed |= {"device": "cpu", "dtype": "float32"} | changes
    return recover(model or tiny(), tokens() if windows is None else windows, recipe, **fixed)


def read(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "out").iterdir()}


def losses(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "out" / "loss.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trained")
    run(path)
    return path


# --- the mathematics


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunked_loss_and_its_gradient_equal_autograd(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(10, 8, dtype=torch.float64).float().requires_grad_()
    head = torch.nn.Linear(8, 23)
    targets = torch.randint(0, 23, (10,))
    (frozen_head_loss(hidden, head, targets, chunk) / 5).backward()
    ours, hidden.grad = hidden.grad, None
    plain = F.cross_entropy(head(hidden), targets, reduction="sum") / 5
    plain.backward()
    torch.testing.assert_close(ours, hidden.grad, rtol=1e-5, atol=1e-7)
    value = frozen_head_loss(hidden, head, targets, chunk) / 5
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_fused_adapters_equal_those_of_peft(bias):
    """Outputs and the gradients of inputs, A and B; in eval mode and in another precision: bits."""
    from peft import LoraConfig, get_peft_model

    from prunelib.recovery.fused import fuse

    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
    layers = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6, bias=bias)), config).train()
    found = []
    for number in range(2):
        if number:
            fuse(layers)
        inputs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outputs = layers(inputs)
        (outputs * torch.arange(6)).square().sum().backward()
        trained = [p for p in layers.parameters() if p.requires_grad]
        found.append([outputs, inputs.grad, *(p.grad.clone() for p in trained)])
        layers.zero_grad()
        layers.eval()
        found[-1].append(layers(inputs))
        layers.train()
    assert "LoraLinear" in str(found[1][0].grad_fn)
    assert "LoraLinear" not in str(found[1][-1].grad_fn)
    assert len(found[0]) == 5
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-4)
    assert torch.equal(found[0][-1], found[1][-1])


@pytest.mark.parametrize("change", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_other_adapters_stay_with_peft(change):
    from peft import LoraConfig, get_peft_model

    from prunelib.recovery.fused import fuse

    config = LoraConfig(r=3, target_modules=["0"], **change)
    layers = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config).train()
    fuse(layers)
    assert "LoraLinear" not in str(layers(torch.randn(4, 8)).grad_fn)


def test_schedule_by_hand():
    recipe = replace(RECIPE, lr=1.0, warmup_steps=2)
    rates = [learning_rate(step, 6, recipe) for step in range(6)]
    assert rates == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_is_that_of_transformers(schedule):
    from transformers import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=0.004)
    theirs = get_scheduler(schedule, optimiser, num_warmup_steps=3, num_training_steps=11)
    recipe = replace(RECIPE, lr=0.004, warmup_steps=3, schedule=schedule)
    for step in range(11):
        ours = learning_rate(step, 11, recipe)
        assert ours == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12, abs=1e-15)
        optimiser.step()
        theirs.step()


@pytest.mark.parametrize(
    ("budget", "steps", "read"),
    # 13 windows of 12 tokens, 4 to a step: an epoch's last step has 1.
    [(1, 1, 48), (48, 1, 48), (49, 2, 96), (156, 4, 156), (157, 5, 204), (400, 10, 408)],
)
def test_a_token_budget_ends_with_the_step_that_reaches_it(budget, steps, read):
    recipe = replace(RECIPE, tokens=budget)
    assert total_steps(13, recipe) == steps
    sizes = [12 * len(batch_indices(step, 13, recipe, 0)) for step in range(steps)]
    assert sum(sizes) == read
    assert sum(sizes[:-1]) < budget <= sum(sizes)


def test_accumulation_does_not_change_the_step(tmp_path):
    """Micro-batches of 1, 2 and 4 windows: one mean over the step's targets."""
    for micro in (1, 2, 4):
        run(tmp_path / str(micro), replace(RECIPE, micro_batch=micro, dropout=0.0, max_steps=3))
    first, *others = [[row["loss"] for row in losses(tmp_path / str(n))] for n in (1, 2, 4)]
    for other in others:
        assert other == pytest.approx(first, rel=1e-5)


def test_every_epoch_reads_every_window_once_in_another_order():
    epochs = [
        torch.cat([batch_indices(4 * e + s, 13, RECIPE, seed=3) for s in range(4)]).tolist()
        for e in range(2)
    ]
    assert [sorted(order) for order in epochs] == [list(range(13))] * 2
    assert epochs[0] != epochs[1]
    assert batch_indices(0, 13, RECIPE, 4).tolist() != epochs[0][:4]
    assert total_steps(13, RECIPE) == 8
    assert total_steps(13, replace(RECIPE, max_steps=3)) == 3


def test_training_equals_a_plain_loop_with_full_logits(tmp_path):
    """Independent: full logits, no micro-batches, transformers' schedule, peft's own model."""
    from peft import LoraConfig, get_peft_model
    from transformers import get_linear_schedule_with_warmup

    recipe = replace(RECIPE, dropout=0.0, clip_norm=0.5, weight_decay=0.1)
    result = run(tmp_path, recipe)
    base = tiny()
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, bias="none")
    model = get_peft_model(base, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.999), weight_decay=0.1)
    schedule = get_linear_schedule_with_warmup(optimiser, 2, 8)
    expected = []
    for step in range(8):
        batch = tokens()[batch_indices(step, 13, recipe, 3)]
        logits = model(input_ids=batch).logits[:, :-1].reshape(-1, 67)
        loss = F.cross_entropy(logits, batch[:, 1:].reshape(-1))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimiser.step()
        schedule.step()
        expected.append(loss.item())
    assert [row["loss"] for row in losses(tmp_path)] == pytest.approx(expected, rel=1e-5)
    assert [row["tokens"] for row in losses(tmp_path)] == [48, 96, 144, 156, 204, 252, 300, 312]
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ours = stored[name.replace(".default", "")]
            torch.testing.assert_close(ours, parameter.data, rtol=1e-4, atol=2e-5)
    # 2 layers of r * (in + out): q, o 32+32; k, v 32+16; gate, up, down 32+48.
    assert result.trainable_parameters == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)


def test_training_learns_and_leaves_the_base_weights_alone(tmp_path):
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    windows = torch.arange(12).repeat(8, 1)
    result = run(tmp_path, replace(RECIPE, lr=0.05, epochs=30, dropout=0.0), model, windows)
    assert result.last_loss < 0.5 * result.first_loss
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not any(after[name].requires_grad or after[name].grad is not None for name in before)


def test_parameters_named_by_the_recipe_are_trained_themselves(tmp_path):
    """Beside adapters and alone: they move, all others stay, and what is stored loads again."""
    from prunelib.recovery.adapters import attach, merge

    norms = [name for name, _ in tiny().named_parameters() if name.endswith("layernorm.weight")]
    assert len(norms) == 4
    for targets in ((), ("attention",)):
        path, model = tmp_path / str(len(targets)), tiny()
        recipe = replace(RECIPE, targets=targets, train=("*layernorm.weight",), dropout=0.0)
        result = run(path, recipe, model)
        stored = load_file(path / "out" / adapters.TRAINED)
        assert sorted(stored) == sorted(norms)
        moved = {n for n, p in tiny().named_parameters() if n in stored and (p != stored[n]).all()}
        assert moved == set(norms)
        before = dict(tiny().named_parameters())
        for name, parameter in model.named_parameters():
            plain = name.replace(".base_layer", "")
            if plain in before and plain not in stored:
                assert torch.equal(parameter, before[plain]), name
        # 4 vectors of 32; 2 layers of r * (in + out): q, o 32+32; k, v 32+16.
        assert result.trainable_parameters == 128 + len(targets) * 2 * 4 * (2 * 64 + 2 * 48)
        assert (path / "out" / "adapter_config.json").exists() == bool(targets)
        with torch.no_grad():
            trained_model = model.eval()(tokens()).logits
            assert torch.equal(attach(tiny(), path / "out")(tokens()).logits, trained_model)
            merged = merge(tiny(), path / "out")(tokens()).logits
            torch.testing.assert_close(merged, trained_model, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "0" / "out" / "meta.json").read_text())["trained"] == sorted(
        norms
    )


def test_trained_parameters_that_do_not_fit_are_refused(tmp_path):
    recipe = replace(RECIPE, targets=(), train=("*layernorm.weight",), max_steps=1)
    run(tmp_path, recipe)
    path = tmp_path / "out" / adapters.TRAINED
    tensors = load_file(path)
    name = min(tensors)
    for wrong, error in (
        ({"model.else": torch.ones(3)}, IntegrityError),
        ({name: torch.ones(3)}, IntegrityError),
        ({name: torch.full((32,), math.nan)}, NonFiniteError),
    ):
        save_file(tensors | wrong, path)
        with pytest.raises(error, match=next(iter(wrong))):
            adapters.attach(tiny(), tmp_path / "out")


def test_bf16_on_a_cpu_trains_on_rounded_weights_in_fp32(tmp_path):
    run(tmp_path / "a", dtype="bfloat16")
    rounded = tiny()
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    run(tmp_path / "b", model=rounded)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


# --- artefacts


def test_same_inputs_same_bytes_other_seed_other_adapter(trained, tmp_path):
    model = tiny()
    before = torch.get_rng_state()
    run(tmp_path / "again", model=model)
    assert torch.equal(before, torch.get_rng_state()), "the caller's generator was disturbed"
    assert read(tmp_path / "again") == read(trained)
    run(tmp_path / "other", seed=4)
    assert read(tmp_path / "other")["loss.jsonl"] != read(trained)["loss.jsonl"]


def test_artefact_names_no_absolute_path_and_no_pickle(trained):
    assert sorted(p.name for p in (trained / "out").iterdir()) == sorted(FILES)
    config = json.loads(read(trained)["adapter_config.json"])
    assert config["base_model_name_or_path"] == "../../prune/abc"
    assert config["target_modules"] == sorted(LINEARS)
    for name in ("adapter_config.json", "meta.json"):
        assert str(trained).encode() not in read(trained)[name]
    meta = json.loads(read(trained)["meta.json"])
    wanted = {"steps": 8, "tokens": 312, "seed": 3, "base": "abc", "trainable_parameters": 3712}
    wanted |= {"useful_share": 1.0}
    assert {key: meta[key] for key in wanted} == wanted
    assert meta["last_loss"] == losses(trained)[-1]["loss"]


def test_before_the_first_update_the_adapter_changes_nothing(tmp_path):
    # The warm-up's first step has rate 0, so this adapter is the initial one.
    run(tmp_path, replace(RECIPE, max_steps=1, warmup_steps=4))
    attached = adapters.attach(tiny(), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(attached(tokens()).logits, tiny()(tokens()).logits)


def test_attached_merged_and_plain_peft_agree(trained, tmp_path):
    from peft import PeftModel

    with torch.no_grad():
        dense = tiny()(tokens()).logits
        attached = adapters.attach(tiny(), trained / "out")(tokens()).logits
        merged = adapters.merge(tiny(), trained / "out")
        plain = PeftModel.from_pretrained(tiny(), trained / "out")(tokens()).logits
        assert (attached - dense).abs().max() > 1e-2
        assert torch.equal(attached, plain)
        torch.testing.assert_close(merged(tokens()).logits, attached, rtol=1e-4, atol=1e-5)
    assert set(merged.state_dict()) == set(tiny().state_dict())


# --- interruption

# Where the child kills itself: (function of the state module, its n-th call, before or after it).
KILLS = {
    "before the first state": ("save_state", 1, "before"),
    "after the second state": ("save_state", 2, "after"),
    "between tensors and index": ("_sha256", 3, "before"),
    "before the flush of a complete state": ("_sync", 6, "before"),
    "after the rename, before the old state is removed": ("_sync", 10, "before"),
    "after the last state, before the artefact": ("save_state", 4, "after"),
}


# Other recoveries, and where they are killed.
OTHERS = {
    "stream": run_streamed,
    "shared": run_shared,
    "shared with LoRA": partial(run_shared, kept_lora=True),
}
OTHER_KILLS = ("before the first state", "after the second state", "between tensors and index")


def _kill_at(name: str, call: int, when: str, number: int) -> None:
    """Replace a function of the state module by one that sends this process a signal."""
    original, calls = getattr(state_module, name), []

    def wrapped(*args):
        calls.append(None)
        if len(calls) == call and when == "before":
            os.kill(os.getpid(), number)
        result = original(*args)
        if len(calls) == call and when == "after":
            os.kill(os.getpid(), number)
        return result

    setattr(state_module, name, wrapped)
    if name == "save_state":
        lora.save_state = wrapped


def _in_child(work) -> int:
    """Return the wait status of a forked process that does ``work``."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def _interrupted(root: Path) -> None:
    """Run, kill and resume in forked processes; print the wait status of each killed one."""
    torch.set_num_threads(1)
    # In this process, so that its children have everything imported.
    run(root / "unbroken")
    for name, (function, call, when) in KILLS.items():
        path = root / name

        def work(path=path, function=function, call=call, when=when):
            _kill_at(function, call, when, signal.SIGKILL)
            run(path)

        print(name, _in_child(work), sep="\t")
        assert _in_child(lambda path=path: run(path)) == 0

    # Few documents at a time, so that most of a step's are still in the stream.
    data_module._CHUNK = 2
    for other, function in OTHERS.items():
        function(root / f"unbroken {other}")
        for name in OTHER_KILLS:
            path = root / f"{other} {name}"

            def work(path=path, kill=KILLS[name], function=function):
                _kill_at(*kill, signal.SIGKILL)
                function(path)

            print(path.name, _in_child(work), sep="\t")
            assert _in_child(lambda path=path, function=function: function(path)) == 0

    def terminated():
        original = lora.train_step

        def step(*args):
            if args[6] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        lora.train_step = step
        run(root / "terminated")

    print("terminated", _in_child(terminated), sep="\t")
    names = sorted(p.name for p in (root / "terminated" / "state").iterdir())
    print("saved on termination", names, sep="\t")
    assert _in_child(lambda: run(root / "terminated")) == 0


def test_killed_and_resumed_runs_end_with_the_same_bytes(trained, tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    told = dict(line.split("\t") for line in done.stdout.splitlines())
    assert {name: int(told[name]) for name in KILLS} == dict.fromkeys(KILLS, signal.SIGKILL)
    assert int(told["terminated"]) == signal.SIGTERM
    assert told["saved on termination"] == "['step-00000003']"
    expected = read(tmp_path / "unbroken")
    for other, name in product(OTHERS, OTHER_KILLS):
        assert int(told[f"{other} {name}"]) == signal.SIGKILL
        assert read(tmp_path / f"{other} {name}") == read(tmp_path / f"unbroken {other}"), name
    files = {other: set(read(tmp_path / f"unbroken {other}")) for other in OTHERS}
    assert files["stream"] == set(FILES)
    assert files["shared"] == {"trained.safetensors", "loss.jsonl", "meta.json"}
    assert files["shared with LoRA"] == {"trained.safetensors", *FILES}
    assert json.loads(read(tmp_path / "unbroken stream")["meta.json"])["stream_passes"] == 1
    for name in (*KILLS, "terminated"):
        assert read(tmp_path / name) == expected, name
        assert [p.name for p in (tmp_path / name / "state").iterdir()] == ["step-00000008"]
    # Another process, forked from another state of memory, agrees with this one.
    assert expected == read(trained)


def _broken_off(path: Path, monkeypatch, steps: int = 5, recipe: LoraRecipe = RECIPE) -> Path:
    """Stop a run within its step ``steps + 1``; return its newest state."""
    original = lora.train_step

    def step(*args):
        if args[6] > steps:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(lora, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            run(path, recipe)
    return next((path / "state").iterdir())


def test_resuming_does_only_the_steps_that_are_left(trained, tmp_path, monkeypatch):
    assert _broken_off(tmp_path, monkeypatch).name == "step-00000004"
    done = []
    original = lora.train_step
    monkeypatch.setattr(
        lora, "train_step", lambda *args: (done.append(args[6]), original(*args))[1]
    )
    assert run(tmp_path).resumed_from == 4
    assert done == [5, 6, 7, 8]
    assert read(tmp_path) == read(trained)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: _flip(state / "state.safetensors"),
        lambda state: _flip(state / "loss.jsonl"),
        lambda state: os.truncate(state / "state.safetensors", 100),
        lambda state: os.truncate(state / "state.json", 40),
        lambda state: (state / "state.json").write_text("[]"),
        lambda state: (state / "loss.jsonl").unlink(),
        lambda state: state.rename(state.with_name("step-00000006")),
    ],
)
def test_a_damaged_state_is_not_trusted(damage, trained, tmp_path, monkeypatch, caplog):
    damage(_broken_off(tmp_path, monkeypatch))
    assert run(tmp_path).resumed_from == 0
    assert "is not used" in caplog.text
    assert read(tmp_path) == read(trained)


@pytest.mark.parametrize(
    ("difference", "named"),
    [
        ({"seed": 4}, "seed"),
        ({"windows": tokens().flip(0)}, "windows"),
        ({"recipe": replace(RECIPE, lr=0.02)}, "recipe"),
        ({"model": None}, "base"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_the_state_of_another_run_is_not_taken(difference, named, tmp_path, monkeypatch, caplog):
    _broken_off(tmp_path, monkeypatch)
    if "model" in difference:
        difference = {"model": tiny(seed=1)}
    assert run(tmp_path, **difference).resumed_from == 0
    assert named in caplog.text.partition("different: ")[2]


def test_other_thread_count_is_another_run(tmp_path, monkeypatch, caplog):
    _broken_off(tmp_path, monkeypatch)
    torch.set_num_threads(2)
    try:
        assert run(tmp_path).resumed_from == 0
    finally:
        torch.set_num_threads(1)
    assert "different: threads" in caplog.text


# --- refusals


def test_non_finite_loss_names_step_and_keeps_the_state(tmp_path, monkeypatch):
    original = lora.train_step

    def step(model, *args):
        if args[5] == 4:
            model.model.norm.weight.data[0] = math.inf
        return original(model, *args)

    monkeypatch.setattr(lora, "train_step", step)
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 4; state of step 2 kept in"):
        run(tmp_path)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-00000002"]
    assert not (tmp_path / "out").exists()


def test_non_finite_gradient_names_the_parameter(tmp_path, monkeypatch):
    def spoil(hidden, head, targets):
        return (hidden.sum() * 0.0).sqrt()

    monkeypatch.setattr("prunelib.recovery.loss.frozen_head_loss", spoil)
    with pytest.raises(NonFiniteError, match=r"lora_\S+ is not finite at step 1; no state"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 8}, "unknown key 'rank'"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"lr": "1e-4"}, "lr is '1e-4'"),
        ({"lr": math.nan}, "lr is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"batch": 6, "micro_batch": 4}, "batch 6 is not a multiple of micro_batch 4"),
        ({"targets": []}, "targets is ()"),
        ({"targets": [], "train": ["a", "a"]}, "train is ('a', 'a')"),
        ({"targets": "q_proj"}, "targets is 'q_proj'"),
        ({"betas": [0.9]}, "betas is (0.9,)"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": 10, "max_steps": 2}, "allowed: one of them"),
        ({"schedule": "constant"}, "schedule is 'constant'; allowed: linear, cosine"),
        ({"length": 1}, "length is 1"),
    ],
)
def test_recipe_refuses(values, message):
    with pytest.raises(InputError) as caught:
        parse_recipe(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": replace(RECIPE, targets=("q_proj", "fc1"))}, "'fc1' matches no linear layer"),
        ({"recipe": replace(RECIPE, targets=("lm_head",))}, "'lm_head' matches no linear layer"),
        ({"recipe": replace(RECIPE, train=("*.gain",))}, "'*.gain' matches no parameter"),
        ({"recipe": replace(RECIPE, train=("*head*",))}, "lm_head.weight of the output layer"),
        ({"windows": tokens(length=11)}, "[13, 11]; allowed: int64 [n >= 1, 12]"),
        ({"windows": tokens()[:0]}, "[0, 12]"),
        ({"windows": tokens().int()}, "torch.int32"),
        ({"windows": tokens() + 60}, "allowed: 0..66"),
        ({"dtype": "float16"}, "'float16' is not supported"),
        ({"base": "/home/someone/model"}, "is absolute"),
    ],
)
def test_recover_refuses(change, message, tmp_path):
    with pytest.raises(InputError) as caught:
        run(tmp_path, **change)
    assert message in str(caught.value)


def test_logits_changed_after_the_output_layer_are_refused(tmp_path):
    model = tiny()
    model.lm_head.register_forward_hook(lambda module, args, output: output)
    original = model.forward

    def capped(**inputs):
        outputs = original(**inputs)
        outputs.logits = torch.tanh(outputs.logits)
        return outputs

    model.forward = capped
    with pytest.raises(InputError, match="changes its logits"):
        run(tmp_path, model=model)


def _edit(path: Path, **changes) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: (p / "adapter_model.bin").write_bytes(b""), InputError, "is a pickle"),
        (lambda p: (p / adapters.WEIGHTS).unlink(), IntegrityError, "is missing"),
        (lambda p: (p / adapters.CONFIG).unlink(), IntegrityError, "is missing"),
        (lambda p: os.truncate(p / adapters.WEIGHTS, 50), IntegrityError, "not a safetensors"),
        (lambda p: (p / adapters.CONFIG).write_text("{"), IntegrityError, "not JSON"),
        (lambda p: _edit(p, peft_type="IA3"), InputError, "not the config of a LoRA"),
        (lambda p: _edit(p, use_dora=True), InputError, "use_dora = True"),
        (lambda p: _edit(p, modules_to_save=["lm_head"]), InputError, "modules_to_save"),
        (lambda p: _edit(p, auto_mapping={"a": "b"}), InputError, "auto_mapping"),
        (lambda p: _edit(p, of_the_future=1), InputError, "of_the_future"),
        (lambda p: _edit(p, target_modules="(a+)+$"), InputError, "a list of names"),
        (lambda p: _edit(p, r=10**9), IntegrityError, "does not fit the model"),
        (lambda p: _edit(p, target_modules=["q_proj"]), IntegrityError, "model needs absent"),
    ],
)
def test_attach_refuses(damage, error, message, trained, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name, data in read(trained).items():
        (adapter / name).write_bytes(data)
    damage(adapter)
    with pytest.raises(error) as caught:
        adapters.attach(tiny(), adapter)
    assert message in str(caught.value)


def test_attach_names_the_tensor_that_does_not_fit(trained):
    with pytest.raises(IntegrityError) as caught:
        adapters.attach(tiny(intermediate_size=40), trained / "out")
    assert "mlp.down_proj.lora_A.weight is [4, 48], the model needs [4, 40]" in str(caught.value)


def test_attach_ignores_the_base_that_the_config_names(trained, tmp_path):
    for name, data in read(trained).items():
        (tmp_path / name).write_bytes(data)
    _edit(tmp_path, base_model_name_or_path="someone/else")
    with torch.no_grad():
        ours = adapters.attach(tiny(), tmp_path)(tokens()).logits
        assert torch.equal(ours, adapters.attach(tiny(), trained / "out")(tokens()).logits)


def test_attach_refuses_non_finite_weights(trained, tmp_path):
    for name, data in read(trained).items():
        (tmp_path / name).write_bytes(data)
    tensors = load_file(tmp_path / adapters.WEIGHTS)
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, tmp_path / adapters.WEIGHTS)
    with pytest.raises(NonFiniteError, match="holds NaN"):
        adapters.attach(tiny(), tmp_path)


# --- catalogue and steps


def test_catalogue():
    catalogue = yaml.safe_load((ROOT / "config" / "recovery.yaml").read_text())
    recipes = {name: parse_recipe(entry["recipe"]) for name, entry in catalogue.items()}
    assert recipes["lora_llm_pruner"] == LoraRecipe()
    quick = recipes["lora_quick"]
    # At 140 training tokens per second this is the half minute that its comment promises.
    assert quick.max_steps * quick.batch * quick.length / 140 < 30


def _pruned(source: Path, out: Path) -> Path:
    """Prune a tiny llama to widths that differ between its layers."""
    from prunelib import checkpoint
    from prunelib.families import family_of
    from prunelib.plan import Plan
    from prunelib.surgery import remaining_parameters

    config = checkpoint.read_config(source)
    family = family_of(config)
    units = {"kv_group": 3, "mlp_channel": 40}
    kept = (
        {"kv_group": (0, 2), "mlp_channel": tuple(range(7, 40))},
        {"kv_group": (0, 1, 2), "mlp_channel": tuple(range(40))},
        None,
        {"kv_group": (1,), "mlp_channel": tuple(range(9))},
    )
    counts = (family.parameters(config), remaining_parameters(family, config, kept))
    checkpoint.prune_checkpoint(source, Plan(family.name, "llama", kept, units, counts), out)
    return out


def _request(step: str, out: Path, params: dict, **inputs: Path):
    from prunelib.provenance.step import StepRequest

    return StepRequest(step, "0" * 16, params, inputs, out, (), ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recover_and_merge_steps_on_a_pruned_checkpoint(dtype, tiny_checkpoint, tmp_path):
    from prunelib.checkpoint import load_model, read_tensors
    from workflow_scripts import merge as merge_step
    from workflow_scripts import recover as recover_step

    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("llama-tied"), source)
    save_file(
        {
            name: tensor.to(dtype)
            for name, tensor in load_file(source / "model.safetensors").items()
        },
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    checkpoint = _pruned(source, tmp_path / "results" / "prune" / "label" / "key1")
    text = tmp_path / "text"
    text.mkdir()
    row = {"id": 1, "title": "a", "text": "The cat sat on the mat. " * 40, "split": "recovery"}
    (text / "articles.jsonl").write_text(json.dumps(row) + "\n")
    final = tmp_path / "results" / "recover" / "key2"
    out = final.with_name("key2.tmp-host-1")
    recipe = {"max_steps": 6, "warmup_steps": 0, "batch": 4, "length": 16, "lr": 0.02}
    params = {"recipe": recipe, "seed": 0, "device": "cpu", "dtype": "float32", "threads": 1}
    out.mkdir(parents=True)
    recover_step.main(_request("recover", final, params, checkpoint=checkpoint, text=text), out)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../../prune/label/key1"
    assert (tmp_path / "results" / "recover" / "key2.state" / "step-00000006").is_dir()

    merged = tmp_path / "merged"
    merged.mkdir()
    merge_step.main(_request("merge", merged, {}, checkpoint=checkpoint, adapter=out), merged)
    assert {tensor.dtype for _, tensor in read_tensors(merged)} == {dtype}
    assert (merged / "plan.json").read_bytes() == (checkpoint / "plan.json").read_bytes()
    with torch.no_grad():
        ids = tokens() + 2
        pruned = load_model(checkpoint)(ids).logits
        recovered = adapters.load_recovered(checkpoint, out)(ids).logits
        difference = (load_model(merged)(ids).logits - recovered).abs().max()
    moved = (recovered - pruned).abs().max()
    assert moved > 0.1
    assert difference < (1e-4 if dtype == torch.float32 else 0.1) * moved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {"learning_rate": 1}}, "unknown key 'learning_rate'"),
        ({"recipe": {"length": 4096}}, "the text is too short"),
        ({"threads": None}, "threads is missing"),
        ({"dtype": "float16"}, "'float16' is not supported"),
    ],
)
def test_recover_step_refuses(change, message, tiny_checkpoint, tmp_path):
    from workflow_scripts import recover as recover_step

    row = {"id": 1, "title": "a", "text": "The cat sat on the mat. " * 40, "split": "recovery"}
    (tmp_path / "articles.jsonl").write_text(json.dumps(row) + "\n")
    params = {"recipe": {}, "seed": 0, "device": "cpu", "dtype": "float32", "threads": 1} | change
    inputs = {"checkpoint": tiny_checkpoint("llama"), "text": tmp_path}
    with pytest.raises(InputError, match=message):
        recover_step.main(_request("recover", tmp_path / "out", params, **inputs), tmp_path / "out")


if __name__ == "__main__":
    _interrupted(Path(sys.argv[1]))
