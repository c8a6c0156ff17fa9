"""The property that every method and family is held to.

The pruned model's logits equal those of the original with the removed units zeroed, with and
without cache, and a checkpoint gives them again wherever it is loaded.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, tiny_config, tiny_model
from safetensors.torch import save_file

from prunelib import checkpoint
from prunelib.data.tokenizer import load_tokenizer
from prunelib.errors import InputError, IntegrityError
from prunelib.families import family_of
from prunelib.plan import Plan
from prunelib.rules import Rule, Target
from prunelib.selection import select
from prunelib.surgery import prune_tensors, pruned_config, remaining_parameters, zero_tensors

Checkpoints = Callable[[str], Path]

KINDS = {
    "kv groups": ("kv_group",),
    "query slots": ("query_slot",),
    "channels": ("mlp_channel",),
    "both": ("kv_group", "mlp_channel"),
    "slots and channels": ("query_slot", "mlp_channel"),
    "all three": ("kv_group", "query_slot", "mlp_channel"),
}
SHAPES = ("uniform", "per layer", "protected", "blocks")
# A block of zeros is not the identity there.
POST_NORM = ("opt-post-norm",)


def suite() -> list[Any]:
    """Every tiny model with all the unit kinds that its family has, in every shape of a plan.

    A plan that removes blocks keeps all units of the others, so that one kind does for it.
    """
    return [
        pytest.param(name, kinds, shape, id=f"{name}-{label}-{shape}")
        for name in TINY
        for label, kinds in KINDS.items()
        for shape in SHAPES
        if set(kinds) <= set(family_of(tiny_config(name)).units(tiny_config(name)))
        and (shape != "blocks" or (label == "channels" and name not in POST_NORM))
    ]


def random_plan(config: dict[str, Any], kinds: tuple[str, ...], *, shape: str, seed: int) -> Plan:
    """A plan with random survivors: the same widths in all layers, different ones, or blocks."""
    family = family_of(config)
    rng = np.random.default_rng(seed)
    units = {kind: family.kind(config, kind).count for kind in kinds}
    layers = family.dimensions(config).layers
    kept: list[dict[str, tuple[int, ...]] | None] = []
    for layer in range(layers):
        widths = {}
        for kind, count in units.items():
            most = max(count - 1, 1)
            number = max(1, count // 2) if shape == "uniform" else int(rng.integers(1, most + 1))
            if shape == "protected" and layer in (0, layers - 1):
                number = count
            widths[kind] = tuple(sorted(rng.choice(count, number, replace=False).tolist()))
        kept.append(widths)
    if shape == "blocks":
        kept[1] = None
        kept = [None if k is None else {n: tuple(range(c)) for n, c in units.items()} for k in kept]
    return Plan(
        family.name,
        config["model_type"],
        tuple(kept),
        units,
        (family.parameters(config), remaining_parameters(family, config, kept)),
    )


def masked(name: str, config: dict[str, Any], plan: Plan) -> Any:
    model = tiny_model(name)
    family = family_of(config)
    state = dict(zero_tensors(model.state_dict().items(), family, config, plan))
    model.load_state_dict(state)
    return model


def pruned(name: str, config: dict[str, Any], plan: Plan) -> Any:
    family = family_of(config)
    new, _ = pruned_config(family, config, plan)
    model = checkpoint.build_model(new, lambda model_class, parsed: model_class(parsed)).eval()
    tensors = prune_tensors(tiny_model(name).state_dict().items(), family, config, plan)
    model.load_state_dict(dict(tensors))
    return model


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def with_cache(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of all positions, the last ones computed token by token through the cache."""
    out = model(ids[:, :5], use_cache=True)
    logits = [out.logits]
    for position in range(5, ids.shape[1]):
        out = model(
            ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True
        )
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize(("name", "kinds", "shape"), suite())
def test_logits_equal(name: str, kinds: tuple[str, ...], shape: str) -> None:
    config = tiny_model(name).config.to_dict()
    plan = random_plan(config, kinds, shape=shape, seed=7)
    small, reference = pruned(name, config, plan), masked(name, config, plan)
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(ids).logits
        assert relative_difference(small(ids).logits, expected) < 1e-5
        assert relative_difference(with_cache(small, ids), expected) < 1e-5
        padding = torch.ones_like(ids)
        padding[0, :4] = 0
        a = small(ids, attention_mask=padding).logits[0, 4:]
        b = reference(ids, attention_mask=padding).logits[0, 4:]
        assert relative_difference(a, b) < 1e-5
    assert sum(p.numel() for p in small.parameters()) == plan.parameters[1]
    removable = any(family_of(config).kind(config, kind).count > 1 for kind in kinds)
    if removable or shape == "blocks":
        dense = tiny_model(name)
        assert relative_difference(expected, dense(ids).logits) > 1e-3, "nothing was masked"


