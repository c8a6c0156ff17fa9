"""Self-speculative decoding: nothing but time may differ from the model alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_config, tiny_model
from scipy.stats import chi2
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern
from test_depth import lacking, weights_hash

from prunelib.checkpoint import build_model, family_of_config
from prunelib.errors import InputError
from prunelib.families import modeling_shared
from prunelib.plan import Plan
from prunelib.speculation import decoding
from prunelib.speculation.arithmetic import (
    best_draft_length,
    counted_speed_up,
    expected_speed_up,
    expected_tokens,
    residual,
    verification,
)
from prunelib.speculation.decoding import Decoded, DecodingSettings, decode
from prunelib.speculation.draft import Draft, DraftCache, Skipped, shared_blocks
from prunelib.speculation.swift import Search, SwiftSettings, matchness, upper_confidence

PROMPT = torch.tensor([[5, 40, 11, 83, 29, 64]])
MOST = 20
DRAFTS = {
    "blocks": Skipped(block=(0, 2)),
    "parts": Skipped(attention=(0, 2), mlp=(1, 2)),
    "mlp": Skipped(mlp=(2, 3)),
}
# Grouped and single heads, rotary, learned and linear positions, norms before and after.
CASES = [
    *itertools.product(("llama", "opt", "bloom-8", "glm"), ("blocks", "parts")),
    ("llama-mha", "parts"),
    ("opt-bare", "parts"),
    ("qwen3", "blocks"),
    ("qwen2-sliding", "blocks"),
    ("qwen2-sliding", "mlp"),
    ("opt-post-norm", "blocks"),
]


def model_of(name: str, seed: int = 0) -> Any:
    """In fp64: passes over one and over several tokens round differently, which must not count."""
    return tiny_model(name, seed).double()


def plain(model: Any, ids: torch.Tensor, new_tokens: int, eos: Any = None) -> list[int]:
    found = model.generate(
        ids, do_sample=False, max_new_tokens=new_tokens, eos_token_id=eos, pad_token_id=0,
        attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    return [int(token) for token in found[0, ids.shape[1] :]]


def greedy(model: Any, ids: torch.Tensor, draft: Any, new_tokens: int = MOST, **more: Any) -> Any:
    eos = more.pop("eos", ())
    return decode(model, ids, draft, DecodingSettings(new_tokens, **more), eos=eos)


def modules_of(model: Any) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules()]


def idle_blocks(model: Any, *indices: int) -> Any:
    """Let some of a LLaMA's blocks do nothing."""
    with torch.no_grad():
        for index in indices:
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_greedy_text_is_the_model_s_own(name: str, kind: str) -> None:
    model = model_of(name)
    before, modules = weights_hash(model), modules_of(model)
    draft = Draft(model, DRAFTS[kind])
    rejected, seen = 0, set()
    prompts = (PROMPT, PROMPT[:, :1], PROMPT.flip(1))
    for ids, length, threshold in zip(prompts, (4, 1, 6), (0.0, 0.0, 0.3), strict=True):
        expected = plain(model, ids, MOST)
        seen |= set(expected)
        found = greedy(model, ids, draft, draft_length=length, threshold=threshold)
        assert list(found.tokens) == expected
        rejected += found.judged - found.accepted
        assert 0 <= found.accepted <= found.judged <= found.drafted <= length * found.passes
        assert found.passes + found.accepted == MOST - 1
    # Without any cache, too: nothing of a rejected token may stay behind.
    whole = PROMPT
    for _ in range(MOST):
        with torch.no_grad():
            token = model(whole, use_cache=False).logits[:, -1:].argmax(-1)
        whole = torch.cat([whole, token], 1)
    assert whole[0, PROMPT.shape[1] :].tolist() == list(greedy(model, PROMPT, draft).tokens)
    assert len(seen) > (1 if name == "opt-post-norm" else 3)
    assert rejected > 10
    assert (weights_hash(model), modules_of(model)) == (before, modules)


def test_plain_decoding() -> None:
    model = model_of("llama")
    found = greedy(model, PROMPT, None)
    assert list(found.tokens) == plain(model, PROMPT, MOST)
    assert (found.passes, found.drafted) == (MOST - 1, 0)


