"""FlexiGPT: blocks that use another block's weights, and a model made deeper by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, tiny_config, tiny_model
from test_pruned_equals_masked import (
    load_in_a_fresh_interpreter,
    masked,
    pruned,
    relative_difference,
    with_cache,
)

from prunelib import checkpoint
from prunelib.errors import InputError
from prunelib.families import family_of
from prunelib.plan import Plan, SharedBlock
from prunelib.replacement import shared_tensors
from prunelib.selection import Sharer
from prunelib.surgery import prune_tensors, pruned_config, remaining_parameters

Checkpoints = Callable[[str], Path]
IDS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
FULL = 1.0


def plan_of(
    config: dict[str, Any],
    bases: dict[int, int],
    *,
    rank: float = 4,
    gain: float | None = 0.1,
    svd: bool = True,
) -> Plan:
    """A plan that replaces the blocks in ``bases`` by those that they name."""
    family = family_of(config)
    sharer = Sharer(rank, gain, svd)
    kept = tuple(None if i in bases else {} for i in range(family.dimensions(config).layers))
    sharing = sharer.sharing(
        family, config, [SharedBlock(i, base, i) for i, base in sorted(bases.items())]
    )
    count = family.parameters(config)
    left = remaining_parameters(family, config, kept) + sharing.parameters
    return Plan(family.name, config["model_type"], kept, {}, (count, left), sharing=sharing)


def shared(name: str, plan: Plan) -> Any:
    """The model that a plan leaves of a tiny one."""
    dense = tiny_model(name)
    config = dense.config.to_dict()
    family, state = family_of(config), dense.state_dict()
    new, stock = pruned_config(family, config, plan)
    assert not stock
    model = checkpoint.build_model(new, lambda model_class, parsed: model_class(parsed)).eval()
    own = prune_tensors(state.items(), family, config, plan)
    added = shared_tensors(family, config, plan, state.__getitem__)
    tensors = dict(chain(own, added))
    if family.dimensions(config).tied:
        tensors["lm_head.weight"] = state["lm_head.weight"]
    model.load_state_dict(tensors)
    return model


@pytest.mark.parametrize("name", TINY)
def test_full_rank_without_normalisation_is_the_removed_block(name: str) -> None:
    """W_j + A B = W_i, with the block's own norms and biases: the model computes what it did."""
    dense = tiny_model(name)
    model = shared(name, plan_of(dense.config.to_dict(), {1: 3, 2: 0}, rank=FULL, gain=None))
    with torch.inference_mode():
        expected = dense(IDS).logits
        assert relative_difference(model(IDS).logits, expected) < 1e-5
        assert relative_difference(with_cache(model, IDS), expected) < 1e-5
        padding = torch.ones_like(IDS)
        padding[0, :4] = 0
        a = model(IDS, attention_mask=padding).logits[0, 4:]
        assert relative_difference(a, dense(IDS, attention_mask=padding).logits[0, 4:]) < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_with_and_without_cache(name: str) -> None:
    """Every virtual layer has a slot of its own, whatever its base's place is."""
    model = shared(name, plan_of(tiny_model(name).config.to_dict(), {1: 3, 2: 0}))
    with torch.inference_mode():
        expected = model(IDS).logits
        assert relative_difference(with_cache(model, IDS), expected) < 1e-5
        assert relative_difference(tiny_model(name)(IDS).logits, expected) > 1e-2


def test_outputs_are_normalised() -> None:
    """What a replaced block adds to the residual stream has the gain's size and no mean."""
    model = shared("llama", plan_of(tiny_model("llama").config.to_dict(), {1: 3}, gain=0.25))
    seen = {}
    layer = model.model.layers[1]
    layer.self_attn.register_forward_hook(lambda m, i, o: seen.update(attention=o[0]))
    layer.mlp.register_forward_hook(lambda m, i, o: seen.update(mlp=o))
    with torch.inference_mode():
        model(IDS)
    assert set(seen) == {"attention", "mlp"}
    for output in seen.values():
        assert output.mean(-1).abs().max() < 1e-6
        assert output.std(-1, correction=0).allclose(torch.tensor(0.25), rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "glm"])
def test_weights_exist_once(name: str, tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """In memory the very same tensors, on disk no second copy."""
    source, out = tiny_checkpoint(name), tmp_path / "out"
    config = checkpoint.read_config(source)
    family = family_of(config)
    plan = plan_of(config, {1: 3, 2: 3})
    checkpoint.prune_checkpoint(source, plan, out)
    model = checkpoint.load_model(out)
    layers = family.layers(model)
    found = 0
    for place in (1, 2):
        for map_name, module in layers[place].named_modules():
            if hasattr(module, "base"):
                found += 1
                own = layers[3].get_submodule(map_name)
                assert module.base is own
                assert module.base.weight.data_ptr() == own.weight.data_ptr()
    matrices = [s for s in family.layer_shapes(config).values() if len(s) == 2]
    assert found == 2 * len(matrices)
    # By hand: factors of rank 4 of every matrix, a gain for two outputs, the block's own vectors.
    vectors = sum(s[0] for s in family.layer_shapes(config).values() if len(s) == 1)
    each = sum(4 * sum(shape) for shape in matrices) + 2 * 48 + vectors
    blocks = family.block_parameters(config)
    expected = family.parameters(config) - 2 * blocks + 2 * each
    assert plan.parameters[1] == expected == sum(p.numel() for p in model.parameters())
    assert plan.sharing is not None
    assert plan.sharing.parameters == 2 * each
    assert plan.gross_removed_ratio == pytest.approx(2 * blocks / family.parameters(config))
    assert plan.removed_ratio < plan.gross_removed_ratio
    data = sum(tensor.nbytes for _, tensor in checkpoint.read_tensors(out))
    assert data == 4 * expected
    on_disk = (out / "model.safetensors").stat().st_size
    assert data < on_disk < data + 16_000 < (source / "model.safetensors").stat().st_size
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, shared(name, plan)(IDS).logits)


