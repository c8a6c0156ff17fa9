"""Rankers of blocks and of their parts: what they measure, and that they measure it cheaply."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_config, tiny_model
from test_pruned_equals_masked import (
    load_in_a_fresh_interpreter,
    relative_difference,
    with_cache,
)

from prunelib import checkpoint
from prunelib.cluster import scoring_work
from prunelib.cluster.resources import request
from prunelib.cluster.settings import Cluster
from prunelib.criteria.depth import absent_minus_present, chain_marginals, order_scores
from prunelib.errors import InputError, NonFiniteError
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import closure
from prunelib.families import family_of
from prunelib.families.modeling_shared import remove_part
from prunelib.methods import create
from prunelib.methods.base import ScoringInputs
from prunelib.plan import MergedBlock, Plan, merged_layers
from prunelib.provenance import artefact
from prunelib.provenance.step import StepRequest
from prunelib.reporting.published import read_published
from prunelib.rules import Target
from prunelib.selection import check_reachable, select
from prunelib.statistics import (
    coalitions,
    emulation,
    greedy,
    laco,
    removal,
    updates,
    without,
)
from prunelib.statistics.inputs import PassInputs
from prunelib.statistics.layerwise import Layers
from prunelib.surgery import zero_tensors
from workflow_scripts import collect_statistics, prune, score

CONFIG = Path(__file__).resolve().parents[1] / "config"
FAMILIES = ("llama", "opt", "bloom", "glm")
WINDOWS = torch.randint(3, 97, (6, 12), generator=torch.Generator().manual_seed(5))


def weights_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def deep_model(layers: int, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """A narrow LLaMA of any depth whose blocks differ in what they do."""
    torch.manual_seed(seed)
    config = tiny_config("llama") | {"num_hidden_layers": layers}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config)
    ).eval()
    with torch.no_grad():
        for layer, scale in zip(model.model.layers, torch.rand(layers) + 0.2, strict=True):
            layer.mlp.down_proj.weight.mul_(scale)
            layer.self_attn.o_proj.weight.mul_(scale)
    return model, config


@contextmanager
def lacking(model: Any, part: str, gone: Collection[int]) -> Iterator[Any]:
    """The model without some units, by taking modules out: no code of the passes."""
    owner = family_of(model.config.to_dict())
    modules = owner.layers(model)
    own = [(layer, dict(layer._modules)) for layer in modules]
    whole = dict(modules._modules)
    if part == "block":
        kept = [layer for index, layer in enumerate(modules) if index not in gone]
        modules._modules.clear()
        modules._modules.update({str(i): layer for i, layer in enumerate(kept)})
    else:
        for index in gone:
            remove_part(modules[index], part)
    depth = model.config.num_hidden_layers
    body = model.base_model
    for holder in {body, getattr(body, "decoder", body)}:
        if hasattr(holder, "config"):
            holder.config.num_hidden_layers = len(modules)
    try:
        yield model
    finally:
        modules._modules.clear()
        modules._modules.update(whole)
        for layer, parts in own:
            layer._modules.update(parts)
        model.config.num_hidden_layers = depth


def plain_loss(model: Any, part: str = "block", gone: Collection[int] = ()) -> float:
    with torch.no_grad(), lacking(model, part, gone) as smaller:
        logits = smaller(WINDOWS, use_cache=False).logits[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten()))


def naive_greedy(model: Any, part: str, candidates: Collection[int], removals: int) -> list[int]:
    order: list[int] = []
    for _ in range(removals):
        left = [i for i in candidates if i not in order]
        order.append(min(left, key=lambda i: (plain_loss(model, part, {*order, i}), i)))
    return order


@pytest.mark.parametrize("part", ["block", "attention", "mlp"])
@pytest.mark.parametrize("name", [*FAMILIES, "opt-post-norm", "qwen2-sliding"])
def test_losses_without_one_unit_are_those_of_the_model_without_it(name: str, part: str) -> None:
    model = tiny_model(name)
    config = model.config.to_dict()
    family = family_of(config)
    told: dict[str, Any] = {"part": part, "seed": 0}
    if (name, part) in (
        ("opt-post-norm", "attention"),
        ("opt-post-norm", "mlp"),
        ("qwen2-sliding", "attention"),
    ):
        with pytest.raises(InputError, match=f"remove {part}"):
            removal.collect(PassInputs(model, family, config, WINDOWS, 4), **told)
        return
    before = weights_hash(model)
    found = removal.collect(PassInputs(model, family, config, WINDOWS, 4), **told)
    assert weights_hash(model) == before
    assert found["loss"].item() == pytest.approx(plain_loss(model), rel=1e-6)
    if name != "qwen2-sliding":  # The plain model's layers would change their kind of attention.
        expected = [plain_loss(model, part, {i}) for i in range(4)]
        assert found["loss_without"].tolist() == pytest.approx(expected, rel=1e-6)
        assert len({round(value, 6) for value in expected}) == 4


@pytest.mark.parametrize(("part", "batch"), [("block", 1), ("attention", 6), ("mlp", 4)])
def test_greedy_with_cached_prefixes_equals_naive(part: str, batch: int) -> None:
    model, config = deep_model(8, seed=3)
    before = weights_hash(model)
    found = greedy.collect(
        PassInputs(model, family_of(config), config, WINDOWS, batch),
        part=part, most=0.5, keep_first=1, keep_last=1, seed=0,
    )  # fmt: skip
    assert weights_hash(model) == before
    order = found["order"].tolist()
    assert order == naive_greedy(model, part, range(1, 7), 4)
    # Not what one look at the whole model says.
    once = removal.collect(
        PassInputs(model, family_of(config), config, WINDOWS, 6), part=part, seed=0
    )
    assert order != (1 + once["loss_without"][1:7].argsort())[:4].tolist()
    losses = [plain_loss(model, part, order[: i + 1]) for i in range(4)]
    assert found["loss_when_removed"].tolist() == pytest.approx(losses, rel=1e-6)


def test_greedy_computes_few_blocks() -> None:
    """In units of blocks times windows; the naive loop runs every candidate in full."""
    count, removals = 30, 3
    model, config = deep_model(count)
    layers = Layers(model, family_of(config))
    stream = layers.begin(WINDOWS, 6)
    greedy.greedy_order(layers, stream, "block", range(1, count - 1), removals)
    naive = sum((count - 2 - k) * (count - 1 - k) for k in range(removals)) * len(WINDOWS)
    assert layers.windows_passed <= 0.55 * naive


def test_greedy_gives_up_candidates() -> None:
    """Once a block that does nothing is found, all others are worse after the first window."""
    model = trained("llama")
    config = model.config.to_dict()
    passed = []
    for batch in (6, 1):
        layers = Layers(model, family_of(config))
        stream = layers.begin(WINDOWS, batch)
        order, _ = greedy.greedy_order(layers, stream, "block", range(4), 3)
        assert order == naive_greedy(model, "block", range(4), 3)
        passed.append(layers.windows_passed)
    # Of blocks 2 and 3, those behind the first idle one, block 3 is given up twice.
    assert passed[1] < passed[0]


def test_greedy_prefers_the_first_of_equals() -> None:
    model, config = deep_model(5)
    with torch.no_grad():
        for index in (1, 3):
            model.model.layers[index].mlp.down_proj.weight.zero_()
            model.model.layers[index].self_attn.o_proj.weight.zero_()
    for batch in (1, 6):
        found = greedy.collect(
            PassInputs(model, family_of(config), config, WINDOWS, batch),
            part="block", most=1, keep_first=0, keep_last=0, seed=0,
        )  # fmt: skip
        order = found["order"].tolist()
        assert sorted(order) == list(range(5))
        assert order == naive_greedy(model, "block", range(5), 5)


def test_a_loss_that_is_not_finite_is_named() -> None:
    model, config = deep_model(4)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"without block \[0\] is nan"):
        removal.collect(
            PassInputs(model, family_of(config), config, WINDOWS, 6), part="block", seed=0
        )


@pytest.mark.parametrize(("index", "bad"), [(2, "loss"), (0, "distance of logits")])
def test_what_is_not_finite_of_a_coalition_is_named(index: int, bad: str) -> None:
    """Without block 0 the model has a loss or none; the whole one has none."""
    model, config = deep_model(4)
    with torch.no_grad():
        model.model.layers[index].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=rf"the {bad} without block \[0\] is nan"):
        coalitions.collect(
            PassInputs(model, family_of(config), config, WINDOWS, 6),
            part="block", scheme="leave_one_out", draws=1, kept=0.5, seed=0,
        )  # fmt: skip


def statistics_of(method: Any, model: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Run the passes that a method asks for."""
    import importlib

    found = {}
    for name in method.statistics:
        told = dict(method.statistic_options.get(name, {}))
        if told:
            told["seed"] = 0
        collector = importlib.import_module(f"prunelib.statistics.{name}")
        found[name] = collector.collect(
            PassInputs(model, family_of(config), config, WINDOWS, 6), **told
        )
    return found


