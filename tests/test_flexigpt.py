"""FlexiGPT: blocks that use another block's weights, and a model made deeper by them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_config, tiny_model
from safetensors.torch import save_file
from test_pruned_equals_masked import (
    load_in_a_fresh_interpreter,
    masked,
    pruned,
    relative_difference,
    with_cache,
)

from prunelib import checkpoint, low_rank
from prunelib.cluster import scoring_work
from prunelib.cluster.geometry import (
    SharedLayers,
    computed_parameters,
    parameter_bound,
    shared_layers,
)
from prunelib.cluster.resources import request
from prunelib.cluster.settings import Cluster
from prunelib.criteria import block_distance
from prunelib.depth_selection import block_count
from prunelib.errors import InputError, IntegrityError, NonFiniteError
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import Node, closure
from prunelib.experiment.schema import load_catalogue
from prunelib.families import family_of
from prunelib.methods import create
from prunelib.methods.base import ScoringInputs
from prunelib.plan import Plan, SharedBlock
from prunelib.recovery import adapters, lora
from prunelib.recovery.lora import recover
from prunelib.recovery.recipe import LoraRecipe
from prunelib.replacement import shared_tensors
from prunelib.reporting import artefacts
from prunelib.reporting.published import published_names, read_published
from prunelib.rules import TARGET_KINDS, Sharer, Target
from prunelib.selection import check_reachable, select
from prunelib.sharing import publish
from prunelib.statistics import activations, influence
from prunelib.statistics.inputs import PassInputs
from prunelib.surgery import prune_tensors, pruned_config, remaining_parameters

Checkpoints = Callable[[str], Path]
IDS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
FULL = 1.0
CONFIG = Path(__file__).resolve().parents[1] / "config"
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]


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


@pytest.mark.long
def test_loads_in_a_fresh_interpreter(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """With the modelling file beside the weights alone; generates with cache and padding."""
    bits = {}
    ids = torch.arange(3, 19).view(2, 8)
    for name in ("llama", "qwen2-sliding", "opt", "bloom", "glm"):
        source = tiny_checkpoint(name)
        config = checkpoint.read_config(source)
        plans = {"replaced": plan_of(config, {1: 3, 2: 0})}
        if name in ("llama", "bloom"):
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


@pytest.mark.parametrize(
    ("layer", "entry"),
    [
        (1, {"base": 9, "rank": 4, "normalise": True}),
        (1, {"base": 2, "rank": 4, "normalise": True}),
        (1, {"base": "3", "rank": 4, "normalise": True}),
        (1, {"base": 3, "rank": 0, "normalise": True}),
        (1, {"base": 3, "rank": 4}),
        (0, {"without": "norm"}),
        (0, "nothing"),
    ],
)
def test_a_hostile_config_is_refused(
    layer: int, entry: Any, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    plan = plan_of(checkpoint.read_config(source), {1: 3, 2: 3})
    checkpoint.prune_checkpoint(source, plan, tmp_path)
    config = checkpoint.read_config(tmp_path)
    config["virtual_layers"][layer] = entry
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"virtual_layers\[{layer}\] is .*; allowed: "):
        checkpoint.load_model(tmp_path)
    config["virtual_layers"] = [{}]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="virtual_layers must be a list of 4 layers"):
        checkpoint.load_model(tmp_path)


# ------------------------------------------------------------ decompositions and distances


def decaying(rows: int, columns: int, seed: int) -> torch.Tensor:
    """A matrix whose singular values fall slowly, as those of weights do."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
    k = min(rows, columns)
    s = torch.arange(1, k + 1) ** -0.5
    return (u[:, :k] * s) @ v[:k]


@pytest.mark.parametrize(("shape", "rank"), [((40, 30), 30), ((200, 300), 8), ((300, 150), 12)])
def test_truncation_is_as_near_as_any(shape: tuple[int, int], rank: int) -> None:
    """Eckart and Young: nothing of that rank is nearer than the tail of the singular values."""
    matrix = decaying(*shape, seed=0)
    assert low_rank.is_exact(shape, rank) == (rank == 30)
    found = low_rank.truncated_svd(matrix, rank, seed=1)
    values = torch.linalg.svdvals(matrix)
    error = (matrix - (found.u * found.s) @ found.v.T).norm()
    assert error == pytest.approx(values[rank:].norm().item(), rel=2e-3, abs=1e-5)
    assert found.s == pytest.approx(values[:rank], rel=2e-2)
    again = low_rank.truncated_svd(matrix, rank, seed=1)
    assert torch.equal(again.u, found.u)


def test_the_distance_is_the_tail_of_the_difference() -> None:
    """Equation 2, from the matrices themselves."""
    rank = 5
    x, y = decaying(40, 30, 0), decaying(40, 30, 1) * 0.5
    a, b = (low_rank.truncated_svd(m, rank, 0) for m in (x, y))
    full = [(f.u * f.s) @ f.v.T for f in (a, b)]
    values = torch.linalg.svdvals(full[0].double() - full[1].double())
    expected = values[rank:].norm().item()
    assert expected > 0.1
    assert low_rank.truncated_distance(a, b, rank) == pytest.approx(expected, rel=1e-5)
    # A difference of two matrices of rank 5 has rank 10 at the most.
    assert low_rank.truncated_distance(a, b, 2 * rank) < 2e-4 * x.norm()
    assert low_rank.truncated_distance(a, a, rank) < 2e-4 * x.norm()


def test_residual_distances_of_larger_matrices() -> None:
    """Differences too large to be decomposed exactly."""
    matrices = [decaying(200, 300, i) for i in range(3)]
    assert not low_rank.is_exact(matrices[0].shape, 8)
    found = block_distance.residual_distances(matrices.__getitem__, 3, 8, seed=0)
    tails = [[torch.linalg.svdvals(a - b)[8:].norm().item() for b in matrices] for a in matrices]
    assert found == pytest.approx(np.array(tails), rel=2e-3)
    assert (found == found.T).all()