def outputs_of(model: Any, skipped: Skipped) -> list[Any]:
    """The parameters of the maps through which the skipped parts reach the residual stream."""
    config = model.config.to_dict()
    family = family_of_config(config)
    return [
        parameter
        for part, name in zip(("attention", "mlp"), family.output_maps(config), strict=True)
        for index in (*skipped.block, *getattr(skipped, part))
        for parameter in family.layers(model)[index].get_submodule(name).parameters()
    ]


@contextmanager
def silent(model: Any, skipped: Skipped) -> Iterator[None]:
    """What is skipped computes, but adds nothing: all slots of a cache are of one length."""
    own = [(parameter, parameter.data.clone()) for parameter in outputs_of(model, skipped)]
    for parameter, data in own:
        parameter.data = torch.zeros_like(data)
    try:
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


def by_rebuilding(model: Any, skipped: Skipped, length: int, threshold: float) -> Decoded:
    """The same rounds with nothing of this library: a new cache each time, and no skipping."""
    tokens = plain(model, PROMPT, 1)
    cost, work = Draft(model, skipped).cost, 0.0
    drafted = accepted = judged = passes = 0
    while len(tokens) < MOST:
        text = torch.cat([PROMPT, torch.tensor([tokens])], 1)
        with torch.no_grad():
            cache = model(text[:, :-1], use_cache=True).past_key_values
            guesses: list[int] = []
            with silent(model, skipped):
                while len(guesses) < min(length, MOST - len(tokens) - 1):
                    last = torch.tensor([[*tokens, *guesses][-1:]])
                    logits = model(last, past_key_values=cache, use_cache=True).logits[0, -1]
                    guesses.append(int(logits.argmax()))
                    work += cost
                    if logits.softmax(-1).max() < threshold:
                        break
        right = plain(model, text, len(guesses) + 1)
        agreed = next((i for i, g in enumerate(guesses) if g != right[i]), len(guesses))
        drafted, accepted, passes = drafted + len(guesses), accepted + agreed, passes + 1
        judged += min(agreed + 1, len(guesses))
        tokens += right[: agreed + 1]
    return Decoded(tuple(tokens), drafted, accepted, judged, passes, 0, work)


@pytest.mark.parametrize(
    ("name", "skipped", "threshold"),
    [
        ("llama", Skipped(mlp=(1, 3)), 0.25),
        ("llama", Skipped(attention=(0,), mlp=(3,)), 0.0),
        ("bloom-8", Skipped(block=(0, 2)), 0.0),
        ("opt", Skipped(attention=(0, 1, 3)), 0.25),
        ("glm", Skipped(mlp=(0, 2)), 0.0),
        # Its first layer has no attention: layers are not slots of the cache.
        ("virtual", Skipped(attention=(1,), mlp=(3,)), 0.0),
    ],
)
def test_drafts_are_those_of_the_smaller_model_on_the_model_s_cache(
    name: str, skipped: Skipped, threshold: float
) -> None:
    if name == "virtual":
        model = virtual_model({"without": "attention"}, {}, {}, {})
    else:
        model = model_of(name)
    for parameter in outputs_of(model, skipped):
        parameter.data *= 0.15  # What is skipped does little, so that some guesses are right.
    found = greedy(model, PROMPT, Draft(model, skipped), threshold=threshold)
    assert found == by_rebuilding(model, skipped, 4, threshold)
    assert 2 < found.accepted < found.judged