def scored(method: Any, model: Any, config: dict[str, Any]) -> dict[str, Any]:
    inputs = ScoringInputs(
        family_of(config),
        config,
        model.state_dict().__getitem__,
        statistics_of(method, model, config),
        0,
    )
    scores: dict[str, Any] = method.scores(inputs)
    return scores


# Every ranker that should see that a unit does nothing.
RANKERS: list[tuple[str, dict[str, Any]]] = [
    ("sleb", {"keep_first": 0, "keep_last": 0, "most": 1.0}),
    ("shortened_llama", {"criterion": "perplexity"}),
    ("shortened_llama", {"criterion": "taylor"}),
    *(
        ("deeper_look", {"metric": metric})
        for metric in ("cosine", "relative_l1", "relative_l2", "loss_shapley", "logit_shapley")
    ),
    ("deeper_look", {"metric": "loss_shapley", "scheme": "chains", "draws": 4}),
    ("deeper_look", {"metric": "logit_shapley", "scheme": "subsets", "draws": 30}),
]


@pytest.mark.parametrize(
    ("name", "remove"),
    [*((name, "block") for name in FAMILIES), ("llama", "attention"), ("bloom", "mlp")],
)
@pytest.mark.parametrize(("method", "parameters"), RANKERS)
def test_units_that_do_nothing_rank_lowest(
    name: str, method: str, parameters: dict[str, Any], remove: str
) -> None:
    """Two of four blocks add nothing to the residual stream, and the others are needed."""
    model = trained(name)
    chosen = create(method, parameters | {"remove": remove})
    values = scored(chosen, model, model.config.to_dict())[remove][0]
    assert set(np.argsort(values)[:2]) == set(IDLE)


IDLE = (0, 2)
TRAINED: dict[str, Any] = {}