def test_distances_of_all_layers_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [decaying(12, 10, i) * (1 + i) for i in range(3)]

    def expected(scaled: bool) -> Any:
        cut = [low_rank.truncated_svd(m, 2, 0) for m in matrices]
        near = [(f.u * f.s) @ f.v.T for f in cut]
        near = [m / m.norm() if scaled else m for m in near]
        return [[torch.linalg.svdvals(a - b)[2:].norm().item() for b in near] for a in near]

    for scaled in (False, True):
        found = block_distance.truncated_distances(
            matrices.__getitem__, 3, 2, scaled=scaled, seed=0
        )
        assert found == pytest.approx(np.array(expected(scaled)), rel=1e-4, abs=1e-6)
    found = block_distance.residual_distances(matrices.__getitem__, 3, 2, seed=0)
    tails = [[torch.linalg.svdvals(a - b)[2:].norm().item() for b in matrices] for a in matrices]
    assert found == pytest.approx(np.array(tails), rel=1e-4, abs=1e-6)
    # Three rows of all layers at a time.
    monkeypatch.setattr(block_distance, "PIECE_BYTES", 3 * 8 * 3 * 10)
    found = block_distance.frobenius_distances(matrices.__getitem__, 3)
    plain = [[(a - b).norm().item() for b in matrices] for a in matrices]
    assert found == pytest.approx(np.array(plain), rel=1e-5, abs=1e-6)
    two = [np.array([[0.0, 3.0], [3.0, 0.0]]), np.array([[0.0, 4.0], [4.0, 0.0]])]
    assert block_distance.combined(two, "sum")[0, 1] == 7
    assert block_distance.combined(two, "squares")[0, 1] == 5


# ------------------------------------------------------------ influence


def influence_of(model: Any, part: str = "block", *, recompute: bool = False) -> Any:
    family, config = family_of(model.config.to_dict()), model.config.to_dict()
    return influence.collect(
        PassInputs(model, family, config, IDS, 2), part=part, recompute=recompute, seed=0
    )


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "glm", "opt-post-norm"])
def test_influence_of_blocks_is_that_of_the_shared_pass(name: str) -> None:
    model = tiny_model(name)
    config = model.config.to_dict()
    found = influence_of(model)["influence"]
    expected = activations.collect(PassInputs(model, family_of(config), config, IDS, 2))[
        "block_influence"
    ]
    assert found == pytest.approx(expected, abs=1e-7)


def without_blocks(model: Any, gone: list[int]) -> Any:
    """The model without some layers; caches are not asked for."""
    small = copy.deepcopy(model)
    small.model.layers = torch.nn.ModuleList(
        layer for i, layer in enumerate(small.model.layers) if i not in gone
    )
    small.config.num_hidden_layers = len(small.model.layers)
    return small


def test_greedy_removal_is_what_removing_one_by_one_gives() -> None:
    model = tiny_model("llama", seed=21)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = influence_of(model, recompute=True)
    gone: list[int] = []
    for removed in range(4):
        small = without_blocks(model, gone)
        left = [i for i in range(4) if i not in gone]
        config = small.config.to_dict()
        values = activations.collect(PassInputs(small, family_of(config), config, IDS, 2))[
            "block_influence"
        ]
        at = int(values.argmin())
        assert found["influence_when_removed"][removed].item() == pytest.approx(values[at].item())
        gone.append(left[at])
    assert found["order"].tolist() == gone
    # Else this test would not tell greedy removal from the ranking at once.
    assert gone != found["influence"].argsort().tolist()
    scores = create("shortgpt", {"recompute": True}).scores(
        ScoringInputs(None, {}, None, {"influence": found}, 0)  # type: ignore[arg-type]
    )
    assert np.argsort(scores["block"][0]).tolist() == gone
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "glm"])
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_influence_of_parts(name: str, part: str) -> None:
    """A part that adds nothing has none, and what the other one does is no part of it."""
    model = tiny_model(name)
    config = model.config.to_dict()
    family = family_of(config)
    outputs = dict(zip(("attention", "mlp"), family.output_maps(config), strict=True))
    other = {"attention": "mlp", "mlp": "attention"}[part]
    for layer, which in ((1, part), (2, other)):
        module = family.layers(model)[layer].get_submodule(outputs[which])
        with torch.no_grad():
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
    found = influence_of(model, part)["influence"]
    whole = influence_of(model)["influence"]
    assert abs(found[1].item()) < 1e-6
    assert found.argmin().item() == 1
    # All that layer 2 does is done by this part.
    assert found[2].item() == pytest.approx(whole[2].item(), abs=1e-6)
    greedy = influence_of(model, part, recompute=True)
    assert sorted(greedy["order"].tolist()) == [0, 1, 2, 3]
    assert greedy["order"][0] == 1
    assert torch.equal(influence_of(model, part)["influence"], found), "a part was not put back"


def test_influence_refuses() -> None:
    with pytest.raises(InputError, match="part 'head' is unknown"):
        influence_of(tiny_model("llama"), "head")
    with pytest.raises(InputError, match="normalises the residual stream"):
        influence_of(tiny_model("opt-post-norm"), "mlp")
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.layers[2].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="at layer 2"):
        influence_of(broken)
    with pytest.raises(InputError, match="remove 'head' is unknown"):
        create("shortgpt", {"remove": "head"})


# ------------------------------------------------------------ selection


