"""BLOOM models with fewer heads or channels, for transformers 5.15 and later.

This file stands alone and is saved beside the weights. ``config.per_layer_config[i]`` holds the
heads that layer ``i`` keeps, by their index in the original model (``alibi_heads``), and its MLP
width (``intermediate_size``); ``config.n_head`` is the original number of heads, each
``config.head_dim`` wide, and ``config.hidden_size`` what is left of the residual stream. The ALiBi
slope of a head depends on both index and number, so that the stock model computes the bias of all
original heads and every layer takes those of its own.
"""

import copy

from torch import nn
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomBlock


class PrunedBloomConfig(BloomConfig):
    """BLOOM configuration with per-layer heads and widths."""

    model_type = "pruned_bloom"

    def to_dict(self):  # type: ignore[no-untyped-def]
        """Name the number of layers as those expect who read ``per_layer_config`` without us."""
        return super().to_dict() | {"num_hidden_layers": self.n_layer}


class PrunedBloomAttention(BloomAttention):
    """The stock attention over some of the original heads."""

    def __init__(self, config, layer_idx, heads):  # type: ignore[no-untyped-def]
        whole = copy.copy(config)
        # The stock attention takes the width of a head, and the scale of the scores, from these.
        whole.hidden_size = config.n_head * config.head_dim
        super().__init__(whole, layer_idx)
        self.hidden_size = config.hidden_size
        self.original_heads, self.kept_heads = self.num_heads, list(heads)
        self.num_heads = len(self.kept_heads)
        inner = self.num_heads * self.head_dim
        self.query_key_value = nn.Linear(self.hidden_size, 3 * inner, bias=True)
        self.dense = nn.Linear(inner, self.hidden_size)

    def forward(self, hidden_states, residual, alibi, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Take the kept heads out of ``alibi`` [batch * original heads, 1, keys]."""
        if self.num_heads != self.original_heads:
            batch, keys = hidden_states.shape[0], alibi.shape[-1]
            alibi = alibi.view(batch, self.original_heads, 1, keys)[:, self.kept_heads]
            alibi = alibi.reshape(batch * self.num_heads, 1, keys)
        return super().forward(hidden_states, residual, alibi, *args, **kwargs)


def _block(config, layer_config, index):  # type: ignore[no-untyped-def]
    """Return a stock block with the heads and MLP channels of ``layer_config``."""
    single = copy.copy(config)
    # Its attention, which is replaced, refuses widths that are no multiple of the heads.
    single.n_head = 1
    block = BloomBlock(single, index)
    block.num_heads = len(layer_config.alibi_heads)
    block.self_attention = PrunedBloomAttention(config, index, layer_config.alibi_heads)
    outer, inner = config.hidden_size, layer_config.intermediate_size
    block.mlp.dense_h_to_4h = nn.Linear(outer, inner)
    block.mlp.dense_4h_to_h = nn.Linear(inner, outer)
    return block


class PrunedBloomForCausalLM(BloomForCausalLM):
    """BLOOM with per-layer heads and widths."""

    config_class = PrunedBloomConfig

    def __init__(self, config):  # type: ignore[no-untyped-def]
        outer = copy.copy(config)
        outer.per_layer_config = None
        outer.num_hidden_layers = 0
        super().__init__(outer)
        # Chosen by the constructor above.
        config._attn_implementation = self.config._attn_implementation
        self.config = self.transformer.config = config
        self.transformer.h = nn.ModuleList(
            _block(outer, config.per_layer_config[i], i) for i in range(config.num_hidden_layers)
        )
        self.post_init()
