"""Models with layers that share another layer's weights, for transformers 5.15 and later.

This file stands alone and is saved beside the weights. ``config.virtual_layers[i]`` says what layer
``i`` is, in the order of computation:

* ``{}``: a stock layer with weights of its own;
* ``{"base": j, "rank": r, "normalise": true}``: the matrices of layer ``j``, each with an adapter
  of rank ``r`` of its own, ``y = W_j x + A B x`` (FlexiGPT, arXiv 2501.14713). Norms are its own,
  biases what its own ones differ from the base's by. With ``normalise`` the outputs of attention
  and MLP are ``(h - mean) / std * gain`` over the hidden dimension before they join the residual
  stream (the paper's equation 6);
* ``{"emulate": r}``: no block but ``h + bias + A B h``, of rank ``r``, without A and B at 0 (arXiv
  2407.16286);
* ``{"without": "attention"}`` or ``{"without": "mlp"}``: a stock layer that lacks a part.

A weight exists once, in memory and on disk, however many layers use it. Every layer with attention
has a slot of its own in the cache.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# Added to the variance of a normalised output.
EPSILON = 1e-5


class SharedLinear(nn.Module):
    """Another layer's linear map with an adapter: ``base(x) + A B x``, with bias and gain.

    Parameters: ``A`` [out, r], ``B`` [r, in]; ``bias`` [out] where the base has one, which is added
    to the base's; ``gain`` [out] where the output is normalised.
    """

    def __init__(self, layer, name, linear, rank, normalise):  # type: ignore[no-untyped-def]
        """``name`` is that of ``linear`` in its ``layer``, where it is looked up when it is used.

        So an adapter put on the base later (peft replaces the module) holds for all its users.
        """
        super().__init__()
        # In a tuple: a module would be registered, and its weights would be named twice.
        self._layer = (layer,)
        self._name = name
        rows, columns = linear.weight.shape
        rank = min(rank, rows, columns)
        like = linear.weight.new_zeros
        self.A = nn.Parameter(like(rows, rank))
        self.B = nn.Parameter(like(rank, columns))
        self.bias = nn.Parameter(like(rows)) if linear.bias is not None else None
        self.gain = nn.Parameter(like(rows)) if normalise else None

    @property
    def base(self):  # type: ignore[no-untyped-def]
        """The linear map whose weights this one uses."""
        return self._layer[0].get_submodule(self._name)

    def forward(self, x):  # type: ignore[no-untyped-def]
        """Return the output [..., out] of ``x`` [..., in]."""
        base = self.base
        # The base may live on another device.
        y = base(x.to(base.weight.device)).to(x.device)
        y = y + F.linear(F.linear(x, self.B), self.A)
        if self.bias is not None:
            y = y + self.bias
        if self.gain is not None:
            y = F.layer_norm(y, y.shape[-1:], self.gain, None, EPSILON).to(y.dtype)
        return y


class _Nothing(nn.Module):
    """Stands in the place of a part that is gone: adds nothing to the residual stream."""

    def forward(self, hidden_states, residual=None, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Return the residual stream where the part itself would add to it, else zeros."""
        return torch.zeros_like(hidden_states) if residual is None else residual