def geometry(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((CONFIG / "models" / f"{name}.json").read_text())
    return data


def influences(count: int, lowest: list[int]) -> Any:
    """Scores whose lowest are at ``lowest``, in this order."""
    values = np.full(count, 9.0) + np.arange(count)
    values[lowest] = np.arange(len(lowest))
    return [values]


def test_bases_are_blocks_that_stay() -> None:
    """The nearest of all is removed itself; ties go to the closer block."""
    config = tiny_config("llama")
    distances = np.array(
        [
            [0.0, 1.0, 2.0, 2.0],
            [1.0, 0.0, 0.1, 5.0],
            [2.0, 0.1, 0.0, 2.0],
            [2.0, 5.0, 2.0, 0.0],
        ]
    )
    scores = {"block": influences(4, [2, 1]), "distance": list(distances)}
    rule = create("flexigpt", {"rank": 4}).rule()
    plan = select(scores, family_of(config), config, Target("blocks", 2), rule, {})
    assert plan.removed_blocks == (1, 2)
    assert plan.sharing is not None
    assert [(b.place, b.base, b.like) for b in plan.sharing.blocks] == [(1, 0, 1), (2, 3, 2)]
    rng = np.random.default_rng(0)
    for blocks in (1, 2, 3):
        for _ in range(20):
            scores = {"block": [rng.random(4)], "distance": list(rng.random((4, 4)))}
            plan = select(scores, family_of(config), config, Target("blocks", blocks), rule, {})
            assert plan.sharing is not None
            bases = {block.base for block in plan.sharing.blocks}
            assert not bases & set(plan.removed_blocks)
    with pytest.raises(InputError, match="distance must be 4 arrays of 4 distances"):
        select({"block": [np.ones(4)]}, family_of(config), config, Target("blocks", 1), rule, {})
    broken = distances.copy()
    broken[2, 0] = math.nan
    with pytest.raises(NonFiniteError, match="distance of blocks 2 and 0"):
        select(
            {"block": influences(4, [2]), "distance": list(broken)},
            family_of(config),
            config,
            Target("blocks", 1),
            rule,
            {},
        )


def base_of(distance: str, state: dict[str, torch.Tensor]) -> int:
    """The base of block 2, the least influential, of a tiny LLaMA with these weights."""
    config = tiny_model("llama").config.to_dict()
    passes = {"activations": {"block_influence": torch.tensor([4.0, 3.0, 1.0, 2.0])}}
    method = create("flexigpt", {"rank": 4, "distance": distance})
    inputs = ScoringInputs(family_of(config), config, state.__getitem__, passes, 0)
    scores = method.scores(inputs)
    assert scores["block"][0].tolist() == [4, 3, 1, 2]
    found = np.array(scores["distance"])
    assert found == pytest.approx(found.T)
    plan = select(scores, family_of(config), config, Target("blocks", 1), method.rule(), {})
    assert plan.sharing is not None
    return plan.sharing.blocks[0].base


def twins() -> dict[str, torch.Tensor]:
    """Weights of which block 2's are block 0's with a little noise."""
    state = tiny_model("llama").state_dict()
    torch.manual_seed(0)
    for name in list(state):
        if name.startswith("model.layers.2.") and state[name].ndim == 2:
            twin = state[name.replace(".2.", ".0.", 1)]
            state[name] = twin + 0.01 * torch.randn_like(twin)
    return state


@pytest.mark.parametrize("distance", ["truncated", "scaled", "frobenius", "residual", "nearest"])
def test_distances_find_the_twin(distance: str) -> None:
    assert base_of(distance, twins()) == (1 if distance == "nearest" else 0)


def test_small_blocks_are_near_to_all_unless_matrices_are_scaled() -> None:
    """Without block 3 all of block 2 fits into an adapter, and block 3 is nearly nothing."""
    state = twins()
    for name in state:
        if name.startswith("model.layers.3.") and state[name].ndim == 2:
            state[name] = 0.01 * state[name]
    assert base_of("truncated", state) == 3
    assert base_of("scaled", state) == 0


def flexi_plan(model: str, target: Target, **parameters: Any) -> Plan:
    config = geometry(model)
    count = int(config["num_hidden_layers"])
    index = np.arange(count, dtype=float)
    scores = {
        "block": influences(count, list(range(count - 6, 3, -1))),
        "distance": list(np.abs(index[:, None] - index)),
    }
    rule = create("flexigpt", parameters).rule()
    return select(scores, family_of(config), config, target, rule, {})


# Llama-2-7B has LLaMA-7B's shapes. By hand: 256 (4 x 2 x 4096 + 3 x (4096 + 11008)) in adapters,
# two gains and two norms of 4096.
EACH = 19_988_480 + 4 * 4096


@pytest.mark.parametrize(
    ("blocks", "percent"), [(6, 18.02), (7, 21.02), (9, 27.03), (10, 30.03), (13, 39.04)]
)
def test_published_shares_of_blocks(blocks: int, percent: float) -> None:
    plan = flexi_plan("llama-7b", Target("blocks", blocks))
    assert 100 * plan.gross_removed_ratio == pytest.approx(percent, abs=0.005)
    assert plan.sharing is not None
    assert plan.sharing.parameters == blocks * EACH
    assert plan.parameters[1] == 6_738_415_616 - blocks * (202_383_360 - EACH)
    plain = flexi_plan("llama-7b", Target("blocks", blocks), normalise=False)
    assert plain.sharing is not None
    assert plan.sharing.parameters - plain.sharing.parameters == blocks * 2 * 4096


def test_parameter_targets_are_net() -> None:
    """30 %: 11 blocks with adapters, where ShortGPT removes 10."""
    plan = flexi_plan("llama-7b", Target("parameters", 0.3))
    assert len(plan.removed_blocks) == 11
    assert plan.removed_ratio == pytest.approx(11 * (202_383_360 - EACH) / 6_738_415_616)
    assert abs(plan.removed_ratio - 0.3) < 0.015
    assert plan.gross_removed_ratio == pytest.approx(0.3304, abs=1e-4)
    config = geometry("llama-7b")
    rule = create("shortgpt", {}).rule()
    assert block_count(family_of(config), config, Target("parameters", 0.3), rule) == 10
    # One of 218,112,000 less its adapters: 256 (2 x 8192 + 2 x 5120 + 3 x 18432).
    plan = flexi_plan("llama-3-8b", Target("parameters", 0.3))
    each = 256 * (2 * 8192 + 2 * 5120 + 3 * 18432) + 4 * 4096
    removed = len(plan.removed_blocks)
    assert removed == round(0.3 * 8_030_261_248 / (218_112_000 - each)) == 12
    assert plan.parameters[1] == 8_030_261_248 - 12 * (218_112_000 - each)


def test_models_of_the_published_size_can_be_built() -> None:
    """Independent of the plan's arithmetic: the modules themselves, without their weights."""
    for name in ("llama-7b", "opt-6.7b", "bloom-7b1", "glm-4-9b"):
        config = geometry(name)
        layers = family_of(config).dimensions(config).layers
        index = np.arange(layers, dtype=float)
        scores = {
            "block": influences(layers, [20, 21, 22]),
            "distance": list(np.abs(index[:, None] - index)),
        }
        rule = create("flexigpt", {}).rule()
        plan = select(scores, family_of(config), config, Target("blocks", 3), rule, {})
        new, _ = pruned_config(family_of(config), config, plan)
        with torch.device("meta"):
            model = checkpoint.build_model(new, lambda cls, parsed: cls(parsed))
        assert sum(p.numel() for p in model.parameters()) == plan.parameters[1]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rank": 0}, "rank 0 given"),
        ({"rank": 1.5}, r"share in \(0, 1\], allowed"),
        ({"gain": 0.0}, "gain 0.0 given"),
        ({"distance": "far"}, "distance 'far' is unknown; allowed: truncated"),
        ({"combination": "product"}, "combination 'product' is unknown"),
        ({"iterative_steps": 2}, "not for block units"),
    ],
)
def test_refused_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create("flexigpt", parameters)