def test_loads_in_a_fresh_interpreter(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """With the modelling file beside the weights alone; generates with cache and padding."""
    bits = {}
    ids = torch.arange(3, 19).view(2, 8)
    for name in ("llama", "qwen2-sliding", "opt", "bloom", "glm"):
        source = tiny_checkpoint(name)
        config = checkpoint.read_config(source)
        plans = {"replaced": plan_of(config, {1: 3, 2: 0})}
        if name != "qwen2-sliding":
            plans["part"] = parts_plan(config, "attention", (0, 2))
        for label, plan in plans.items():
            out = tmp_path / f"{name}-{label}"
            checkpoint.prune_checkpoint(source, plan, out)
            assert Plan.load(out) == plan
            with torch.inference_mode():
                logits = checkpoint.load_model(out)(ids).logits
            exact = logits.contiguous().view(torch.int32).tolist()
            bits[str(out)] = [exact, True, True]
    assert load_in_a_fresh_interpreter(dict.fromkeys(bits, True)) == bits


def test_save_pretrained_keeps_the_structure(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    checkpoint.prune_checkpoint(
        source, plan_of(checkpoint.read_config(source), {1: 3}), tmp_path / "a"
    )
    model = checkpoint.load_model(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    a, b = (dict(checkpoint.read_tensors(tmp_path / name)) for name in ("a", "b"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def parts_plan(config: dict[str, Any], part: str, layers: tuple[int, ...]) -> Plan:
    family = family_of(config)
    kept = tuple({} for _ in range(family.dimensions(config).layers))
    skipped = {part: layers}
    left = remaining_parameters(family, config, kept, None, skipped)
    count = family.parameters(config)
    return Plan(family.name, config["model_type"], kept, {}, (count, left), skipped=skipped)


@pytest.mark.parametrize("layers", [(0, 2), (1, 2, 3)])
@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen3", "opt", "bloom", "glm"])
def test_a_removed_part_adds_nothing(name: str, part: str, layers: tuple[int, ...]) -> None:
    config = tiny_model(name).config.to_dict()
    plan = parts_plan(config, part, layers)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    small, reference = pruned(name, config, plan), masked(name, config, plan)
    with torch.inference_mode():
        expected = reference(IDS).logits
        assert relative_difference(small(IDS).logits, expected) < 1e-5
        assert relative_difference(with_cache(small, IDS), expected) < 1e-5
        assert relative_difference(tiny_model(name)(IDS).logits, expected) > 1e-2
    assert sum(p.numel() for p in small.parameters()) == plan.parameters[1] < plan.parameters[0]


def test_removed_parts_are_padded_with_zeros(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source, out, stock = tiny_checkpoint("llama"), tmp_path / "out", tmp_path / "stock"
    config = checkpoint.read_config(source)
    checkpoint.prune_checkpoint(source, parts_plan(config, "mlp", (1, 3)), out)
    checkpoint.export_stock(out, config, stock)
    assert "auto_map" not in checkpoint.read_config(stock)
    with torch.inference_mode():
        a, b = (checkpoint.load_model(d)(IDS).logits for d in (out, stock))
    assert relative_difference(a, b) < 1e-5


def test_a_plan_with_shared_blocks_round_trips(tmp_path: Path) -> None:
    plan = plan_of(tiny_config("llama"), {1: 3, 2: 0})
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["parameters"]["gross_ratio"] > data["parameters"]["removed_ratio"]
    assert data["removed_blocks"] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["shared"]["blocks"][0].update(base=2), "2 is not one that stays"),
        (lambda d: d["shared"]["blocks"][0].update(base=9), "9 is not one that stays"),
        (lambda d: d["shared"]["blocks"][1].update(place=4), "place 4 is out of range"),
        (lambda d: d["shared"]["blocks"][1].update(place=1), "increasing places"),
        (lambda d: d["shared"].update(rank=0), "at least 1"),
        (lambda d: d["shared"].pop("svd"), "malformed"),
        (lambda d: d.update(skipped={"mlp": [0]}), "do not go together"),
        (lambda d: (d.pop("shared"), d.update(skipped={"mlp": [1]})), "increasing and stay"),
        (lambda d: (d.pop("shared"), d.update(skipped={"norm": [0]})), "unknown part 'norm'"),
    ],
)
def test_what_is_not_a_plan_of_shared_blocks_is_refused(change: Any, message: str) -> None:
    data = plan_of(tiny_config("llama"), {1: 3, 2: 0}).to_dict()
    change(data)
    with pytest.raises(InputError, match=message):
        Plan.from_dict(data)


def test_what_shared_blocks_cannot_be_is_refused(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    config = checkpoint.read_config(source)
    plan = plan_of(config, {1: 3})
    checkpoint.prune_checkpoint(source, plan, tmp_path / "out")
    with pytest.raises(InputError, match="share weights cannot be written with zeros"):
        checkpoint.export_stock(tmp_path / "out", config, tmp_path / "stock")
    with pytest.raises(InputError, match="has virtual_layers"):
        family_of(
            checkpoint.unpruned_config(checkpoint.read_config(tmp_path / "out"))
            | {"per_layer_config": None}
        )
    for name, part, message in (
        ("opt-post-norm", "mlp", "normalises the residual stream"),
        ("qwen2-sliding", "attention", "differ in their attention"),
    ):
        other = tiny_model(name).config.to_dict()
        with pytest.raises(InputError, match=message):
            pruned_config(family_of(other), other, parts_plan(other, part, (1,)))