def trained(name: str) -> Any:
    """A tiny model that has learnt the windows by heart without two of its blocks."""
    if name not in TRAINED:
        model = tiny_model(name)
        family = family_of(model.config.to_dict())
        for index in IDLE:
            for map_name in family.output_maps(model.config.to_dict()):
                for parameter in family.layers(model)[index].get_submodule(map_name).parameters():
                    with torch.no_grad():
                        parameter.zero_()
                    parameter.requires_grad_(False)
        needed = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(needed, lr=5e-3)
        model.train()
        for _ in range(25):
            loss = model(WINDOWS, labels=WINDOWS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.requires_grad_(True)
        TRAINED[name] = model.eval()
    return TRAINED[name]


def test_taylor_scores_by_plain_autograd() -> None:
    model = tiny_model("bloom")
    config = model.config.to_dict()
    loss = model(WINDOWS, labels=WINDOWS).loss
    loss.backward()
    for remove, modules in (
        ("block", ("",)),
        ("attention", ("self_attention.", "input_layernorm.")),
        ("mlp", ("mlp.", "post_attention_layernorm.")),
    ):
        expected = [
            sum(
                (p * p.grad).abs().sum().item()
                for name, p in layer.named_parameters()
                if name.startswith(modules)
            )
            for layer in model.transformer.h
        ]
        chosen = create("shortened_llama", {"criterion": "taylor", "remove": remove})
        found = scored(chosen, tiny_model("bloom"), config)[remove][0]
        assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_first_four_and_last_two_blocks_stay() -> None:
    config = tiny_config("llama") | {"num_hidden_layers": 12}
    family = family_of(config)
    scores = {"block": [np.array([0, 1, 2, 3, 9, 8, 7, 6, 5, 4, 3.5, 0.5])]}
    for parameters, expected in (
        ({}, (7, 8, 9)),
        ({"keep_first": 0, "keep_last": 0}, (0, 1, 11)),
        ({"keep_first": 1, "keep_last": 0}, (1, 2, 11)),
    ):
        rule = create("shortened_llama", parameters).rule()
        plan = select(scores, family, config, Target("blocks", 3), rule, {})
        assert plan.removed_blocks == expected
    rule = create("shortened_llama", {}).rule()
    check_reachable(family, config, Target("blocks", 6), rule)
    for refused, message in (
        (rule, "removes at most 6"),
        (create("sleb", {"most": 0.3}).rule(), "removes at most 3"),
    ):
        with pytest.raises(InputError, match=message):
            check_reachable(family, config, Target("blocks", 7), refused)
    # What the search has not come to is not removed, whatever stands in its place.
    assert order_scores([2, 0], 4).tolist() == [1, 7, 0, 5]


@pytest.mark.parametrize("remove", ["block", "attention", "mlp"])
def test_random_units_are_those_of_the_seed(remove: str) -> None:
    """As many as the target says, the same of one seed, and every one of some seed."""
    config = tiny_config("llama") | {"num_hidden_layers": 12}
    family = family_of(config)
    method = create("random_blocks", {"remove": remove})
    assert method.seeded
    assert not method.statistics

    def removed(seed: int) -> tuple[int, ...]:
        inputs = ScoringInputs(family, config, {}.__getitem__, {}, seed)
        plan = select(method.scores(inputs), family, config, Target("blocks", 3), method.rule(), {})
        return plan.removed_blocks if remove == "block" else plan.skipped[remove]

    found = [removed(seed) for seed in range(20)]
    assert found == [removed(seed) for seed in range(20)]
    assert {len(set(units)) for units in found} == {3}
    assert len(set(found)) > 15
    assert {unit for units in found for unit in units} == set(range(12))


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("sleb", {"remove": "norm"}, "allowed: block, attention, mlp"),
        ("sleb", {"most": 0.0}, r"in \(0, 1\]"),
        ("sleb", {"keep_first": -1}, "from 0 allowed"),
        ("shortened_llama", {"criterion": "loss"}, "allowed: perplexity, taylor"),
        ("deeper_look", {"metric": "mmlu"}, "allowed: cosine, relative_l1"),
        ("deeper_look", {"emulate": "mean", "remove": "mlp"}, "only blocks allowed"),
        ("deeper_look", {"emulate": "bias"}, "allowed: none, mean, low_rank"),
        ("laco", {"layers_per_merge": 1}, "from 2 allowed"),
        ("laco", {"interval": 0}, "interval 0 given; from 1 allowed"),
        ("laco", {"sentences": 0}, "sentences 0 given; from 1 allowed"),
    ],
)
def test_what_a_method_does_not_know_is_refused(
    method: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        create(method, parameters)


def exact(values: Callable[[frozenset[int]], float], count: int, weighting: str) -> list[float]:
    """Shapley's or Banzhaf's value by their definitions, over all coalitions."""
    from itertools import combinations
    from math import factorial

    result = []
    for player in range(count):
        others = [i for i in range(count) if i != player]
        total = 0.0
        for size in range(count):
            for chosen in combinations(others, size):
                coalition = frozenset(chosen)
                gain = values(coalition | {player}) - values(coalition)
                if weighting == "shapley":
                    total += gain * factorial(size) * factorial(count - size - 1) / factorial(count)
                else:
                    total += gain / 2 ** (count - 1)
        result.append(total)
    return result


def test_values_of_coalitions_against_exact_enumeration() -> None:
    """On a made-up game of four blocks with interactions of all orders."""
    from itertools import permutations, product

    game = dict(
        zip(product((0, 1), repeat=4), np.random.default_rng(3).random(16).tolist(), strict=True)
    )

    def value(coalition: frozenset[int]) -> float:
        return -game[tuple(int(i in coalition) for i in range(4))]

    present = np.array(list(game), dtype=np.float64)
    losses = np.array(list(game.values()))
    assert absent_minus_present(present, losses).tolist() == pytest.approx(
        exact(value, 4, "banzhaf")
    )
    chains = []
    for order in permutations(range(4)):
        one = np.ones(4)
        chains.append(one.copy())
        for player in order:
            one[player] = 0
            chains.append(one.copy())
    rows = np.array(chains)
    along = np.array([game[tuple(int(x) for x in row)] for row in rows])
    shapley = exact(value, 4, "shapley")
    assert chain_marginals(rows, along).tolist() == pytest.approx(shapley)
    assert shapley != pytest.approx(exact(value, 4, "banzhaf"), rel=1e-2)
    with pytest.raises(ValueError, match="absent from others"):
        absent_minus_present(np.ones((3, 4)), np.ones(3))


# No merge is kept, so that every layer is tried.
MERGES = {"lowest": 0, "highest": None, "interval": 1, "sentences": 6}


@pytest.mark.parametrize(
    ("collector", "options"),
    [
        (removal, {"part": "mlp"}),
        (greedy, {"part": "mlp", "most": 0.5, "keep_first": 0, "keep_last": 0}),
        (coalitions, {"part": "mlp", "scheme": "leave_one_out", "draws": 1, "kept": 0.5}),
        (coalitions, {"part": "mlp", "scheme": "subsets", "draws": 20, "kept": 0.5}),
        (coalitions, {"part": "mlp", "scheme": "chains", "draws": 3, "kept": 0.5}),
        (laco, {"layers_per_merge": 2, "threshold": 2.0} | MERGES),
        (updates, {}),
        (emulation, {"rank": 2}),
    ],
)
def test_resources_count_the_blocks_of_the_passes(
    collector: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate bounds what is computed, and not by much; without an MLP a block counts."""
    model, config = deep_model(8)
    walked = Layers(model, family_of(config))
    monkeypatch.setattr(collector, "Layers", lambda *_: walked)
    seed = {"seed": 0} if options else {}
    collector.collect(PassInputs(model, family_of(config), config, WINDOWS, 6), **options, **seed)
    name = collector.__name__.rpartition(".")[2]
    expected = scoring_work.DEPTH_PASSES[name](8, options).blocks
    blocks = walked.windows_passed / len(WINDOWS)
    assert 0.6 * expected <= blocks <= expected


def test_values_of_coalitions_are_those_of_the_models() -> None:
    """Losses and distances of logits of real coalitions, against plain forward passes."""
    model = tiny_model("llama")
    config = model.config.to_dict()
    before = weights_hash(model)
    with torch.no_grad():
        whole = model(WINDOWS).logits[:, :-1].double()
    for part, scheme in (("block", "subsets"), ("attention", "chains"), ("mlp", "leave_one_out")):
        found = coalitions.collect(
            PassInputs(model, family_of(config), config, WINDOWS, 4),
            part=part, scheme=scheme, draws=5, kept=0.5, seed=1,
        )  # fmt: skip
        for row, loss, distance in zip(
            found["present"], found["losses"], found["distances"], strict=True
        ):
            gone = [i for i in range(4) if not row[i]]
            if len(gone) == 4 and part == "block":
                continue
            assert loss.item() == pytest.approx(plain_loss(model, part, gone), rel=1e-6)
            with torch.no_grad(), lacking(model, part, gone) as smaller:
                logits = smaller(WINDOWS, use_cache=False).logits[:, :-1].double()
            expected = (logits - whole).norm(dim=-1).mean().item()
            assert distance.item() == pytest.approx(expected, rel=1e-5, abs=1e-9)
        assert found["loss"].item() == pytest.approx(plain_loss(model), rel=1e-6)
    assert weights_hash(model) == before


def test_random_orders_approach_the_shapley_value_of_the_model() -> None:
    """Four real blocks: the pass over all 16 coalitions, and over many random orders."""
    from itertools import product

    model = trained("llama")
    config = model.config.to_dict()
    family = family_of(config)
    losses = {}
    layers = Layers(model, family)
    for row in product((0, 1), repeat=4):
        stream = layers.begin(WINDOWS, 6)
        without.advance(layers, stream, "block", [i for i in range(4) if not row[i]], 0)
        losses[row] = layers.loss(stream)

    def value(coalition: frozenset[int]) -> float:
        return -losses[tuple(int(i in coalition) for i in range(4))]

    found = {}
    for draws in (1, 60):
        found[draws] = scored(
            create("deeper_look", {"metric": "loss_shapley", "scheme": "chains", "draws": draws}),
            model,
            config,
        )["block"][0]
    expected = np.array(exact(value, 4, "shapley"))
    # Every chain's marginals add up to what the whole model gains over none of its blocks.
    assert found[1].sum() == pytest.approx(expected.sum(), rel=1e-6)
    assert np.abs(found[60] - expected).max() < 0.15 * np.abs(expected).max()
    assert np.abs(found[60] - expected).max() < np.abs(found[1] - expected).max()


def test_draws_of_coalitions() -> None:
    rows = coalitions.draw(6, "subsets", 40, 0.5, 3)
    assert rows.shape == (40, 6)
    assert (rows.sum(1) == 3).all()
    assert np.array_equal(rows, coalitions.draw(6, "subsets", 40, 0.5, 3))
    assert not np.array_equal(rows, coalitions.draw(6, "subsets", 40, 0.5, 4))
    chains = coalitions.draw(6, "chains", 2, 0.5, 0).reshape(2, 7, 6)
    assert (chains.sum(2) == np.arange(6, -1, -1)).all()
    assert (chains[:, 1:] <= chains[:, :-1]).all()
    assert not np.array_equal(chains[0], chains[1])
    for arguments, message in (
        ((6, "all", 1, 0.5, 0), "allowed: leave_one_out, subsets, chains"),
        ((6, "subsets", 0, 0.5, 0), "from 1 allowed"),
        ((6, "subsets", 9, 0.1, 0), "between 1 and 5 of 6"),
        ((6, "subsets", 1, 0.5, 0), "in all or none of the 1 sets"),
    ):
        with pytest.raises(InputError, match=message):
            coalitions.draw(*arguments)


@pytest.mark.parametrize("name", [*FAMILIES, "opt-post-norm"])
def test_updates_by_hand(name: str) -> None:
    """From the hidden states that a plain forward pass hands from layer to layer."""
    model = tiny_model(name)
    config = model.config.to_dict()
    family = family_of(config)
    found = updates.collect(PassInputs(model, family, config, WINDOWS, 4))
    states: list[torch.Tensor] = []

    def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not states:
            states.append((args[0] if args else kwargs["hidden_states"]).double())
        states.append((output[0] if isinstance(output, tuple) else output).double())

    for layer in family.layers(model):
        layer.register_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        model(WINDOWS)
    for index in range(4):
        x, y = states[index], states[index + 1]
        cosine = 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1).mean().item()
        assert found["block.cosine"][index].item() == pytest.approx(cosine, abs=1e-6)
        for p in (1, 2):
            relative = ((y - x).norm(p, -1) / x.norm(p, -1)).mean().item()
            assert found[f"block.relative_l{p}"][index].item() == pytest.approx(relative, rel=1e-5)
    assert ("mlp.cosine" in found) == (name != "opt-post-norm")
    if name == "llama":
        # The MLP's update is what the block's output has and its own input has not.
        layer = model.model.layers[0]
        with torch.no_grad():
            middle = (
                states[1]
                - layer.mlp(layer.post_attention_layernorm(_middle(layer, model))).double()
            )
        for part, x, y in (("attention", states[0], middle), ("mlp", middle, states[1])):
            relative = ((y - x).norm(2, -1) / x.norm(2, -1)).mean().item()
            assert found[f"{part}.relative_l2"][0].item() == pytest.approx(relative, rel=1e-4)


def _middle(layer: Any, model: Any) -> torch.Tensor:
    seen = []
    hook = layer.post_attention_layernorm.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    model(WINDOWS)
    hook.remove()
    return seen[0]


def step(script: Any, out: Path, params: dict[str, Any], **inputs: Path) -> Path:
    request = StepRequest(out.name, "0" * 16, params, inputs, out, (), ())
    artefact.commit(out, lambda scratch: script.main(request, scratch), {"key": request.key})
    return out


class Copy:
    """Stands for a step whose artefact exists."""

    def __init__(self, write: Callable[[Path], None]) -> None:
        self.write = write

    def main(self, request: StepRequest, out: Path) -> None:
        self.write(out)


def through_the_steps(
    source: Path, method: str, parameters: dict[str, Any], blocks: int, work: Path
) -> Path:
    """Statistics, scores and surgery of a tiny checkpoint; returns the smaller one."""
    from safetensors.torch import save_file

    def write(out: Path) -> None:
        save_file({"input_ids": WINDOWS}, out / "windows.safetensors")

    model = step(Copy(lambda out: shutil.copytree(source, out, dirs_exist_ok=True)), work / "m", {})
    windows = step(Copy(write), work / "windows", {})
    chosen = create(method, parameters)
    run = {"device": "cpu", "dtype": "float32", "threads": 1, "batch_windows": 4}
    passes = {}
    for name in chosen.statistics:
        told = chosen.statistic_options.get(name)
        more = {"options": dict(told), "seed": 0} if told else {}
        passes[name] = step(
            collect_statistics, work / name, run | more | {"name": name},
            model=model, calibration=windows,
        )  # fmt: skip
    params = {"method": method, "parameters": parameters, "seed": 0}
    scores = step(score, work / "scores", params, model=model, **passes)
    target = {"kind": "blocks", "value": blocks}
    return step(
        prune, work / "pruned", params | {"variant": method, "target": target},
        model=model, scores=scores,
    )  # fmt: skip


LACO = {"layers_per_merge": 3, "threshold": -1.0, "interval": 1}


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("sleb", {"most": 0.5}),
        ("sleb", {"remove": "attention"}),
        ("random_blocks", {"remove": "attention"}),
        ("shortened_llama", {"keep_first": 1, "keep_last": 1}),
        ("shortened_llama", {"criterion": "taylor", "remove": "mlp", "keep_first": 0}),
        ("deeper_look", {"metric": "relative_l1"}),
        ("deeper_look", {"metric": "logit_shapley", "remove": "mlp", "scheme": "chains"}),
        ("deeper_look", {"emulate": "mean"}),
        ("deeper_look", {"emulate": "low_rank", "rank": 3}),
        ("laco", LACO),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_on_every_family(
    name: str,
    method: str,
    parameters: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """What is written is the plan's model: counted, loadable, with and without cache."""
    source = tiny_checkpoint(name)
    out = through_the_steps(source, method, parameters, 2, tmp_path)
    plan = Plan.load(out)
    config = checkpoint.read_config(source)
    family = family_of(config)
    model = checkpoint.load_model(out)
    assert plan.parameters[1] == sum(p.numel() for p in model.parameters()) < plan.parameters[0]
    stock = "auto_map" not in checkpoint.read_config(out)
    assert stock == (plan.emulation is None and not plan.skipped)
    if "remove" in parameters:
        assert {part: len(ids) for part, ids in plan.skipped.items()} == {parameters["remove"]: 2}
    else:
        assert len(plan.removed_blocks) == 2
    with torch.inference_mode():
        logits = model(WINDOWS).logits
        assert relative_difference(with_cache(model, WINDOWS), logits) < 1e-5
        if not plan.merged and plan.emulation is None:
            dense = checkpoint.load_model(source)
            gone = plan.skipped.get(parameters.get("remove", ""), plan.removed_blocks)
            with lacking(dense, parameters.get("remove", "block"), gone) as expected:
                plain = expected(WINDOWS, use_cache=False).logits
            assert relative_difference(logits, plain) < 1e-5
    assert len(family.layers(model)) == 4 - (len(plan.removed_blocks) if not plan.emulation else 0)


def test_a_merge_by_hand(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Two layers into one: W_0 + (W_1 - W_0); three: W_1 + W_2 - W_0. Norms stay."""
    source = tiny_checkpoint("llama-bias")
    old = dict(checkpoint.read_tensors(source))
    for count in (2, 3):
        # The first merge begins `layers_per_merge` below `highest`: at layer 0.
        parameters = {"layers_per_merge": count, "highest": count, "threshold": -1.0}
        out = through_the_steps(source, "laco", parameters, count - 1, tmp_path / str(count))
        new = dict(checkpoint.read_tensors(out))
        assert Plan.load(out).removed_blocks == tuple(range(1, count))
        for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "self_attn.o_proj.bias"):
            w = [old[f"model.layers.{i}.{name}"] for i in range(3)]
            expected = w[1] if count == 2 else w[1] + w[2] - w[0]
            assert torch.allclose(new[f"model.layers.0.{name}"], expected, atol=1e-6)
            # Not what the authors' notebook computes.
            assert count == 2 or not torch.allclose(expected, w[2], atol=1e-2)
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            assert torch.equal(new[f"model.layers.0.{name}"], old[f"model.layers.0.{name}"])
        left = f"model.layers.{count}.mlp.up_proj.weight"
        assert torch.equal(new["model.layers.1.mlp.up_proj.weight"], old[left])
        assert "auto_map" not in checkpoint.read_config(out)


def test_merges_of_merged_layers_by_hand() -> None:
    """4 and 5 into 3, then 2 and that into 1."""
    first = MergedBlock(3, ((3, -1.0), (4, 1.0), (5, 1.0)))
    assert merged_layers([4, 5], [3, 3]) == (first,)
    assert merged_layers([4], [3]) == (MergedBlock(3, ((4, 1.0),)),)
    both = ((1, -1.0), (2, 1.0), (3, -1.0), (4, 1.0), (5, 1.0))
    assert merged_layers([4, 5, 2, 3], [3, 3, 1, 1]) == (MergedBlock(1, both),)
    # One step less: the merged layer stays.
    assert merged_layers([4, 5, 2], [3, 3, 1]) == (MergedBlock(1, ((2, 1.0),)), first)


def merged_by_hand(model: Any, base: int, count: int) -> Any:
    """A copy of the model with ``count`` layers merged into one, by plain loops."""
    import copy

    smaller = copy.deepcopy(model)
    layers = list(smaller.model.layers)
    total = {n: p.clone() for n, p in model.model.layers[base].named_parameters() if p.ndim == 2}
    for other in model.model.layers[base + 1 : base + count]:
        for name, parameter in other.named_parameters():
            if name in total:
                total[name] += parameter - model.model.layers[base].get_parameter(name)
    with torch.no_grad():
        for name, value in total.items():
            layers[base].get_parameter(name).copy_(value)
    del layers[base + 1 : base + count]
    smaller.model.layers = torch.nn.ModuleList(layers)
    smaller.config.num_hidden_layers = len(layers)
    return smaller


@torch.no_grad()
def test_collapse_equals_the_plain_algorithm() -> None:
    """Copies of the model, merged and run in full, as the authors' notebook goes about it."""
    model, config = deep_model(9)
    before = weights_hash(model)

    def final(one: Any) -> torch.Tensor:
        states: torch.Tensor = one.model(WINDOWS, use_cache=False).last_hidden_state
        return states.flatten(1)

    outcomes = set()
    for threshold, count, interval in ((-1, 3, 1), (-1, 3, 2), (0.1, 3, 1), (0.999, 3, 1)):
        current, place, similarities = model, 8 - count, []
        while place >= 1:
            trial = merged_by_hand(current, place, min(count, len(current.model.layers) - place))
            value = torch.nn.functional.cosine_similarity(final(trial), final(model)).mean()
            if value > threshold:
                current, place = trial, place - interval
                similarities.append(value.item())
            else:
                place -= 1
        found = laco.collect(
            PassInputs(model, family_of(config), config, WINDOWS, 4), layers_per_merge=count,
            interval=interval, lowest=1, highest=None, threshold=threshold,
            sentences=6, seed=0,
        )  # fmt: skip
        assert found["similarities"].tolist() == pytest.approx(similarities, rel=1e-4)
        assert len(found["order"]) == 9 - len(current.model.layers)
        outcomes.add(len(similarities))
    assert weights_hash(model) == before
    assert len(outcomes) >= 3
    assert 0 in outcomes


@pytest.mark.parametrize(("lowest", "highest"), [(0, 9), (0, 11), (0, 2), (-1, None), (6, None)])
def test_merges_of_layers_that_a_model_has_not_are_refused(
    lowest: int, highest: int | None
) -> None:
    model, config = deep_model(9)
    with pytest.raises(InputError, match=r"has layers 0\.\.8"):
        laco.collect(
            PassInputs(model, family_of(config), config, WINDOWS, 6), layers_per_merge=3,
            interval=1, lowest=lowest, highest=highest, threshold=-1, sentences=1, seed=0,
        )  # fmt: skip


def test_more_than_the_threshold_allows_is_refused() -> None:
    config = tiny_config("llama")
    family = family_of(config)
    rule = create("laco", {}).rule()
    scores = {
        "block": [order_scores([2, 3], 4)],
        "base": [np.array([-1.0, -1.0, 1.0, 1.0])],
    }
    plan = select(scores, family, config, Target("blocks", 2), rule, {})
    assert plan.merged == (MergedBlock(1, ((1, -1.0), (2, 1.0), (3, 1.0))),)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(InputError, match="at this threshold at most 2 are"):
        select(scores, family, config, Target("blocks", 3), rule, {})
    with pytest.raises(InputError, match="not one of units set to zero"):
        list(zero_tensors([], family, config, plan))
    for change, message in (
        (lambda d: d["merged"][0].update(base=2), "increasing and stay"),
        (lambda d: d["merged"][0].update(terms=[[1, 1], [2, 1]]), "add up to 2"),
        (lambda d: d["merged"][0].update(terms=[[2, 0], [1, 1]]), "must be increasing"),
        (lambda d: d["merged"][0].update(terms=[[4, 1]]), "out of range"),
        (lambda d: d.update(skipped={"mlp": [0]}), "removed blocks alone"),
    ):
        data = plan.to_dict()
        change(data)
        with pytest.raises(InputError, match=message):
            Plan.from_dict(data)


def test_a_merged_model_is_padded_with_zeros(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    out = through_the_steps(source, "laco", LACO, 2, tmp_path)
    checkpoint.export_stock(out, checkpoint.read_config(source), tmp_path / "stock")
    with torch.inference_mode():
        a, b = (checkpoint.load_model(d)(WINDOWS).logits for d in (out, tmp_path / "stock"))
    assert relative_difference(a, b) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_emulation_reduces_the_error_that_it_is_fitted_on(name: str) -> None:
    model = trained(name)
    config = model.config.to_dict()
    family = family_of(config)
    states: list[torch.Tensor] = []

    def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).double().flatten(0, 1))
        states.append((output[0] if isinstance(output, tuple) else output).double().flatten(0, 1))

    layer = family.layers(model)[1]
    hook = layer.register_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        model(WINDOWS)
    hook.remove()
    x, y = states
    update = y - x
    found = {rank: emulation.collect(
        PassInputs(model, family, config, WINDOWS, 4), rank=rank, seed=0
    ) for rank in (0, 2, 8, 48)}  # fmt: skip
    assert torch.allclose(found[0]["mean"][1].double(), update.mean(0), atol=1e-5)
    errors = [update.square().sum(1).mean().item()]
    errors.append((update - update.mean(0)).square().sum(1).mean().item())
    assert found[0]["errors"][1].tolist() == pytest.approx([*errors, errors[-1]], rel=1e-4)
    for rank in (2, 8, 48):
        a, b, bias = (found[rank][key][1].double() for key in ("a", "b", "bias"))
        assert (a.shape, b.shape) == ((48, rank), (rank, 48))
        left = (update - (bias + x @ b.T @ a.T)).square().sum(1).mean().item()
        assert found[rank]["errors"][1, 2].item() == pytest.approx(left, rel=1e-3, abs=1e-6)
        errors.append(left)
    assert all(later < 0.97 * earlier for earlier, later in pairwise(errors))
    # Idle blocks have nothing to emulate.
    assert found[48]["errors"][0].abs().max() < 1e-8


def test_a_low_rank_map_is_the_least_squares_one() -> None:
    """Data made by a map of rank 2 and a bias: it is found; with rank 1 its larger half is."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) + 2
    u, _, v = torch.linalg.svd(torch.randn(6, 6, generator=generator))
    matrix = u[:, :2] @ torch.diag(torch.tensor([1.0, 0.2])) @ v[:2]
    bias = torch.arange(6.0)
    sums = emulation.Products()
    sums.add(x, x + bias + x @ matrix.T, pairs=True)
    a, b, found, error = emulation.low_rank_map(sums, 2)
    assert torch.allclose(a @ b, matrix.double(), atol=2e-2)
    assert torch.allclose(found, bias.double(), atol=5e-2)
    assert error < 1e-3
    a, b, _, error = emulation.low_rank_map(sums, 1)
    assert torch.allclose(a @ b, (u[:, :1] @ v[:1]).double(), atol=8e-2)
    assert 0.02 < error < 0.08


def test_emulated_blocks_compute_their_map(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("bloom")
    config = checkpoint.read_config(source)
    for emulate, each in (("mean", 48), ("low_rank", 48 * 7)):
        parameters = {"metric": "relative_l2", "emulate": emulate, "rank": 3}
        out = through_the_steps(source, "deeper_look", parameters, 1, tmp_path / emulate)
        plan = Plan.load(out)
        assert plan.emulation is not None
        (gone,) = plan.removed_blocks
        assert plan.emulation.parameters == each
        assert plan.removed_ratio < plan.gross_removed_ratio
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        found = emulation.collect(
            PassInputs(tiny_model("bloom"), family_of(config), config, WINDOWS, 4), rank=3, seed=0
        )
        layer = checkpoint.load_model(out).transformer.h[gone]
        state = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            given, weights = layer(state, alibi=None, attention_mask=None)
        assert weights is None
        if emulate == "mean":
            expected = state + found["mean"][gone]
        else:
            low = state @ found["b"][gone].T @ found["a"][gone].T
            expected = state + found["bias"][gone] + low
        assert torch.allclose(given, expected, atol=1e-4)
        with pytest.raises(InputError, match="maps have no place in the stock architecture"):
            checkpoint.export_stock(out, config, tmp_path / "stock")
    for change, message in (
        (lambda d: d["emulated"]["blocks"][0].update(like=gone + 1), "out of range"),
        (lambda d: d["emulated"].update(rank=-1), "from 0 allowed"),
        (lambda d: d["emulated"].update(blocks=[]), "at least one"),
        (lambda d: d.update(skipped={"mlp": [(gone + 1) % 4]}), "removed blocks alone"),
    ):
        data = plan.to_dict()
        change(data)
        with pytest.raises(InputError, match=message):
            Plan.from_dict(data)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_emulated_first_block_has_no_slot_in_the_cache(
    name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """What is in the cache is counted in its first slot, which must be one that is used."""
    source = tiny_checkpoint(name)
    config = checkpoint.read_config(source)
    rng = np.random.default_rng(0)
    scores = {
        "block": [np.array([0.0, 3.0, 1.0, 2.0])],
        "emulation_bias": list(rng.normal(size=(4, 48))),
        "emulation_a": list(rng.normal(size=(4, 48, 2))),
        "emulation_b": list(rng.normal(size=(4, 2, 48))),
    }
    rule = create("deeper_look", {"emulate": "low_rank", "rank": 2}).rule()
    plan = select(scores, family_of(config), config, Target("blocks", 2), rule, {})
    assert plan.removed_blocks == (0, 2)
    checkpoint.prune_checkpoint(source, plan, tmp_path / "out", scores)
    model = checkpoint.load_model(tmp_path / "out")
    with torch.inference_mode():
        logits = model(WINDOWS).logits
        assert relative_difference(with_cache(model, WINDOWS), logits) < 1e-5
    other = scores | {"emulation_a": list(rng.normal(size=(4, 48, 3)))}
    with pytest.raises(InputError, match="has the shape"):
        checkpoint.prune_checkpoint(source, plan, tmp_path / "no", other)
    new = checkpoint.read_config(tmp_path / "out")
    new["virtual_layers"][0] = {"emulate": -1}
    (tmp_path / "out" / "config.json").write_text(json.dumps(new))
    with pytest.raises(InputError, match=r"virtual_layers\[0\] is {'emulate': -1}"):
        checkpoint.load_model(tmp_path / "out")
    del scores["emulation_bias"]
    with pytest.raises(InputError, match="emulation_bias is missing"):
        checkpoint.prune_checkpoint(source, plan, tmp_path / "no", scores)


def test_a_parameter_target_is_net_of_what_emulates() -> None:
    """By hand: a block less its map."""
    config = tiny_config("llama") | {"num_hidden_layers": 12}
    family = family_of(config)
    total, block = family.parameters(config), family.block_parameters(config)
    for parameters, each in (
        ({}, block),
        ({"emulate": "mean"}, block - 48),
        ({"emulate": "low_rank", "rank": 40}, block - 81 * 48),
    ):
        rule = create("deeper_look", parameters).rule()
        target = Target("parameters", 0.4)
        plan = select({"block": [np.arange(12.0)]}, family, config, target, rule, {})
        assert len(plan.removed_blocks) == round(0.4 * total / each)
        assert plan.parameters[0] - plan.parameters[1] == len(plan.removed_blocks) * each
    rule = create("deeper_look", {"emulate": "low_rank", "rank": 400}).rule()
    with pytest.raises(InputError, match="a smaller rank allowed"):
        check_reachable(family, config, Target("parameters", 0.4), rule)


@pytest.mark.long
def test_models_with_emulated_blocks_load_in_a_fresh_interpreter(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    bits = {}
    ids = torch.arange(3, 19).view(2, 8)
    for name in FAMILIES:
        parameters = {"emulate": "low_rank", "rank": 3}
        source = tiny_checkpoint(name)
        out = through_the_steps(source, "deeper_look", parameters, 2, tmp_path / name)
        with torch.inference_mode():
            logits = checkpoint.load_model(out)(ids).logits
        bits[str(out)] = [logits.contiguous().view(torch.int32).tolist(), True, True]
    assert load_in_a_fresh_interpreter(dict.fromkeys(bits, True)) == bits


EXPERIMENTS = sorted(
    path.stem
    for pattern in ("depth_*", "study_depth*")
    for path in (CONFIG / "experiments").glob(f"{pattern}.yaml")
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_plan(name: str) -> None:
    experiment = Experiment.load(CONFIG / "experiments" / f"{name}.yaml", CONFIG)
    problems = experiment.preflight()
    assert all("the revision is not pinned" in problem for problem in problems)
    assert bool(problems) != name.startswith("study_")
    assert all(
        (cell.method == "random_blocks") == (cell.control == "random")
        for cell in experiment.cells
        if cell.target and cell.method != "random"
    )
    # Seeds change nothing here.
    cells = [cell for cell in experiment.cells if cell.seed in (None, 0)]
    nodes = closure(node for cell in cells for node in cell.steps.values())
    cluster = Cluster.load(CONFIG / "cluster.yaml")
    places: dict[Path, str] = {}
    for key, node in nodes.items():
        assert places.setdefault(node.directory, key) == key
        asked = request(node, cluster)
        assert asked.mem_mb <= cluster.limits.mem_mb
        assert 0 < asked.seconds < 48 * 3600


def test_experiments_remove_what_they_say() -> None:
    """The same number of parameters in blocks and in their parts, to half a part."""
    experiment = Experiment.load(CONFIG / "experiments" / "study_depth_parts.yaml", CONFIG)
    config = experiment.geometry("smollm2-135m")
    family = family_of(config)
    rng = np.random.default_rng(0)
    removed: dict[float, list[tuple[int, int]]] = {}
    for method in experiment.methods.values():
        rule = method.rule()
        if rule.kinds[0] in ("kv_group", "mlp_channel"):
            continue
        for target in experiment.targets:
            scores = {rule.kinds[0]: [rng.random(30)]}
            plan = select(scores, family, config, target, rule, {})
            count = len(plan.removed_blocks) + sum(map(len, plan.skipped.values()))
            before, after = plan.parameters
            removed.setdefault(target.value, []).append((count, before - after))
    block = family.block_parameters(config)
    for (_, found), blocks in zip(sorted(removed.items()), (3, 6), strict=True):
        assert {count for count, _ in found} == {blocks, 4 * blocks, round(4 * blocks / 3)}
        assert all(abs(size - blocks * block) <= 0.05 * blocks * block for _, size in found)


def test_published_orders() -> None:
    """Every order names every block once; the first ones are those that the paper's text names."""
    rows = read_published(CONFIG / "published" / "shortened_llama.csv")
    orders: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row.metric.startswith("removed_block_"):
            orders.setdefault((row.model, row.method.split("_")[2]), []).append(int(row.value))
    assert {key: order[:6] for key, order in orders.items()} == {
        ("LLaMA-7B", "perplexity"): [24, 26, 25, 10, 27, 13],
        ("LLaMA-7B", "taylor"): [0, 27, 24, 26, 25, 29],
        ("Llama-2-7B", "perplexity"): [11, 8, 24, 21, 12, 7],
        ("Llama-2-7B", "taylor"): [0, 28, 27, 25, 29, 26],
        ("Llama-3-8B", "perplexity"): [8, 23, 9, 11, 10, 25],
        ("Llama-3-8B", "taylor"): [24, 25, 26, 28, 29, 23],
    }
    assert all(sorted(order) == list(range(32)) for order in orders.values())
    # Six blocks of LLaMA-7B are 18.0 % of its parameters, nine 27.0 %, eleven 33.0 %.
    config = json.loads((CONFIG / "models" / "llama-7b.json").read_text())
    family = family_of(config)
    share = family.block_parameters(config) / family.parameters(config)
    assert [round(100 * n * share, 1) for n in (6, 9, 11)] == [18.0, 27.0, 33.0]
    catalogue = Experiment.load(CONFIG / "experiments" / "depth_llama_7b.yaml", CONFIG).catalogues
    # SLEB's shares are of blocks, rounded up: its repository has 4 and 7 of 32, 8 of 40, 16 of 80.
    assert {
        (row.model, row.target_value)
        for row in read_published(CONFIG / "published" / "sleb.csv")
        if row.method == "sleb" and row.target_kind == "blocks"
    } == {
        *(("Llama-2-7B", 4), ("Llama-2-7B", 7), ("OPT-6.7B", 4), ("OPT-6.7B", 7)),
        *(("Llama-2-13B", 4), ("Llama-2-13B", 8), ("Llama-2-70B", 8), ("Llama-2-70B", 16)),
    }
    for name in ("sleb", "shortened_llama", "laco", "depth"):
        for row in read_published(CONFIG / "published" / f"{name}.csv"):
            known = {*catalogue["methods"], "dense", "slicegpt", "swift", "deeper_look"}
            assert row.method in known