def test_targets_that_adapters_do_not_reach_are_refused() -> None:
    config = geometry("smollm2-135m")
    family = family_of(config)
    rule = create("flexigpt", {"rank": 512}).rule()
    with pytest.raises(InputError, match="a smaller rank allowed"):
        check_reachable(family, config, Target("parameters", 0.2), rule)
    # 32 of 576: 9.2 % of a block of 3,540,096.
    small = create("flexigpt", {"rank": 32}).rule()
    assert small.sharer is not None
    assert small.sharer.parameters(family, config) == 32 * 10_176 + 4 * 576
    with pytest.raises(InputError, match="at least one must stay"):
        check_reachable(family, config, Target("parameters", 0.9), small)
    with pytest.raises(InputError, match="target layers: this method prunes block"):
        check_reachable(family, config, Target("layers", 40), small)
    other = tiny_config("opt-post-norm")
    part = create("shortgpt", {"remove": "mlp"}).rule()
    with pytest.raises(InputError, match="remove mlp: this opt model normalises"):
        check_reachable(family_of(other), other, Target("blocks", 1), part)


# ------------------------------------------------------------ extension


@pytest.mark.parametrize(
    ("order", "count", "expected"),
    [
        ("block", 8, "0 1 1 2 2 3 4 5"),
        ("sequential", 8, "0 1 2 1 2 3 4 5"),
        ("block", 10, "0 1 1 1 2 2 2 3 4 5"),
        ("sequential", 10, "0 1 2 1 2 1 2 3 4 5"),
        ("block", 6, "0 1 2 3 4 5"),
    ],
)
def test_orders_by_hand(order: str, count: int, expected: str) -> None:
    config = tiny_config("llama") | {"num_hidden_layers": 6}
    rule = create("flexigpt_extend", {"rank": 4, "start": 1, "end": 2, "order": order}).rule()
    scores = {"block": [np.zeros(6)]}
    plan = select(scores, family_of(config), config, Target("layers", count), rule, {})
    found = [x if isinstance(x, int) else x.base for x in plan.layers]
    assert " ".join(map(str, found)) == expected
    # The first one has its own weights, all others its.
    assert len(plan.places) == 6
    seen: set[int] = set()
    for layer in plan.layers:
        base = getattr(layer, "base", layer)
        assert isinstance(layer, int) == (base not in seen)
        seen.add(base)
    more = plan.parameters[1] - plan.parameters[0]
    assert more == (count - 6) * family_of(config).shared_parameters(config, 4, True)


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "glm"])
@pytest.mark.parametrize("order", ["block", "sequential"])
def test_repetitions_begin_as_repetitions(name: str, order: str) -> None:
    """Adapters at zero and no normalisation: the stock model that runs its layers again."""
    dense = tiny_model(name)
    config = dense.config.to_dict()
    family = family_of(config)
    parameters = {"rank": 4, "start": 1, "end": 2, "order": order, "normalise": False}
    rule = create("flexigpt_extend", parameters).rule()
    plan = select({"block": [np.zeros(4)]}, family, config, Target("layers", 6), rule, {})
    model = shared(name, plan)
    layers = family.layers(dense)
    order_of = [0, 1, 1, 2, 2, 3] if order == "block" else [0, 1, 2, 1, 2, 3]
    parent, _, own = family.layer_prefix.rpartition(".")
    setattr(dense.get_submodule(parent), own, torch.nn.ModuleList(layers[i] for i in order_of))
    for key in ("num_hidden_layers", "n_layer"):
        if hasattr(dense.config, key):
            setattr(dense.config, key, 6)
    with torch.inference_mode():
        expected = dense(IDS, use_cache=False).logits
        assert relative_difference(model(IDS).logits, expected) < 1e-5
        assert relative_difference(with_cache(model, IDS), expected) < 1e-5