def test_every_position_is_computed_once_per_pass() -> None:
    """Neither draft nor model reads the text again."""
    model = model_of("llama")
    draft = Draft(model, DRAFTS["parts"])
    read: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: read.append(inputs[0].shape[1])
    )
    found = greedy(model, PROMPT, draft)
    hook.remove()
    assert read[0] == PROMPT.shape[1]
    assert sum(read[1:]) == 2 * found.drafted + found.passes
    assert len(read) == 1 + found.drafted + found.passes


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "glm"])
def test_the_cache_after_a_rollback_is_as_if_nothing_had_been_drafted(name: str) -> None:
    model = model_of(name)
    draft = Draft(model, Skipped(attention=(0, 3), block=(1,)))
    cache, n = DraftCache(), PROMPT.shape[1]
    with torch.no_grad():
        model(PROMPT[:, :-1], past_key_values=cache, use_cache=True)
        filled = [(slot.keys.clone(), slot.values.clone()) for slot in cache.layers]
        with draft.drafting(cache):
            for token in (PROMPT[:, -1:], torch.tensor([[3]]), torch.tensor([[8]])):
                model(token, past_key_values=cache, use_cache=True)
            assert cache.length == n + 2
        lengths = [slot.get_seq_length() for slot in cache.layers]
        assert lengths == [n - 1, n - 1, n + 2, n - 1]
        cache.shorten(n - 1)
        for slot, (keys, values) in zip(cache.layers, filled, strict=True):
            assert torch.equal(slot.keys, keys)
            assert torch.equal(slot.values, values)
        # What is written to a prefix stays there.
        model(PROMPT[:, 2:4], past_key_values=cache.prefix(2), use_cache=True)
        text = torch.cat([PROMPT, torch.tensor([[17, 71]])], 1)
        logits = model(text[:, n - 1 :], past_key_values=cache, use_cache=True).logits
        whole = model(text, use_cache=False).logits[:, n - 1 :]
    assert (logits - whole).abs().max() < 1e-10


def test_a_failed_pass_leaves_the_model_whole() -> None:
    model = model_of("llama")
    modules, cache = modules_of(model), DraftCache()
    draft = Draft(model, DRAFTS["parts"])
    seen = []

    def fail() -> None:
        with draft.drafting(cache):
            seen.append(modules_of(model))
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert seen[0] != modules
    assert modules_of(model) == modules
    assert cache.asked == 0


def test_a_draft_that_always_agrees() -> None:
    model = idle_blocks(model_of("llama"), 1, 2)
    draft = Draft(model, Skipped(block=(1, 2)))
    found = greedy(model, PROMPT, draft, 21, draft_length=4)
    assert list(found.tokens) == plain(model, PROMPT, 21)
    assert found.acceptance_rate == found.accepted_share == 1.0
    # The prompt's pass gives one token; each round four draft tokens and one of the model's.
    assert (found.passes, found.drafted, found.tokens_per_pass) == (4, 16, 5.0)


def test_a_draft_that_never_agrees() -> None:
    model = model_of("opt")
    head = model.lm_head.weight.detach()
    with torch.no_grad():
        for index, (token, size) in enumerate([(50, 1e3), (60, 1e5)], start=2):
            model.model.decoder.layers[index].fc2.bias.copy_(size * (head[token] - head.mean(0)))
        model.model.decoder.final_layer_norm.weight.fill_(1)
        model.model.decoder.final_layer_norm.bias.zero_()
    draft = Draft(model, Skipped(block=(3,)))
    found = greedy(model, PROMPT, draft, 12)
    assert list(found.tokens) == plain(model, PROMPT, 12)
    assert (found.accepted, found.acceptance_rate, found.tokens_per_pass) == (0, 0.0, 1.0)
    assert (found.passes, found.judged) == (11, 10)


@pytest.mark.parametrize("new_tokens", range(1, 9))
def test_no_more_tokens_than_asked_for(new_tokens: int) -> None:
    model = idle_blocks(model_of("llama"), 2)
    expected = plain(model, PROMPT, new_tokens)
    for skipped in (Skipped(block=(2,)), DRAFTS["blocks"]):
        found = greedy(model, PROMPT, Draft(model, skipped), new_tokens, draft_length=3)
        assert list(found.tokens) == expected
        # A draft token that could not be used is not drafted.
        assert found.drafted <= max(new_tokens - 2, 0) * found.passes
        if skipped.block == (2,):
            assert found.drafted == found.accepted == new_tokens - 1 - found.passes
    if new_tokens == 1:
        assert found.passes == 0
        assert math.isnan(found.acceptance_rate)
        assert math.isnan(found.tokens_per_pass)