class _NoAttention(_Nothing):
    """The same for an attention, which also returns its weights."""

    def forward(self, hidden_states, residual=None, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Return what stands for its output, and no weights."""
        return super().forward(hidden_states, residual), None


# What is put in the place of a part's modules, by the modules that a layer has.
_PARTS = {
    "attention": {
        "self_attn": _NoAttention,
        "self_attention": _NoAttention,
        "self_attn_layer_norm": nn.Identity,
        "input_layernorm": nn.Identity,
    },
    "mlp": {
        "mlp": _Nothing,
        "fc1": nn.Identity,
        "fc2": _Nothing,
        "final_layer_norm": nn.Identity,
        "post_attention_layernorm": nn.Identity,
    },
}


def remove_part(layer, part):  # type: ignore[no-untyped-def]
    """Take the attention or the MLP, with its norm, out of a decoder layer."""
    for name, nothing in _PARTS[part].items():
        if name in layer._modules:
            setattr(layer, name, nothing())


def share(layer, base, rank, normalised):  # type: ignore[no-untyped-def]
    """Let all linear maps of ``layer`` use those of the layer ``base``.

    Args:
        layer: a stock decoder layer.
        base: another one, of the same shapes.
        rank: of the adapters.
        normalised: names, relative to the layer, of the maps whose outputs are normalised.
    """
    names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        parent, _, own = name.rpartition(".")
        linear = layer.get_submodule(name)
        shared = SharedLinear(base, name, linear, rank, name in normalised)
        setattr(layer.get_submodule(parent), own, shared)


class EmulatedLayer(nn.Module):
    """Stands in the place of a whole decoder layer: ``h + bias + A B h``.

    Parameters: ``bias`` [hidden]; with a rank ``A`` [hidden, r] and ``B`` [r, hidden].
    """

    def __init__(self, like, rank, pair):  # type: ignore[no-untyped-def]
        """``like`` is a vector as wide as the residual stream; ``pair``: whether layers return two.

        The second one are attention weights, of which there are none.
        """
        super().__init__()
        new = like.new_zeros
        self.bias = nn.Parameter(new(len(like)))
        if rank:
            self.A = nn.Parameter(new(len(like), rank))
            self.B = nn.Parameter(new(rank, len(like)))
        self._rank = rank
        self._pair = pair

    def forward(self, hidden_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Return the residual stream behind the layer [..., hidden]."""
        y = hidden_states + self.bias
        if self._rank:
            y = y + F.linear(F.linear(hidden_states, self.B), self.A)
        return (y, None) if self._pair else y


class _VirtualLayersMixin:
    """Builds the stock model at its full depth, then takes out what layers share or lack."""

    layer_prefix = "model.layers"
    output_maps: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    # Whether a layer returns its attention's weights, too.
    layers_return_pairs = False

    def __init__(self, config):  # type: ignore[no-untyped-def]
        super().__init__(config)
        layers = self.get_submodule(self.layer_prefix)
        slot = 0
        for place, own in enumerate(config.virtual_layers):
            layer = layers[place]
            if "emulate" in own:
                like = layer.get_submodule(self.output_maps[-1]).weight[:, 0]
                layers[place] = EmulatedLayer(like, own["emulate"], self.layers_return_pairs)
                continue
            if "base" in own:
                outputs = self.output_maps if own["normalise"] else ()
                share(layer, layers[own["base"]], own["rank"], outputs)
            if "without" in own:
                remove_part(layer, own["without"])
            # The first slots of the cache are asked for the length of what is in it.
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = slot
            slot += own.get("without") != "attention"


class SharedLlamaConfig(LlamaConfig):
    """LLaMA configuration with ``virtual_layers``."""

    model_type = "pruned_llama"


class SharedMistralConfig(MistralConfig):
    """Mistral configuration with ``virtual_layers``."""

    model_type = "pruned_mistral"


class SharedQwen2Config(Qwen2Config):
    """Qwen2 configuration with ``virtual_layers``."""

    model_type = "pruned_qwen2"


class SharedQwen3Config(Qwen3Config):
    """Qwen3 configuration with ``virtual_layers``."""

    model_type = "pruned_qwen3"


class SharedGlmConfig(GlmConfig):
    """GLM configuration with ``virtual_layers``."""

    model_type = "pruned_glm"


class SharedOPTConfig(OPTConfig):
    """OPT configuration with ``virtual_layers``."""

    model_type = "pruned_opt"


class SharedBloomConfig(BloomConfig):
    """BLOOM configuration with ``virtual_layers``."""

    model_type = "pruned_bloom"

    def to_dict(self):  # type: ignore[no-untyped-def]
        """Name the number of layers as those expect who read the file without this class."""
        return super().to_dict() | {"num_hidden_layers": self.n_layer}


class SharedLlamaForCausalLM(_VirtualLayersMixin, LlamaForCausalLM):
    """LLaMA with layers that share weights."""

    config_class = SharedLlamaConfig


class SharedMistralForCausalLM(_VirtualLayersMixin, MistralForCausalLM):
    """Mistral with layers that share weights."""

    config_class = SharedMistralConfig


class SharedQwen2ForCausalLM(_VirtualLayersMixin, Qwen2ForCausalLM):
    """Qwen2 with layers that share weights."""

    config_class = SharedQwen2Config


class SharedQwen3ForCausalLM(_VirtualLayersMixin, Qwen3ForCausalLM):
    """Qwen3 with layers that share weights."""

    config_class = SharedQwen3Config


class SharedGlmForCausalLM(_VirtualLayersMixin, GlmForCausalLM):
    """GLM with layers that share weights."""

    config_class = SharedGlmConfig


class SharedOPTForCausalLM(_VirtualLayersMixin, OPTForCausalLM):
    """OPT with layers that share weights."""

    config_class = SharedOPTConfig
    layer_prefix = "model.decoder.layers"
    output_maps = ("self_attn.out_proj", "fc2")


class SharedBloomForCausalLM(_VirtualLayersMixin, BloomForCausalLM):
    """BLOOM with layers that share weights."""

    config_class = SharedBloomConfig
    layer_prefix = "transformer.h"
    layers_return_pairs = True
    output_maps = ("self_attention.dense", "mlp.dense_4h_to_h")