# All architectures, and the variants that store other tensors.
FRESH = ("llama", "llama-bias", "mistral", "qwen2", "qwen3", "opt", "opt-post-norm", "bloom", "glm")
# Stock OPT has no width of a head of its own, stock BLOOM neither that nor one of the MLP.
NOT_STOCK = {("opt", "uniform"), ("opt-post-norm", "uniform"), ("bloom", "uniform")}

LOADER = """
import sys, json, torch
sys.modules["prunelib"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
# The number of threads decides the last bits of a large product.
torch.set_num_threads(int(sys.argv[2]))
answers = {}
for directory, remote in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=remote).eval()
    ids = torch.arange(3, 19).view(2, 8)
    with torch.inference_mode():
        logits = model(ids).logits
        greedy = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
        slow = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        padded = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        alone = model.generate(ids[:1, 3:], max_new_tokens=6, do_sample=False)
    AutoTokenizer.from_pretrained(directory, trust_remote_code=remote)("words")
    answers[directory] = [logits.contiguous().view(torch.int32).tolist(),
                          bool((greedy == slow).all()),
                          padded[0, 3:].tolist() == alone[0].tolist()]
print("ANSWER" + json.dumps(answers))
"""


def load_in_a_fresh_interpreter(directories: dict[str, bool]) -> dict[str, Any]:
    """Load checkpoints where prunelib cannot be imported; directory -> with remote code or not."""
    run = subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps(directories), str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("ANSWER"))
    answers: dict[str, Any] = json.loads(line.removeprefix("ANSWER"))
    return answers