def test_the_text_ends_at_an_end_of_text_token() -> None:
    """Be it the prompt's token, an accepted draft token, or the model's own behind others."""
    model = idle_blocks(model_of("llama"), 2)
    whole = plain(model, PROMPT, MOST)
    drafts = [Draft(model, skipped) for skipped in (Skipped(block=(2,)), DRAFTS["parts"])]
    ends = set()
    for token in dict.fromkeys(whole):
        expected = plain(model, PROMPT, MOST, eos=token)
        ends.add(len(expected))
        for draft in drafts:
            found = greedy(model, PROMPT, draft, eos=(token,))
            assert list(found.tokens) == expected
            # Nothing is drafted behind it.
            assert found.drafted <= found.accepted or draft is drafts[1]
    assert min(ends) == 1
    assert len(ends) > 6
    model.generation_config.eos_token_id = [96, whole[7]]
    found = decode(model, PROMPT, drafts[0], DecodingSettings(MOST))
    assert list(found.tokens) == plain(model, PROMPT, MOST, eos=whole[7])
    model.generation_config.eos_token_id = whole[7]
    assert decode(model, PROMPT, drafts[0], DecodingSettings(MOST)) == found


# --- sampling ---------------------------------------------------------------------------------


def tables(generator: torch.Generator, vocabulary: int, depth: int) -> dict[Any, torch.Tensor]:
    """Next-token probabilities behind every prefix; some of them are 0."""
    found = {}
    for size in range(depth):
        for prefix in itertools.product(range(vocabulary), repeat=size):
            weights = torch.rand(vocabulary, generator=generator, dtype=torch.float64) - 0.3
            weights[int(torch.randint(vocabulary, (1,), generator=generator))] = 0.3
            found[prefix] = weights.clamp_min(0) / weights.clamp_min(0).sum()
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("vocabulary", "gamma"), [(3, 2), (4, 1), (2, 4), (3, 0)])
def test_one_round_has_exactly_the_model_s_joint_distribution(
    seed: int, vocabulary: int, gamma: int
) -> None:
    """Every draft and every outcome of its verification, by enumeration."""
    generator = torch.Generator().manual_seed(seed)
    p = tables(generator, vocabulary, gamma + 1)
    q = tables(generator, vocabulary, gamma + 1)
    emitted: dict[tuple[int, ...], float] = {}
    for draft in itertools.product(range(vocabulary), repeat=gamma):
        prefixes = [draft[:i] for i in range(gamma + 1)]
        drawn = math.prod(float(q[draft[:i]][draft[i]]) for i in range(gamma))
        if not drawn:
            continue
        rows = torch.stack([q[prefix] for prefix in prefixes])[:gamma]
        many, following = verification(
            torch.stack([p[prefix] for prefix in prefixes]), rows, torch.tensor(draft).long()
        )
        assert many.sum() == pytest.approx(1, abs=1e-12)
        for count, token in itertools.product(range(gamma + 1), range(vocabulary)):
            text = (*draft[:count], token)
            chance = drawn * float(many[count]) * float(following[count, token])
            emitted[text] = emitted.get(text, 0.0) + chance
    # Rounds emit texts of different lengths; the model goes on behind the shorter ones.
    for text in itertools.product(range(vocabulary), repeat=gamma + 1):
        found = sum(
            emitted.get(text[:size], 0.0)
            * math.prod(float(p[text[:i]][text[i]]) for i in range(size, gamma + 1))
            for size in range(1, gamma + 2)
        )
        own = math.prod(float(p[text[:i]][text[i]]) for i in range(gamma + 1))
        assert found == pytest.approx(own, abs=1e-12)


def test_verification_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64)
    many, following = verification(p, q, torch.tensor([1]))
    assert many.tolist() == pytest.approx([0.6, 0.4])
    assert following[0].tolist() == pytest.approx([0.25 / 0.45, 0, 0.2 / 0.45])
    assert following[1].tolist() == [0.1, 0.1, 0.8]
    many, _ = verification(p, q, torch.tensor([0]))
    assert many.tolist() == [0.0, 1.0]
    assert residual(p, p).tolist() == p.tolist()