def test_targets_of_extensions() -> None:
    config = geometry("tinyllama-1.1b")
    family = family_of(config)
    rule = create("flexigpt_extend", {"start": 4, "end": 17}).rule()
    check_reachable(family, config, Target("layers", 36), rule)
    check_reachable(family, config, Target("parameters", 0.0), rule)
    with pytest.raises(InputError, match="adds a multiple of 14 to 22 layers; allowed: 36, 50"):
        check_reachable(family, config, Target("layers", 40), rule)
    with pytest.raises(InputError, match="repeats blocks and removes none; allowed: layers"):
        check_reachable(family, config, Target("parameters", 0.3), rule)
    beyond = create("flexigpt_extend", {"start": 10, "end": 22}).rule()
    with pytest.raises(InputError, match=r"end 22 given; the model has blocks 0\.\.21"):
        check_reachable(family, config, Target("layers", 35), beyond)
    for parameters, message in (
        ({"order": "random"}, "order 'random' is unknown; allowed: block, sequential"),
        ({"start": 5, "end": 4}, "0 <= start <= end allowed"),
    ):
        with pytest.raises(InputError, match=message):
            create("flexigpt_extend", parameters)


# ------------------------------------------------------------ recovery

RECIPE = LoraRecipe(
    r=2, alpha=4, dropout=0.1, lr=0.02, batch=2, micro_batch=1, max_steps=4, warmup_steps=0,
    length=12, save_every=2,
)  # fmt: skip


def train(source: Path, path: Path, recipe: LoraRecipe = RECIPE) -> Path:
    """Recover the checkpoint in ``source``; what is trained is written to ``path``/out."""
    windows = torch.randint(0, 97, (8, 12), generator=torch.Generator().manual_seed(7))
    model = checkpoint.load_model(source)
    fixed = {"seed": 3, "state": path / "state", "out": path / "out", "base": "../x"}
    recover(model, windows, recipe, device="cpu", dtype="float32", **fixed)  # type: ignore[arg-type]
    return path / "out"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Checkpoints) -> Path:
    source, out = tiny_checkpoint("llama"), tmp_path_factory.mktemp("small") / "model"
    checkpoint.prune_checkpoint(source, plan_of(checkpoint.read_config(source), {1: 3, 2: 3}), out)
    return out


