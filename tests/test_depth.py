"""Rankers of blocks and of their parts: what they measure, and that they measure it cheaply."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_config, tiny_model

from prunelib.cluster import resources
from prunelib.criteria.depth import absent_minus_present, chain_marginals, order_scores
from prunelib.errors import InputError, NonFiniteError
from prunelib.families import family_of
from prunelib.families.modeling_shared import remove_part
from prunelib.methods import create
from prunelib.methods.base import ScoringInputs
from prunelib.selection import Target, check_reachable, select
from prunelib.statistics import coalitions, greedy, removal, updates, without
from prunelib.statistics.layerwise import Layers

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
            removal.collect(model, family, config, WINDOWS, 4, **told)
        return
    before = weights_hash(model)
    found = removal.collect(model, family, config, WINDOWS, 4, **told)
    assert weights_hash(model) == before
    assert found["loss"].item() == pytest.approx(plain_loss(model), rel=1e-6)
    if name != "qwen2-sliding":  # The plain model's layers would change their kind of attention.
        expected = [plain_loss(model, part, {i}) for i in range(4)]
        assert found["loss_without"].tolist() == pytest.approx(expected, rel=1e-6)
        assert len({round(value, 6) for value in expected}) == 4


@pytest.mark.parametrize(
    ("part", "batch"), [("block", 1), ("block", 6), ("attention", 6), ("mlp", 4)]
)
def test_greedy_with_cached_prefixes_equals_naive(part: str, batch: int) -> None:
    model, config = deep_model(8, seed=3)
    before = weights_hash(model)
    found = greedy.collect(
        model, family_of(config), config, WINDOWS, batch,
        part=part, most=0.5, keep_first=1, keep_last=1, seed=0,
    )  # fmt: skip
    assert weights_hash(model) == before
    order = found["order"].tolist()
    assert order == naive_greedy(model, part, range(1, 7), 4)
    # Not what one look at the whole model says.
    once = removal.collect(model, family_of(config), config, WINDOWS, 6, part=part, seed=0)
    assert order != (1 + once["loss_without"][1:7].argsort())[:4].tolist() or part != "block"
    losses = [plain_loss(model, part, order[: i + 1]) for i in range(4)]
    assert found["loss_when_removed"].tolist() == pytest.approx(losses, rel=1e-6)


def test_greedy_computes_few_blocks() -> None:
    """In units of blocks times windows; the naive loop runs every candidate in full."""
    count, removals = 16, 8
    model, config = deep_model(count)
    layers = Layers(model, family_of(config))
    stream = layers.begin(WINDOWS, 6)
    greedy.greedy_order(layers, stream, "block", range(1, count - 1), removals)
    naive = sum((count - 2 - k) * (count - 1 - k) for k in range(removals)) * len(WINDOWS)
    assert layers.windows_passed <= 0.6 * naive


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
            model, family_of(config), config, WINDOWS, batch,
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
        removal.collect(model, family_of(config), config, WINDOWS, 6, part="block", seed=0)


def statistics_of(method: Any, model: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Run the passes that a method asks for."""
    import importlib

    found = {}
    for name in method.statistics:
        told = dict(method.statistic_options.get(name, {}))
        if told:
            told["seed"] = 0
        collector = importlib.import_module(f"prunelib.statistics.{name}")
        found[name] = collector.collect(model, family_of(config), config, WINDOWS, 6, **told)
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


@pytest.mark.parametrize("remove", ["block", "attention", "mlp"])
@pytest.mark.parametrize(("method", "parameters"), RANKERS)
@pytest.mark.parametrize("name", FAMILIES)
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
        for _ in range(40):
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


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("sleb", {"remove": "norm"}, "allowed: block, attention, mlp"),
        ("sleb", {"most": 0.0}, r"in \(0, 1\]"),
        ("sleb", {"keep_first": -1}, "from 0 allowed"),
        ("shortened_llama", {"criterion": "loss"}, "allowed: perplexity, taylor"),
        ("deeper_look", {"metric": "mmlu"}, "allowed: cosine, relative_l1"),
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


def walked_blocks(run: Callable[[Layers, Any], Any], layers: int) -> float:
    """Blocks that a walk goes through, those without a part counted in full."""
    model, config = deep_model(layers)
    walked = Layers(model, family_of(config))
    run(walked, walked.begin(WINDOWS, 6))
    return walked.windows_passed / len(WINDOWS)


def test_resources_count_the_blocks_of_the_passes() -> None:
    """The estimate bounds what is computed, and not by much."""
    cases: list[tuple[str, dict[str, Any], Callable[[Layers, Any], Any]]] = [
        ("removal", {}, lambda layers, stream: removal.one_at_a_time(layers, stream, "mlp")),
        (
            "greedy",
            {"most": 0.5},
            lambda layers, stream: greedy.greedy_order(layers, stream, "mlp", range(8), 4),
        ),
    ]
    for name, options, run in cases:
        expected = resources._DEPTH_PASSES[name](8, options).blocks
        assert 0.6 * expected <= walked_blocks(run, 8) <= expected, name


def test_values_of_coalitions_are_those_of_the_models() -> None:
    """Losses and distances of logits of real coalitions, against plain forward passes."""
    model = tiny_model("llama")
    config = model.config.to_dict()
    before = weights_hash(model)
    with torch.no_grad():
        whole = model(WINDOWS).logits[:, :-1].double()
    for part, scheme in (("block", "subsets"), ("attention", "chains"), ("mlp", "leave_one_out")):
        found = coalitions.collect(
            model, family_of(config), config, WINDOWS, 4,
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
    found = updates.collect(model, family, config, WINDOWS, 4)
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