def small_sampler() -> Any:
    torch.manual_seed(3)
    config = tiny_config("llama") | {
        "vocab_size": 3, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": None,
        "initializer_range": 0.6,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(**config)
    return transformers.AutoModelForCausalLM.from_config(config).eval().double()


def test_sampled_texts_are_distributed_as_the_model_s() -> None:
    model, length, temperature, count = small_sampler(), 4, 2.0, 600
    prompt = torch.tensor([[1, 2]])
    chances = {}
    for text in itertools.product(range(3), repeat=length):
        ids = torch.cat([prompt, torch.tensor([text])], 1)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, 1:-1] / temperature
        chances[text] = float(logits.softmax(-1)[range(length), list(text)].prod())
    assert sum(chances.values()) == pytest.approx(1)
    draft, generator = Draft(model, Skipped(mlp=(0, 1))), torch.Generator().manual_seed(11)
    settings = DecodingSettings(length, draft_length=2, temperature=temperature, threshold=0.4)
    seen = dict.fromkeys(chances, 0)
    accepted = judged = 0
    for _ in range(count):
        found = decode(model, prompt, draft, settings, eos=(), generator=generator)
        seen[found.tokens] += 1
        accepted, judged = accepted + found.accepted, judged + found.judged
    # Drafts are neither all right nor all wrong.
    assert 0.3 < accepted / judged < 0.9
    # Cells of few expected texts are taken together, as the test's approximation wants it.
    large = [text for text, chance in chances.items() if count * chance >= 5]
    cells = [(seen[text], count * chances[text]) for text in large]
    cells.append((count - sum(n for n, _ in cells), count - sum(e for _, e in cells)))
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    assert chi2.sf(statistic, len(cells) - 1) > 0.01
    assert len(cells) > 15


def test_sampling_follows_its_generator() -> None:
    model = model_of("llama")
    draft, settings = Draft(model, DRAFTS["parts"]), DecodingSettings(10, temperature=1.0)

    def run(seed: int) -> Decoded:
        generator = torch.Generator().manual_seed(seed)
        return decode(model, PROMPT, draft, settings, eos=(), generator=generator)

    assert run(1) == run(1) != run(2)
    # Hardly any temperature is none.
    cold = DecodingSettings(10, temperature=1e-6)
    found = decode(model, PROMPT, draft, cold, eos=(), generator=torch.Generator().manual_seed(0))
    assert list(found.tokens) == plain(model, PROMPT, 10)


# --- what is left out -------------------------------------------------------------------------


