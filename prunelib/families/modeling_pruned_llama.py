"""LLaMA-like models whose layers differ in width, for transformers 5.15 and later.

This file stands alone and is saved beside the weights. Each decoder layer is built from its own
resolved configuration (``config.per_layer_config[i]``: attention heads, key-value heads and MLP
width); everything else is the stock model of the family.
"""

import copy

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


def _without_layers(config):  # type: ignore[no-untyped-def]
    """Return a copy of ``config`` that builds everything but the decoder layers."""
    outer = copy.copy(config)
    outer.per_layer_config = None
    outer.num_hidden_layers = 0
    return outer


class _PerLayerMixin:
    """Builds the stock model without layers, then each layer from its own configuration."""

    decoder_layer: type[nn.Module]

    def __init__(self, config):  # type: ignore[no-untyped-def]
        super().__init__(_without_layers(config))
        # Chosen by the constructor above; every layer's configuration is a copy that carries it.
        config._attn_implementation = self.config._attn_implementation
        self.config = self.model.config = config
        self.model.layers = nn.ModuleList(
            self.decoder_layer(config.per_layer_config[i], i)
            for i in range(config.num_hidden_layers)
        )
        self.post_init()

    def set_attn_implementation(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Choose the attention of all layers, whose configurations are copies."""
        super().set_attn_implementation(*args, **kwargs)
        for layer in self.model.layers:
            layer.self_attn.config._attn_implementation = self.config._attn_implementation


class PrunedLlamaConfig(LlamaConfig):
    """LLaMA configuration with per-layer widths."""

    model_type = "pruned_llama"

    def validate_architecture(self):  # type: ignore[no-untyped-def]
        """Accept head counts that do not divide the hidden size: ``head_dim`` is explicit."""


class PrunedMistralConfig(MistralConfig):
    """Mistral configuration with per-layer widths."""

    model_type = "pruned_mistral"


class PrunedQwen2Config(Qwen2Config):
    """Qwen2 configuration with per-layer widths."""

    model_type = "pruned_qwen2"


class PrunedQwen3Config(Qwen3Config):
    """Qwen3 configuration with per-layer widths."""

    model_type = "pruned_qwen3"


class PrunedLlamaForCausalLM(_PerLayerMixin, LlamaForCausalLM):
    """LLaMA with per-layer widths."""

    config_class = PrunedLlamaConfig
    decoder_layer = LlamaDecoderLayer


class PrunedMistralForCausalLM(_PerLayerMixin, MistralForCausalLM):
    """Mistral with per-layer widths."""

    config_class = PrunedMistralConfig
    decoder_layer = MistralDecoderLayer


class PrunedQwen2ForCausalLM(_PerLayerMixin, Qwen2ForCausalLM):
    """Qwen2 with per-layer widths."""

    config_class = PrunedQwen2Config
    decoder_layer = Qwen2DecoderLayer


class PrunedQwen3ForCausalLM(_PerLayerMixin, Qwen3ForCausalLM):
    """Qwen3 with per-layer widths."""

    config_class = PrunedQwen3Config
    decoder_layer = Qwen3DecoderLayer
