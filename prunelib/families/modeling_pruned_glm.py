"""GLM models whose layers differ in width, for transformers 5.15 and later.

This file stands alone and is saved beside the weights. Each decoder layer is built from its own
resolved configuration (``config.per_layer_config[i]``: attention heads, key-value heads and MLP
width); everything else is the stock model.
"""

import copy

from torch import nn
from transformers import GlmConfig, GlmForCausalLM
from transformers.models.glm.modeling_glm import GlmDecoderLayer


class PrunedGlmConfig(GlmConfig):
    """GLM configuration with per-layer widths."""

    model_type = "pruned_glm"


class PrunedGlmForCausalLM(GlmForCausalLM):
    """GLM with per-layer widths."""

    config_class = PrunedGlmConfig

    def __init__(self, config):  # type: ignore[no-untyped-def]
        outer = copy.copy(config)
        outer.per_layer_config = None
        outer.num_hidden_layers = 0
        super().__init__(outer)
        # Chosen by the constructor above; every layer's configuration is a copy that carries it.
        config._attn_implementation = self.config._attn_implementation
        self.config = self.model.config = config
        self.model.layers = nn.ModuleList(
            GlmDecoderLayer(config.per_layer_config[i], i) for i in range(config.num_hidden_layers)
        )
        self.post_init()

    def set_attn_implementation(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Choose the attention of all layers, whose configurations are copies."""
        super().set_attn_implementation(*args, **kwargs)
        for layer in self.model.layers:
            layer.self_attn.config._attn_implementation = self.config._attn_implementation