def virtual_model(*layers: dict[str, Any]) -> Any:
    """A LLaMA of such virtual layers."""
    torch.manual_seed(4)
    config = modeling_shared.SharedLlamaConfig(**tiny_config("llama"), virtual_layers=[*layers])
    model = modeling_shared.SharedLlamaForCausalLM(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_shared_blocks_are_left_out_of_the_draft() -> None:
    own = {"base": 2, "rank": 3, "normalise": True}
    model = virtual_model({}, own, {}, own)
    skipped = shared_blocks(model.config.to_dict())
    assert skipped == Skipped(block=(1, 3))
    draft = Draft(model, skipped)
    found = greedy(model, PROMPT, draft)
    assert list(found.tokens) == plain(model, PROMPT, MOST)
    assert 0 < found.accepted < found.judged
    # A block's matrices are read once for each of its users, norms and adapters aside.
    attention, mlp = 48 * 8 * (6 + 3 + 3 + 6), 3 * 48 * 40
    block, head = attention + mlp + 2 * 48, 97 * 48
    sides = [(48, 48), (48, 24), (48, 24), (48, 48), (48, 40), (48, 40), (40, 48)]
    adapters = sum(3 * (a + b) for a, b in sides) + 2 * 48
    whole = 4 * block + 2 * adapters + head
    assert draft.cost == pytest.approx((2 * block + head) / whole, rel=1e-12)
    with pytest.raises(InputError, match="no block of this model shares"):
        shared_blocks(tiny_config("llama"))


def test_layers_of_different_widths_and_emulated_ones() -> None:
    widths = [(6, 3, 40), (4, 2, 24), (2, 1, 32), (6, 3, 8)]
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    fields = {str(i): dict(zip(names, width, strict=True)) for i, width in enumerate(widths)}
    config = tiny_config("llama") | {"model_type": "pruned_llama", "per_layer_config": fields}
    torch.manual_seed(6)
    model: Any = build_model(config, lambda cls, parsed: cls(parsed)).eval().double()
    draft = Draft(model, Skipped(block=(1,), mlp=(3,)))
    assert list(greedy(model, PROMPT, draft).tokens) == plain(model, PROMPT, MOST)
    model = virtual_model({}, {"emulate": 2}, {}, {})
    assert list(greedy(model, PROMPT, Draft(model, Skipped(block=(1, 2)))).tokens) == plain(
        model, PROMPT, MOST
    )
    model = virtual_model({"without": "attention"}, {}, {}, {})
    with pytest.raises(InputError, match="no attention is left"):
        Draft(model, Skipped(block=(1, 2), attention=(3,)))
    model = virtual_model({}, {"emulate": 2}, {}, {})
    with pytest.raises(InputError, match="layer 1 has no mlp to leave out"):
        Draft(model, Skipped(mlp=(1,)))


def test_cost_of_parts_by_hand() -> None:
    model = model_of("llama-tied")
    attention, mlp, norm = 48 * 8 * (6 + 3 + 3 + 6), 3 * 48 * 40, 48
    whole = 4 * (attention + mlp + 2 * norm) + 97 * 48
    draft = Draft(model, Skipped(attention=(1,), mlp=(0, 2), block=(3,)))
    gone = 2 * attention + 3 * mlp + 5 * norm
    assert draft.cost == pytest.approx(1 - gone / whole, rel=1e-12)
    assert Draft(model, Skipped()).cost == 1


def test_a_plan_of_depth_pruning_is_a_draft() -> None:
    kept = ({}, None, {}, {})
    plan = Plan("llama", "llama", kept, {}, (10, 8), skipped={"mlp": (3,), "attention": (0, 2)})
    assert Skipped.of_plan(plan) == Skipped(block=(1,), attention=(0, 2), mlp=(3,))
    cut = Plan("llama", "llama", ({"mlp_channel": (0,)}, None), {"mlp_channel": 2}, (10, 8))
    with pytest.raises(InputError, match="more than remove"):
        Skipped.of_plan(cut)


@pytest.mark.parametrize(
    ("name", "skipped", "said"),
    [
        ("llama", Skipped(block=(4,)), r"block of layers \[4\]; allowed: different ones of 0\.\.3"),
        ("llama", Skipped(mlp=(1, 1)), r"mlp of layers \[1, 1\]"),
        ("llama", Skipped(attention=(-1,)), "attention of layers"),
        ("llama", Skipped(block=(True,)), "block of layers"),
        ("llama", Skipped(block=(1,), mlp=(1, 2)), r"\[1\] are named as blocks and by part"),
        ("llama", Skipped(block=(0, 1), attention=(2, 3)), "no attention is left"),
        ("opt-post-norm", Skipped(mlp=(1,)), "remove mlp"),
        ("qwen2-sliding", Skipped(attention=(1,)), "remove attention"),
    ],
)
def test_impossible_drafts_are_refused(name: str, skipped: Skipped, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Draft(model_of(name), skipped)


def test_bad_input_is_refused() -> None:
    model = model_of("llama")
    settings = DecodingSettings(5)
    wrong = (torch.ones(2, 3), torch.ones(3), torch.ones(1, 0), torch.ones(1, 3, dtype=torch.int32))
    for ids in (*(one.long() for one in wrong[:3]), wrong[3]):
        with pytest.raises(InputError, match=r"a prompt .* given; allowed: int64 \[1, length\]"):
            decode(model, ids, None, settings)
    with pytest.raises(InputError, match="66 tokens asked for; the model has 64 positions"):
        decode(model, PROMPT, None, DecodingSettings(60))
    with pytest.raises(InputError, match="draft is of another model"):
        decode(model, PROMPT, Draft(model_of("llama"), DRAFTS["mlp"]), settings)
    with pytest.raises(InputError, match="training mode"):
        decode(model.train(), PROMPT, None, settings)
    for told, said in (
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"new_tokens": 5, "draft_length": 1.5}, "draft_length is 1.5"),
        ({"new_tokens": 5, "threshold": 1.2}, "threshold is 1.2"),
        ({"new_tokens": 5, "temperature": -1.0}, "temperature is -1.0"),
        ({"new_tokens": 5, "temperature": math.nan}, "temperature is nan"),
    ):
        with pytest.raises(InputError, match=said):
            DecodingSettings(**told)


# --- expected speed-up ------------------------------------------------------------------------