@pytest.mark.parametrize("kept_lora", [False, True])
def test_what_is_trained(kept_lora: bool, small: Path, tmp_path: Path) -> None:
    out = train(small, tmp_path, replace(RECIPE, kept_lora=kept_lora))
    model = checkpoint.load_model(small)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = adapters.merge(model, out)
    changed = {
        name
        for name, tensor in merged.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    own = set(adapters.shared_parameters(merged))
    # Seven matrices of two layers with two factors each, and two gains.
    assert len(own) == 2 * (7 * 2 + 2)
    matrices = {f"model.layers.{i}.{n}.weight" for i in (0, 3) for n in LINEARS}
    assert changed == own | (matrices if kept_lora else set())
    assert (out / "adapter_model.safetensors").exists() == kept_lora
    # Merged or not, it is the same function, and weights are shared as before.
    checkpoint.save_like(merged, small, tmp_path / "merged")
    again, recovered = (
        checkpoint.load_model(tmp_path / "merged"),
        adapters.load_recovered(small, out),
    )
    base = again.model.layers[3].mlp.up_proj
    assert again.model.layers[1].mlp.up_proj.base is base
    assert sum(p.numel() for p in again.parameters()) == Plan.load(small).parameters[1]
    with torch.inference_mode():
        expected = recovered(IDS).logits
        assert relative_difference(again(IDS).logits, expected) < 1e-5
        assert relative_difference(with_cache(recovered, IDS), expected) < 1e-5
        assert relative_difference(checkpoint.load_model(small)(IDS).logits, expected) > 1e-3
    meta = json.loads((out / "meta.json").read_text())
    assert meta["method"] == ("lora" if kept_lora else "trained")
    # Rank 2 on q, k, v, o and the MLP of two layers.
    more = 2 * 2 * (96 + 72 + 72 + 96 + 3 * 88) if kept_lora else 0
    assert meta["trainable_parameters"] == sum(before[name].numel() for name in own) + more


@pytest.mark.parametrize("kept_lora", [False, True])
def test_an_interrupted_recovery_ends_with_the_same_bytes(
    kept_lora: bool, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, kept_lora=kept_lora)
    whole = train(small, tmp_path / "whole", recipe)
    step = lora.train_step

    def killed(*args: Any, **kwargs: Any) -> float:
        if args[6] == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(lora, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(small, tmp_path / "broken", recipe)
    monkeypatch.undo()
    steps: list[int] = []
    monkeypatch.setattr(lora, "train_step", lambda *a, **k: steps.append(a[6]) or step(*a, **k))
    again = train(small, tmp_path / "broken", recipe)
    assert steps == [3, 4]
    names = {path.name for path in whole.iterdir()}
    assert names == {path.name for path in again.iterdir()}
    for name in names:
        assert (whole / name).read_bytes() == (again / name).read_bytes(), name


@pytest.mark.parametrize(
    ("source", "change"),
    [
        ("shared", {}),
        ("shared", {"kept_lora": True}),
        ("shared", {"train": ("*norm.weight",)}),
        ("plain", {"train": ("*norm.weight",)}),
        ("plain", {"train": ("*embed_tokens.weight",), "targets": ()}),
    ],
)
def test_bf16_weights_beside_what_is_trained_in_fp32(
    source: str,
    change: dict[str, Any],
    small: Path,
    tiny_checkpoint: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What runs on a GPU: there bf16 weights stay bf16."""

    def place(model: Any, device: torch.device, dtype: torch.dtype) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()

    monkeypatch.setattr(lora, "_place", place)
    found = small if source == "shared" else tiny_checkpoint("llama")
    out = train(found, tmp_path, replace(RECIPE, max_steps=12, **change))
    told = json.loads((out / "meta.json").read_text())
    assert told["last_loss"] < told["first_loss"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.popitem(), IntegrityError, "is absent, the model needs"),
        (lambda t: t.update(x=torch.zeros(1)), IntegrityError, "the model needs absent"),
        (lambda t: t[min(t)].fill_(math.nan), NonFiniteError, "NaN or infinity"),
        (None, IntegrityError, "trained.safetensors is missing"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: Any, error: type[Exception], message: str, small: Path, tmp_path: Path
) -> None:
    model = checkpoint.load_model(small)
    tensors = {n: p.detach().clone() for n, p in adapters.shared_parameters(model).items()}
    if change is not None:
        change(tensors)
        save_file(tensors, tmp_path / "trained.safetensors")
    with pytest.raises(error, match=message):
        adapters.attach(model, tmp_path)


def test_a_plain_model_takes_nothing_of_shared_layers(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "trained.safetensors")
    with pytest.raises(IntegrityError, match="the model needs absent"):
        adapters.attach(tiny_model("llama"), tmp_path)
    with pytest.raises(InputError, match="kept_lora is 1; allowed: true, false"):
        replace(RECIPE, kept_lora=1)


# ------------------------------------------------------------ experiments and published figures

EXPERIMENTS = sorted(
    path.stem
    for pattern in ("flexigpt_*", "shortgpt_*", "study_flexigpt*", "study_shortgpt*")
    for path in (CONFIG / "experiments").glob(f"{pattern}.yaml")
)


def every_node(experiment: Experiment) -> list[Node]:
    waiting = [node for cell in experiment.cells for node in cell.steps.values()]
    found: dict[int, Node] = {}
    while waiting:
        node = waiting.pop()
        if id(node) not in found:
            found[id(node)] = node
            waiting += node.inputs.values()
    return list(found.values())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_plan(name: str) -> None:
    experiment = Experiment.load(CONFIG / "experiments" / f"{name}.yaml", CONFIG)
    problems = experiment.preflight()
    assert all("the revision is not pinned" in problem for problem in problems)
    assert bool(problems) != name.startswith("study_")
    nodes = every_node(experiment)
    cluster = Cluster.load(CONFIG / "cluster.yaml")
    # Seeds change nothing here.
    own = [node for node in nodes if not {"seed1", "seed2"} & set(node.labels)]
    assert {"prune", "scores", "perplexity"} <= {node.step for node in own}
    for node in own:
        # Refused where it takes more memory than there is.
        request(node, cluster)


@pytest.mark.parametrize(
    ("name", "like", "change"),
    [
        ("flexigpt_1b_kept", "flexigpt_1b", {"kept_lora": True}),
        ("flexigpt_10b", "flexigpt_1b", {"tokens": 10_000_000_000}),
        ("adapters_12k_kept", "adapters_12k", {"kept_lora": True}),
        ("lora_quick_no_mlp", "lora_quick", {"targets": ["attention"]}),
        ("lora_quick_no_attention", "lora_quick", {"targets": ["mlp"]}),
    ],
)
def test_recipes_differ_in_what_they_are_named_after(
    name: str, like: str, change: dict[str, Any]
) -> None:
    catalogue = load_catalogue(CONFIG, "recovery")
    entry = catalogue[like]
    assert catalogue[name] == {**entry, "recipe": entry["recipe"] | change}


def test_ablations_share_scores_where_they_can() -> None:
    experiment = Experiment.load(CONFIG / "experiments" / "flexigpt_ablation.yaml", CONFIG)
    scores = {
        cell.method: cell.steps["prune"].inputs["scores"].key
        for cell in experiment.cells
        if "prune" in cell.steps and cell.seed == 0
    }
    assert scores["flexigpt"] == scores["flexigpt_no_norm"] == scores["flexigpt_no_svd"]
    others = {scores[f"flexigpt_{name}"] for name in ("frobenius", "scaled", "nearest")}
    assert len(others | {scores["flexigpt"]}) == 4


@pytest.mark.parametrize("name", ["flexigpt_ablation", "study_flexigpt_training"])
def test_recoveries_that_train_alike_are_one(name: str) -> None:
    """LoRA on what is not shared is all LoRA where nothing is; every row stays."""
    experiment = Experiment.load(CONFIG / "experiments" / f"{name}.yaml", CONFIG)
    plain, kept = experiment.data["recovery"]
    found: dict[tuple[Any, ...], dict[str, dict[str, Path]]] = {}
    for cell in experiment.cells:
        if cell.recovery != "none":
            places = {step: node.directory for step, node in cell.steps.items()}
            row = found.setdefault((cell.method, cell.target, cell.seed), {})
            row[cell.recovery] = places
    assert {"recovery_only", "shortgpt"} < {method for method, _, _ in found}
    for (method, _, _), row in found.items():
        assert set(row) == {plain, kept}
        shares = method.startswith("flexigpt")
        assert (row[plain] == row[kept]) != shares, method
        assert (row[plain]["recovery"] == row[kept]["recovery"]) != shares
        assert row[plain]["recovery"].parent.name == plain
    # None of them has two places.
    closure(node for cell in experiment.cells for node in cell.steps.values())
    assert len({cell.id for cell in experiment.cells}) == len(experiment.cells)


def prune_node(name: str, variant: str) -> tuple[Node, Node]:
    """The steps that prune and that recover a variant."""
    experiment = Experiment.load(CONFIG / "experiments" / f"{name}.yaml", CONFIG)
    cell = next(c for c in experiment.cells if c.method == variant and "recovery" in c.steps)
    return cell.steps["prune"], cell.steps["recovery"]


def test_resources_by_hand() -> None:
    node, recovery = prune_node("flexigpt_llama2_7b", "flexigpt")
    assert shared_layers(node) == SharedLayers(11, EACH, 256, repeated=False)
    left = 6_738_415_616 - 11 * (202_383_360 - EACH)
    assert parameter_bound(node) == left
    assert computed_parameters(node) == 6_738_415_616 + 11 * EACH
    node, _ = prune_node("flexigpt_tinyllama", "flexigpt_extend_block")
    config = geometry("tinyllama-1.1b")
    each = family_of(config).shared_parameters(config, 256, True)
    block = family_of(config).block_parameters(config)
    assert parameter_bound(node) == 1_100_048_384 + 14 * each
    assert computed_parameters(node) == 1_100_048_384 + 14 * (each + block)
    # What LoRA asks for is not what is trained here.
    cluster = Cluster.load(CONFIG / "cluster.yaml")
    plain = prune_node("flexigpt_llama2_7b", "shortgpt")[1]
    assert request(recovery, cluster).disk_mb * 2**20 == pytest.approx(4 * 11 * EACH, rel=0.01)
    assert request(plain, cluster).disk_mb * 2**20 == pytest.approx(4 * 32 * 19_988_480, rel=0.01)
    assert scoring_work.OVERSAMPLE == low_rank.OVERSAMPLE
    assert scoring_work.ITERATIONS == low_rank.ITERATIONS


def test_distances_cost_a_decomposition_of_every_matrix() -> None:
    node, _ = prune_node("flexigpt_llama2_7b", "flexigpt")
    cluster = Cluster.load(CONFIG / "cluster.yaml")
    asked = request(node.inputs["scores"], cluster)
    # By hand, without the orthogonalisation: eight products with 288 columns each.
    products = 32 * 16 * 288 * (4 * 4096**2 + 3 * 4096 * 11008)
    pairs = 496 * 7 * 4 * 10 * 512**3
    least = (products + pairs) / (cluster.host.gflops_per_core * 1e9 * cluster.utilisation.cpu)
    assert least < asked.seconds < 2.5 * least
    residual = replace(
        node.inputs["scores"],
        params=node.inputs["scores"].params | {"parameters": {"distance": "residual"}},
    )
    # A decomposition of every pair in the place of one of every matrix.
    least *= products / (products + pairs) * 496 / 32
    assert least < request(residual, cluster).seconds < 2.5 * least
    nearest = next(
        n
        for n in every_node(
            Experiment.load(CONFIG / "experiments" / "flexigpt_ablation.yaml", CONFIG)
        )
        if n.step == "scores" and n.params["parameters"] == {"distance": "nearest"}
    )
    assert request(nearest, cluster).seconds < 60


def test_published_figures() -> None:
    rows = {
        name: read_published(CONFIG / "published" / f"{name}.csv")
        for name in ("flexigpt", "shortgpt")
    }
    order = sorted(
        (row.metric, int(row.value))
        for row in rows["shortgpt"]
        if row.metric.startswith("removed_block_")
    )
    assert [block for _, block in order] == [27, 26, 25, 28, 24, 29, 23, 21, 22]

    def value(method: str, share: float, recovered: bool, metric: str, table: str) -> float:
        (row,) = (
            r
            for r in rows["flexigpt"]
            if (r.method, r.target_value, r.recovered, r.metric)
            == (method, share, recovered, metric)
            and r.table.startswith(table)
        )
        return row.value

    table = "pruning of Llama-2-7B"
    assert value("flexigpt", 0.3, True, "perplexity", table) == 6.55
    assert value("shortgpt", 0.4, False, "winogrande_acc", table) == 60.54
    assert value("flexigpt_no_norm", 0.3, False, "perplexity", "ablation") == 8648.94
    assert value("flexigpt_extend_block", 36, True, "perplexity", "extension") == 6.73
    # All averages follow from their columns but for the two that the table itself flags.
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows["flexigpt"]:
        key = (row.table, row.model, row.method, row.target_value, row.recovered)
        groups.setdefault(key, {})[row.metric] = row
    wrong = []
    for found in groups.values():
        tasks = [r.value for metric, r in found.items() if metric.endswith(("_acc", "_acc_norm"))]
        if tasks and abs(np.mean(tasks) - found["average_5_tasks"].value) > 0.011:
            wrong.append(found["average_5_tasks"])
    assert [row.value for row in wrong] == [61.40, 62.68]
    assert all("the columns average" in row.source for row in wrong)
    # An ablation is not filed under the method's own name.
    names = published_names(
        "flexigpt_no_norm", {"method": "flexigpt", "parameters": {"normalise": False}}
    )
    assert "flexigpt" not in names
    assert "flexigptnonorm" in names
    assert "flexigpt" in published_names("flexigpt", {"method": "flexigpt"})


def test_computed_adapters_are_published_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The light form copies weights; what a decomposition gives differs between machines."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config("llama")
    for plan, expected in (
        (plan_of(config, {1: 3}), True),
        (parts_plan(config, "mlp", (1,)), False),
    ):
        node = Node("prune", ("x",), {"shared": expected}, {})
        node.directory.mkdir(parents=True)
        plan.save(node.directory)
        assert publish._computed(node) == expected


def test_reports_know_targets_in_layers() -> None:
    """All kinds of targets that selection knows."""
    assert set(artefacts.TARGET_KINDS) == set(TARGET_KINDS)
    target = artefacts._parse_target({"kind": "layers", "value": 40}, "cells[0]")
    assert target is not None
    assert target.label == "layers 40"


def test_study_tables_have_both_shares(tmp_path: Path) -> None:
    from benchmarks.study_table import markdown

    head = "cell,target,recovery,method,control,status,seed,perplexity,realised_ratio"
    rows = [
        "d,none,none,dense,dense,complete,,10,0",
        "a,t,none,flexigpt,,complete,0,20,0.2",
        "b,t,none,flexigpt,,complete,1,22,0.22",
        "c,t,none,shortgpt,,complete,0,30,0.25",
    ]
    (tmp_path / "plain.csv").write_text("\n".join([head, *rows]) + "\n")
    gross = ["", "0.3", "0.32", ""]
    both = [f"{row},{share}" for row, share in zip(rows, gross, strict=True)]
    (tmp_path / "gross.csv").write_text("\n".join([f"{head},gross_ratio", *both]) + "\n")
    found = markdown([tmp_path / "gross.csv", tmp_path / "plain.csv"]).splitlines()
    assert "| removed | adapters not counted | perplexity |" in found[2]
    assert "| flexigpt | 21.00% | 31.00% | 21.0 |" in found[4]
    assert "| shortgpt | 25.00% | 25.00% | 30.0 |" in found[5]
    assert "adapters" not in markdown([tmp_path / "plain.csv"])
    trained = ["", "3000000", "3000000", ""]
    more = [f"{row},{count}" for row, count in zip(rows, trained, strict=True)]
    (tmp_path / "trained.csv").write_text("\n".join([f"{head},trained_parameters", *more]) + "\n")
    found = markdown([tmp_path / "trained.csv"]).splitlines()
    assert "| flexigpt | 21.00% | 3.00 M | 21.0 |" in found[4]
    assert "| shortgpt | 25.00% |  | 30.0 |" in found[5]


def test_study_compares_at_equal_net_parameters() -> None:
    """By hand: a block of the embedded model has 3,540,096 parameters, what replaces it 327,936.

    Nine and twelve replaced blocks are within half a point of eight and eleven removed ones; heads
    and channels meet the shares themselves.
    """
    experiment = Experiment.load(CONFIG / "experiments" / "study_flexigpt.yaml", CONFIG)
    config = geometry("smollm2-135m")
    family = family_of(config)
    index = np.arange(30.0)
    depth = {"block": [index], "distance": list(np.abs(index[:, None] - index))}
    width = {
        kind: [np.arange(float(family.kind(config, kind).count))] * 30
        for kind in ("kv_group", "mlp_channel")
    }
    expected = {
        0.213: {"shortgpt": 8 * 3_540_096, "flexigpt_r32": 9 * 3_212_160},
        0.288: {"shortgpt": 11 * 3_540_096, "flexigpt_r32": 12 * 3_212_160},
    }
    for target in experiment.targets:
        for name, method in experiment.methods.items():
            rule = method.rule()
            scores = depth if rule.kinds == ("block",) else width
            plan = select(scores, family, config, target, rule, {})
            removed = plan.parameters[0] - plan.parameters[1]
            assert removed == expected[target.value].get(name, removed), name
            assert abs(removed / plan.parameters[0] - target.value) < 0.0035, name


def test_correlations_of_distances_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CONFIG.parent / "benchmarks"))
    from benchmarks.flexigpt_bases import correlations

    # Block 1 goes; 0, 2, 3 and 4 are ever farther the larger they are.
    sizes = np.array([3.0, 0, 1, 4, 2])
    distances = np.tile(sizes, (5, 1))
    size, other, place = correlations(distances, (sizes, -sizes), [1])
    assert (size, other) == (pytest.approx(1), pytest.approx(-1))
    # 3, 1, 4, 2 beside 1, 1, 2, 3 places: ranks 2, 0, 3, 1 beside .5, .5, 2, 3, products of 1,
    # squares of 5 and 4.5.
    assert place == pytest.approx(1 / math.sqrt(5 * 4.5))


def test_ratios_of_speeds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CONFIG.parent / "benchmarks"))
    from benchmarks.checkpoint_speed import ratio

    mean, low, high = ratio([2.0, 8.0], [1.0, 2.0])
    assert mean == pytest.approx(math.sqrt(8))
    # The logarithms are ln 2 and ln 4: 12.706 standard errors of ln(2) / 2.
    assert math.log(high / mean) == pytest.approx(12.70620 * math.log(2) / 2, rel=1e-4)
    assert math.log(mean / low) == pytest.approx(math.log(high / mean))
    assert all(map(math.isnan, ratio([2.0], [1.0])[1:]))


def test_truncated_distances_are_bounded_by_both_matrices() -> None:
    """Either matrix alone is a correction of the rank, so that the other one is what is left."""
    drawn = torch.Generator().manual_seed(3)
    sizes = (0.01, 1.0, 1.0)
    matrices = [size * torch.randn(12, 20, generator=drawn) for size in sizes]
    found = block_distance.truncated_distances(lambda i: matrices[i], 3, 4, scaled=False, seed=0)
    norms = [float(low_rank.truncated_svd(matrix, 4, 0).s.norm()) for matrix in matrices]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert found[i, j] <= min(norms[i], norms[j]) * (1 + 1e-6)
    # So that block 0 is the nearest to both others.
    assert found[1, 0] < found[1, 2]
