"""OPT models with fewer heads or layers of different widths, for transformers 5.15 and later.

This file stands alone and is saved beside the weights. Each decoder layer is built from its own
resolved configuration (``config.per_layer_config[i]``: attention heads and MLP width, every head
``config.head_dim`` wide); everything else is the stock model.
"""

import copy

from torch import nn
from transformers import OPTConfig, OPTForCausalLM
from transformers.models.opt.modeling_opt import OPTDecoderLayer


class PrunedOPTConfig(OPTConfig):
    """OPT configuration with per-layer widths and an explicit head width."""

    model_type = "pruned_opt"


def _decoder_layer(config, index):  # type: ignore[no-untyped-def]
    """Return a stock layer with ``num_attention_heads`` heads of ``head_dim``."""
    whole = copy.copy(config)
    # The stock layer takes the width of a head, and the scale of the queries, from these two.
    whole.num_attention_heads = config.hidden_size // config.head_dim
    layer = OPTDecoderLayer(whole, index)
    attention, heads = layer.self_attn, config.num_attention_heads
    if heads != attention.num_heads:
        outer, inner, bias = config.hidden_size, heads * config.head_dim, config.enable_bias
        attention.num_heads = heads
        for name in ("k_proj", "v_proj", "q_proj"):
            setattr(attention, name, nn.Linear(outer, inner, bias=bias))
        attention.out_proj = nn.Linear(inner, outer, bias=bias)
    return layer


class PrunedOPTForCausalLM(OPTForCausalLM):
    """OPT with per-layer widths."""

    config_class = PrunedOPTConfig

    def __init__(self, config):  # type: ignore[no-untyped-def]
        outer = copy.copy(config)
        outer.per_layer_config = None
        outer.num_hidden_layers = 0
        super().__init__(outer)
        # Chosen by the constructor above; every layer's configuration is a copy that carries it.
        config._attn_implementation = self.config._attn_implementation
        self.config = self.model.config = self.model.decoder.config = config
        self.model.decoder.layers = nn.ModuleList(
            _decoder_layer(config.per_layer_config[i], i) for i in range(config.num_hidden_layers)
        )
        self.post_init()

    def set_attn_implementation(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Choose the attention of all layers, whose configurations are copies."""
        super().set_attn_implementation(*args, **kwargs)
        for layer in self.model.decoder.layers:
            layer.self_attn.config._attn_implementation = self.config._attn_implementation