def test_expected_speed_up_by_hand() -> None:
    assert expected_tokens(0.8, 5) == pytest.approx(3.68928)
    assert expected_tokens(0.5, 2) == 1.75
    assert expected_tokens(1, 4) == 5
    assert expected_tokens(0, 4) == expected_tokens(0.9, 0) == 1
    assert expected_speed_up(0.8, 5, 0.05) == pytest.approx(3.68928 / 1.25)
    assert expected_speed_up(0.5, 2, 0.6) == pytest.approx(1.75 / 2.2)
    # One draft token pays where it is right more often than it costs (2211.17192, corollary 3.9).
    assert expected_speed_up(0.7, 1, 0.7) == pytest.approx(1)
    assert best_draft_length(0.5, 0.6) == 0
    assert best_draft_length(0.8, 0.1) == 6
    assert best_draft_length(1, 0.5, most=7) == 7
    for wrong in (lambda: expected_tokens(1.1, 2), lambda: expected_tokens(0.5, -1)):
        with pytest.raises(InputError, match="allowed"):
            wrong()
    # Three rounds of 2, 2 and 1 draft tokens, of which 2, 0 and 1 are accepted.
    assert counted_speed_up(6, 3, 5 * 0.4) == pytest.approx(6 / 5)
    # Two passes of a search at the same cost are work as well.
    assert counted_speed_up(6, 3, 7 * 0.4) == pytest.approx(6 / 5.8)
    with pytest.raises(InputError, match="0 passes"):
        counted_speed_up(6, 0, 2.0)
    with pytest.raises(InputError, match="cost ratio nan"):
        expected_speed_up(0.5, 2, math.nan)


# --- SWIFT ------------------------------------------------------------------------------------


def deep(layers: int = 6) -> Any:
    torch.manual_seed(0)
    config = tiny_config("llama") | {"num_hidden_layers": layers}
    config = transformers.AutoConfig.for_model(**config)
    return transformers.AutoModelForCausalLM.from_config(config).eval().double()


def test_matchness_is_the_share_of_agreeing_tokens() -> None:
    model = deep()
    tokens = torch.tensor([plain(model, PROMPT, 30)])
    cache = DraftCache()
    with torch.no_grad():
        model(PROMPT, past_key_values=cache, use_cache=True)
        found = matchness(Draft(model, Skipped(mlp=(2, 3))), tokens, cache.prefix(6))
        with lacking(model, "mlp", (2, 3)) as smaller:
            logits = smaller(tokens[:, :-1], past_key_values=cache, use_cache=True).logits[0]
    right = [int(row.argmax()) == token for row, token in zip(logits, tokens[0, 1:], strict=True)]
    assert len(right) == 29
    assert found == sum(right) / 29
    assert 0 < found < 1


def test_upper_confidence_bounds_are_a_gaussian_process_s() -> None:
    draw = np.random.default_rng(0)
    points, candidates = draw.integers(0, 2, (2, 12, 8)).astype(float)
    scores = draw.random(12)
    other = GaussianProcessRegressor(
        Matern(length_scale=1.7, nu=2.5), alpha=1e-2, optimizer=None, normalize_y=True
    ).fit(points, scores)
    mean, deviation = other.predict(candidates, return_std=True)
    expected = (mean - scores.mean() + 2.5 * deviation) / scores.std()
    found = upper_confidence(points, scores, candidates, 1.7, 1e-2, 2.5)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    # Equal scores say nothing; no division by their deviation.
    assert np.isfinite(upper_confidence(points, np.ones(12), candidates, 1.7, 1e-2, 2.5)).all()


def simulated(interval: int, seed: int) -> float:
    """The best of 60 candidates where the score is the share of a planted set that was found."""
    search = Search(deep(14), SwiftSettings(bayes_interval=interval, seed=seed, stop_score=1.0))
    planted = np.zeros(24)
    planted[np.random.default_rng(100 + seed).permutation(24)[:10]] = 1
    for _ in range(60):
        point = search.propose()
        assert point.shape == (24,)
        assert point.sum() == 10
        search.tell(point, float((point * planted).sum() / 10))
    return search.best


def test_the_gaussian_process_finds_better_sets_than_chance() -> None:
    seeds = range(4)
    guided, blind = ([simulated(every, s) for s in seeds] for every in (2, 10**6))
    assert min(guided) >= 0.9
    assert np.mean(guided) > np.mean(blind) + 0.1
    assert simulated(2, 0) == guided[0]


