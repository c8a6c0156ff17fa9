"""Tiny random models of every supported architecture, saved as ordinary checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import report_missed

# Tiny models gain nothing from threads, and those of two workers would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

LLAMA_LIKE = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
OPT = {
    "model_type": "opt",
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "ffn_dim": 40,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}
BLOOM = {"model_type": "bloom", "n_layer": 4, "n_head": 6, "initializer_range": 0.2}

# Heads that divide the hidden size and heads that do not, grouped, multi-head and single-kv;
# with and without biases; norms before and after; numbers of heads that are no powers of two.
TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 3},
    "llama-mha": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4},
    "llama-bias": {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-tied": {
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "model_type": "mistral",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "sliding_window": None,
    },
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 3},
    "qwen2-sliding": {
        "model_type": "qwen2",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
    },
    "qwen3": {
        "model_type": "qwen3",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "opt": OPT,
    # As opt-350m: norms after the sums, an embedding narrower than the layers.
    "opt-post-norm": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "opt-bare": OPT
    | {
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "tie_word_embeddings": False,
        "_remove_final_layer_norm": True,
    },
    # Two kv heads for eight query heads, as GLM-4; the heads are wider than the residual stream.
    "glm": {"model_type": "glm", "num_attention_heads": 8, "num_key_value_heads": 2},
    "glm-tied": {
        "model_type": "glm",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "bloom": BLOOM,
    "bloom-8": BLOOM | {"n_head": 8, "tie_word_embeddings": False},
}


def tiny_config(name: str) -> dict[str, Any]:
    own = TINY[name]
    return {
        "hidden_size": 48,
        "vocab_size": 97,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **({} if own["model_type"] in ("opt", "bloom") else LLAMA_LIKE),
        **own,
    }


def tiny_model(name: str, seed: int = 0) -> Any:
    """A random model whose norms and biases are not the neutral ones of a fresh model."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**tiny_config(name))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves (once) and names the tiny checkpoint of a config."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            directory = tmp_path_factory.mktemp(f"tiny-{name}")
            tiny_model(name).save_pretrained(directory)
            tiny_tokenizer().save_pretrained(directory)
            made[name] = directory
        return made[name]

    return get


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer with 97 tokens: printable ASCII and two specials."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *(chr(c) for c in range(32, 126))]
    vocabulary = {"<unk>": 0, "<s>": 1, **{c: i + 2 for i, c in enumerate(characters)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<s>"
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say in one line each which GPU and SLURM checks could not run here."""
    missed = [r for r in terminalreporter.stats.get("skipped", []) if "gpu" in r.keywords]
    if missed:
        names = sorted({report.nodeid.partition("::")[2].partition("[")[0] for report in missed})
        terminalreporter.write_line(
            f"not run for want of GPUs: {len(missed)} checks ({', '.join(names)})"
        )
    report_missed(terminalreporter)
