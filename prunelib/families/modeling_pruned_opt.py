"""OPT models with fewer heads or channels, for transformers 5.15 and later.

This file stands alone and is saved beside the weights. Each decoder layer is built from its own
resolved configuration (``config.per_layer_config[i]``: attention heads and MLP width, every head
``config.head_dim`` wide; ``config.hidden_size`` is what is left of the residual stream); everything
else is the stock model.
"""

import copy

from torch import nn
from transformers import OPTConfig, OPTForCausalLM
from transformers.models.opt.modeling_opt import OPTAttention, OPTDecoderLayer


class PrunedOPTConfig(OPTConfig):
    """OPT configuration with per-layer widths and an explicit head width."""

    model_type = "pruned_opt"


def _decoder_layer(config, index):  # type: ignore[no-untyped-def]
    """Return a stock layer with ``num_attention_heads`` heads of ``head_dim``."""
    single, inside = copy.copy(config), copy.copy(config)
    # Its attention, which is replaced, refuses widths that are no multiple of the heads.
    single.num_attention_heads = 1
    layer = OPTDecoderLayer(single, index)
    outer, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    # The stock attention takes the width of a head, and the scale of the queries, from this.
    inside.hidden_size = inner
    attention = layer.self_attn = OPTAttention(inside, index)
    if inner != outer:
        for name in ("k_proj", "v_proj", "q_proj"):
            setattr(attention, name, nn.Linear(outer, inner, bias=config.enable_bias))
        attention.out_proj = nn.Linear(inner, outer, bias=config.enable_bias)
    # Where the implementation of attention is chosen.
    attention.config = config
    return layer


def _projections(config, decoder):  # type: ignore[no-untyped-def]
    """Add the projections between embedding and layers, which stock OPT leaves out if square."""
    outer, inner = config.word_embed_proj_dim, config.hidden_size
    if getattr(config, "embedding_projection", False) and outer == inner:
        decoder.project_in = nn.Linear(outer, inner, bias=False)
        decoder.project_out = nn.Linear(inner, outer, bias=False)


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
        _projections(config, self.model.decoder)
        self.model.decoder.layers = nn.ModuleList(
            _decoder_layer(config.per_layer_config[i], i) for i in range(config.num_hidden_layers)
        )
        self.post_init()

    def set_attn_implementation(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Choose the attention of all layers, whose configurations are copies."""
        super().set_attn_implementation(*args, **kwargs)
        for layer in self.model.decoder.layers:
            layer.self_attn.config._attn_implementation = self.config._attn_implementation