def test_the_rules_that_end_the_search() -> None:
    model = deep()
    point = np.zeros(8)

    def told(*scores: float, **settings: Any) -> Search:
        search = Search(model, SwiftSettings(**settings))
        for score in scores:
            assert not search.finished
            search.tell(point, score)
        return search

    assert told(0.5, 0.96).finished
    assert not told(0.5, 0.95).finished
    assert told(0.1, 0.2, 0.3, iterations=3).finished
    assert not told(0.1, 0.2, 0.3, iterations=4).finished
    assert told(0.5, 0.4, 0.5, patience=2).finished
    assert not told(0.5, 0.4, 0.6, 0.5, patience=2).finished
    assert told(0.2).wants(33)
    assert not told(0.2).wants(32)


def test_candidates_are_sets_of_inner_sub_layers() -> None:
    search = Search(deep(), SwiftSettings(skip_ratio=0.4))
    assert search.draft.skipped == Skipped(attention=(1, 3), mlp=(1, 3))
    drawn = np.array([search.propose() for _ in range(300)])
    assert set(drawn.sum(1)) == {3}
    # All of them are drawn alike: 112 of 300 expected, with a standard deviation of 8.4.
    assert (abs(drawn.sum(0) - 112.5) < 34).all()
    again = Search(deep(), SwiftSettings(skip_ratio=0.4))
    assert np.array_equal(drawn[0], again.propose())
    other = Search(deep(), SwiftSettings(skip_ratio=0.4, seed=1))
    assert not np.array_equal(drawn[:5], [other.propose() for _ in range(5)])


def test_the_search_finds_what_does_nothing_while_it_decodes() -> None:
    """Two inner sub-layers do nothing; of 28 sets, theirs alone agrees with the model always."""
    model = deep()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[4].mlp.down_proj.weight.zero_()
    before, modules = weights_hash(model), modules_of(model)
    search = Search(model, SwiftSettings(skip_ratio=0.25, window=8, bayes_interval=5, seed=2))
    first = search.draft
    searches, rates = 0, []
    for seed in range(6):
        ids = torch.randint(3, 97, (1, 5), generator=torch.Generator().manual_seed(seed))
        found = greedy(model, ids, search, 40)
        assert list(found.tokens) == plain(model, ids, 40)
        searches += found.searches
        # Each candidate leaves out two of the sub-layers, all of which are smaller than a layer.
        assert 0.5 * found.searches <= found.search_work <= found.searches
        assert (found.search_work > 0) == (found.searches > 0)
        assert 0.5 * found.drafted < found.draft_work < found.drafted
        rates.append(found.acceptance_rate)
    assert searches == len(search.scores) > 8
    assert search.finished
    assert search.best == 1.0
    assert search.draft is not first
    assert search.draft.skipped == Skipped(attention=(2,), mlp=(4,))
    assert rates[0] < 0.9
    assert rates[-1] == 1.0
    assert (weights_hash(model), modules_of(model)) == (before, modules)
    # From its scores alone, another one comes to stand where this one does.
    other = Search(model, search.settings)
    other.resume(search.scores)
    assert (other.scores, other.best, other.finished) == (search.scores, 1.0, True)
    assert other.draft.skipped == search.draft.skipped
    assert np.array_equal(other.propose(), search.propose())


def test_impossible_searches_are_refused() -> None:
    with pytest.raises(InputError, match="of 4 sub-layers"):
        Search(deep(4), SwiftSettings(skip_ratio=0.2))
    with pytest.raises(InputError, match="of 0 sub-layers"):
        Search(deep(2), SwiftSettings())
    with pytest.raises(InputError, match="remove attention"):
        Search(model_of("opt-post-norm"), SwiftSettings())
    for told, said in (
        ({"skip_ratio": 1.0}, "skip_ratio is 1.0"),
        ({"window": 0}, "window is 0"),
        ({"noise": 0}, "noise is 0"),
    ):
        with pytest.raises(InputError, match=said):
            SwiftSettings(**told)


def test_the_prompt_s_logits_are_formed_at_its_end_alone() -> None:
    model = model_of("llama")
    seen: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    cache = DraftCache()
    with torch.no_grad():
        decoding._prompt_logits(model, PROMPT, cache)
    hook.remove()
    assert seen == [1]
    assert cache.length == PROMPT.shape[1]