def test_loads_in_a_fresh_interpreter(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    remote, bits = {}, {}
    ids = torch.arange(3, 19).view(2, 8)
    cases = [
        (name, "both", shape) for name in FRESH for shape in ("uniform", "protected", "blocks")
    ]
    cases += [(name, "slots and channels", "protected") for name in ("llama", "glm")]
    for name, kinds, shape in cases:
        source, out = tiny_checkpoint(name), tmp_path / f"{name}-{kinds}-{shape}"
        config = checkpoint.read_config(source)
        plan = random_plan(config, KINDS[kinds], shape=shape, seed=3)
        checkpoint.prune_checkpoint(source, plan, out)
        remote[str(out)] = "auto_map" in checkpoint.read_config(out)
        assert remote[str(out)] == (shape == "protected" or (name, shape) in NOT_STOCK)
        stock = tmp_path / f"{out.name}-stock"
        if not (shape == "blocks" and name in POST_NORM):
            checkpoint.export_stock(out, config, stock)
            remote[str(stock)] = False
        for directory in (out, stock) if stock.exists() else (out,):
            with torch.inference_mode():
                logits = checkpoint.load_model(directory)(ids).logits
            exact = logits.contiguous().view(torch.int32).tolist()
            bits[str(directory)] = [exact, True, True]
    assert load_in_a_fresh_interpreter(remote) == bits


def test_uniform_channels_of_opt_are_stock() -> None:
    config = tiny_model("opt").config.to_dict()
    plan = random_plan(config, ("mlp_channel",), shape="uniform", seed=3)
    new, stock = pruned_config(family_of(config), config, plan)
    assert stock
    assert (new["model_type"], new["ffn_dim"]) == ("opt", 20)


@pytest.mark.parametrize("shape", SHAPES)
def test_published_field_names_of_bloom(
    shape: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """The repositories' config.json says n_embed and num_attention_heads."""
    source, published = tiny_checkpoint("bloom"), tmp_path / "published"
    shutil.copytree(source, published)
    config = checkpoint.read_config(source)
    renamed = {"n_head": "num_attention_heads", "hidden_size": "n_embed"}
    old = {renamed.get(key, key): value for key, value in config.items()}
    del old["tie_word_embeddings"]
    (published / "config.json").write_text(json.dumps(old))
    plan = random_plan(config, ("kv_group", "mlp_channel"), shape=shape, seed=3)
    ids, logits = torch.arange(3, 19).view(2, 8), []
    for directory in (source, published):
        out = tmp_path / f"pruned-{directory.name}"
        checkpoint.prune_checkpoint(directory, plan, out)
        with torch.inference_mode():
            logits.append(checkpoint.load_model(out)(ids).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["bloom", "bloom-8"])
def test_kept_heads_keep_their_alibi_slopes(name: str, padded: bool) -> None:
    """Every kept head attends as it did in the whole model; slopes of fewer heads would not do."""
    config = tiny_model(name).config.to_dict()
    family = family_of(config)
    count = family.dimensions(config).heads
    for kept in (tuple(range(1, count)), (1, 2, 4), (count - 1,)):
        kinds = {"kv_group": kept}
        plan = Plan(
            family.name,
            "bloom",
            (kinds,) * 4,
            {"kv_group": count},
            (
                family.parameters(config),
                remaining_parameters(family, config, [kinds] * 4),
            ),
        )
        small, whole = pruned(name, config, plan), tiny_model(name)
        ids = torch.arange(3, 19).view(2, 8)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        with torch.inference_mode():
            arguments = {"attention_mask": mask if padded else None, "output_attentions": True}
            # Only the first layer sees the same hidden states in both models.
            expected = whole(ids, **arguments).attentions[0][:, list(kept)]
            found = small(ids, **arguments).attentions[0]
            first = whole(ids, **arguments).attentions[0][:, : len(kept)]
        assert relative_difference(found, expected) < 1e-5
        assert relative_difference(found, first) > 1e-2, "slopes make no difference here"


def test_blocks_of_a_post_norm_model(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Removing a block skips it; zeros would not, and are refused."""
    source, out = tiny_checkpoint("opt-post-norm"), tmp_path / "pruned"
    config = checkpoint.read_config(source)
    plan = random_plan(config, ("kv_group",), shape="blocks", seed=3)
    checkpoint.prune_checkpoint(source, plan, out)
    reference = tiny_model("opt-post-norm")
    del reference.model.decoder.layers[1]
    ids = torch.arange(3, 19).view(2, 8)
    with torch.inference_mode():
        expected = reference(ids, use_cache=False).logits
        assert relative_difference(checkpoint.load_model(out)(ids).logits, expected) < 1e-5
    with pytest.raises(InputError, match="cannot be written as zeros"):
        checkpoint.export_stock(out, config, tmp_path / "stock")
    with pytest.raises(InputError, match="cannot be written as zeros"):
        masked("opt-post-norm", config, plan)


@pytest.mark.parametrize(("name", "prefix"), [("opt", "model."), ("bloom", "transformer.")])
def test_weights_saved_from_the_body_alone(
    name: str, prefix: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Published OPT and BLOOM weights lack the prefix of the body; transformers adds it, too."""
    source, body = tiny_checkpoint(name), tmp_path / "body"
    shutil.copytree(source, body)
    tensors = {key.removeprefix(prefix): value for key, value in checkpoint.read_tensors(source)}
    save_file(tensors, body / "model.safetensors", metadata={"format": "pt"})
    config = checkpoint.read_config(source)
    plan = random_plan(config, ("kv_group", "mlp_channel"), shape="per layer", seed=3)
    for directory in (source, body):
        checkpoint.prune_checkpoint(directory, plan, tmp_path / f"pruned-{directory.name}")
    ours, bodys = (tmp_path / f"pruned-{directory.name}" for directory in (source, body))
    a, b = (dict(checkpoint.read_tensors(directory)) for directory in (ours, bodys))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    reader = checkpoint.WeightReader(body)
    key = next(iter(a))
    assert torch.equal(reader(key), checkpoint.WeightReader(source)(key))


def test_export_stock_pads_to_the_original_widths(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    config = checkpoint.read_config(source)
    ids = torch.arange(3, 19).view(2, 8)
    for number, shape in enumerate(["protected", "blocks"]):
        plan = random_plan(config, ("kv_group", "mlp_channel"), shape=shape, seed=5)
        small, stock = tmp_path / f"small{number}", tmp_path / f"stock{number}"
        checkpoint.prune_checkpoint(source, plan, small)
        checkpoint.export_stock(small, config, stock)
        assert "auto_map" not in checkpoint.read_config(stock)
        padded = checkpoint.load_model(stock)
        assert sum(p.numel() for p in padded.parameters()) == plan.parameters[0]
        with torch.inference_mode():
            a, b = padded(ids).logits, checkpoint.load_model(small)(ids).logits
        assert relative_difference(a, b) < 1e-5


def test_pruning_nothing_is_bit_equal(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    config = checkpoint.read_config(source)
    family = family_of(config)
    rule = Rule(("kv_group", "mlp_channel"))
    scores = {
        kind: [np.arange(family.kind(config, kind).count, dtype=float)] * 4 for kind in rule.kinds
    }
    plan = select(scores, family, config, Target("parameters", 0.0), rule, {})
    checkpoint.prune_checkpoint(source, plan, tmp_path)
    assert checkpoint.read_config(tmp_path) == config
    ids = torch.arange(3, 19).view(2, 8)
    with torch.inference_mode():
        a = checkpoint.load_model(tmp_path)(ids).logits
        b = checkpoint.load_model(source)(ids).logits
    assert torch.equal(a, b)


def test_hostile_files_beside_weights_are_never_executed(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    config = checkpoint.read_config(source)
    plan = random_plan(config, ("kv_group", "mlp_channel"), shape="protected", seed=3)
    checkpoint.prune_checkpoint(source, plan, tmp_path)
    trap = tmp_path / "sprung"
    (tmp_path / "modeling_pruned_llama.py").write_text(f"open({str(trap)!r}, 'w')\n")
    # A pickle that would run code on load; .bin files are not even opened.
    (tmp_path / "pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR."
    )
    model = checkpoint.load_model(tmp_path)
    assert type(model).__module__.startswith("prunelib.")
    load_tokenizer(tmp_path)
    assert not trap.exists()


def test_a_shard_outside_the_directory_is_refused(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_checkpoint("llama") / "config.json").read_bytes())
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match="points outside the directory"):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gptj"}, "'gptj' is not supported; supported"),
        ({"hidden_size": "many"}, "not a valid llama config"),
        ({"rms_norm_eps": "small"}, "not a valid LlamaConfig"),
        ({"num_key_value_heads": 4}, "not a multiple of num_key_value_heads 4"),
    ],
)
def test_a_hostile_config_is_refused(
    change: dict[str, Any], message: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    for file in tiny_checkpoint("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = checkpoint.read_config(tmp_path) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        checkpoint.load_model(tmp_path)


def test_shapes_that_do_not_fit_the_config_are_refused(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    for file in tiny_checkpoint("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = checkpoint.read_config(tmp_path) | {"intermediate_size": 44}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match="tensors do not fit"):
        checkpoint.load_model(tmp_path)


def test_tiny_config_is_what_was_asked_for() -> None:
    for name in TINY:
        config = tiny_config(name)
        assert family_of(config).parameters(config) == sum(
            p.numel() for p in tiny_model(name).parameters()
        )


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mixtral", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("dbrx", "mixture of experts"),
        ("deepseek_v3", "mixture of experts, latent attention"),
        ("mamba", "state space"),
        ("mamba2", "state space"),
        ("falcon_mamba", "state space"),
        ("jamba", "mixture of experts, state space"),
    ],
)
def test_an_unsupported_architecture_is_refused_with_its_reason(
    model_type: str, reason: str
) -> None:
    config = transformers.AutoConfig.for_model(model_type).to_dict()
    with pytest.raises(InputError) as caught:
        family_of(config)
    message = str(caught.value)
    assert message.startswith(f"architecture {model_type!r} is not supported ({reason}); supported")
    assert "\n" not in message
    assert "pruned_" not in message
