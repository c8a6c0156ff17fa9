"""GLM: the ChatGLM lineage as transformers has it (GLM-4-9B, GLM-Edge), few kv heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from prunelib.families.base import (
    Config,
    Dimensions,
    LayerFields,
    Shape,
    UnitKind,
    columns,
    linear_shapes,
    per_layer,
    rows,
)
from prunelib.families.llama import LlamaFamily, grouped_heads, widest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MODEL_TYPES = ("glm", "pruned_glm")

# What GlmConfig assumes where a config.json is silent.
_DEFAULTS = {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True}


class GlmFamily(LlamaFamily):
    """GLM: heads as in LLaMA-like models, gate and up projections fused.

    Units: ``kv_group``, ``query_slot`` (with two kv heads the only ones finer than a half),
    ``mlp_channel`` (rows ``i`` and ``i + intermediate_size`` of ``gate_up_proj``, column ``i`` of
    ``down_proj``) and ``residual_channel``. Only a part of every head is rotated; heads are kept
    or removed whole.
    """

    name = "glm"
    mlp_inputs: ClassVar[tuple[str, ...]] = ("mlp.gate_up_proj",)

    def dimensions(self, config: Config) -> Dimensions:
        """Return the sizes of the unpruned model."""
        return super().dimensions(_DEFAULTS | dict(config))

    def layer_shapes(self, config: Config) -> dict[str, Shape]:
        """Return the shape of every parameter of one unpruned layer."""
        size = self.dimensions(config)
        bias = bool(config.get("attention_bias", _DEFAULTS["attention_bias"]))
        queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
        return linear_shapes(
            {
                "self_attn.q_proj": (queries, size.hidden, bias),
                "self_attn.k_proj": (keys, size.hidden, bias),
                "self_attn.v_proj": (keys, size.hidden, bias),
                "self_attn.o_proj": (size.hidden, queries, False),
                "mlp.gate_up_proj": (2 * size.inner, size.hidden, False),
                "mlp.down_proj": (size.hidden, size.inner, False),
            }
        ) | {
            "input_layernorm.weight": (size.hidden,),
            "post_attention_layernorm.weight": (size.hidden,),
        }

    def units(self, config: Config) -> dict[str, UnitKind]:
        """Return kv groups, query slots and MLP channels with the slices they own."""
        size, shapes = self.dimensions(config), self.layer_shapes(config)
        channel = np.arange(size.inner)
        gate_and_up = np.concatenate([channel, channel])
        return {
            **grouped_heads(size, shapes),
            "mlp_channel": UnitKind(
                "mlp_channel",
                size.inner,
                rows(shapes, "mlp.gate_up_proj", gate_and_up) + columns("mlp.down_proj", channel),
            ),
        }

    def activation_inputs(self) -> tuple[str, ...]:
        """Return one module per distinct input: q shares its input with k and v."""
        return ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")

    def pruned_config(
        self, config: Config, layers: Sequence[LayerFields], kept_layers: Sequence[int]
    ) -> tuple[dict[str, Any], bool]:
        """Write the config of a pruned model; equal layers give a stock config."""
        new = dict(config) | widest(layers)
        new |= {"num_hidden_layers": len(layers), "head_dim": self.dimensions(config).head_dim}
        if all(fields == layers[0] for fields in layers):
            return new, True
        return per_layer(new, layers, title="Glm", module="modeling_pruned_glm"), False

    def model_class(self, config: Config) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        """Return the transformers classes, or ours for layers of different widths."""
        from transformers import GlmConfig, GlmForCausalLM

        from prunelib.families import modeling_pruned_glm as pruned

        if config["model_type"] == "pruned_glm":
            return pruned.PrunedGlmConfig, pruned.PrunedGlmForCausalLM
        return GlmConfig, GlmForCausalLM

    def modeling_file(self) -> str:
        """Return the path of ``modeling_pruned_glm.py``."""
        from prunelib.families import modeling_pruned_glm

        return modeling_pruned_glm.__file__


FAMILY = GlmFamily
