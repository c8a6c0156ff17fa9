"""LLaMA-like decoders with grouped-query attention: LLaMA 1-3, Vicuna, Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from prunelib.errors import InputError
from prunelib.families.base import (
    Config,
    Dimensions,
    Family,
    LayerFields,
    Shape,
    UnitKind,
    columns,
    kept_count,
    linear_shapes,
    per_layer,
    refuse_pruned,
    residual_channels,
    residual_width,
    rows,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MODEL_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "pruned_llama",
    "pruned_mistral",
    "pruned_qwen2",
    "pruned_qwen3",
)


def head_dim(config: Config) -> int:
    """Return the width of one head; configs that do not state it divide the hidden size."""
    given = config.get("head_dim")
    return int(given) if given else int(config["hidden_size"]) // int(config["num_attention_heads"])


def _biases(config: Config) -> tuple[bool, bool, bool]:
    """Return whether q/k/v, o and the MLP have biases."""
    model_type = str(config["model_type"])
    if model_type == "qwen2":
        return True, False, False
    attention = bool(config.get("attention_bias", False)) and model_type in ("llama", "qwen3")
    return attention, attention, bool(config.get("mlp_bias", False)) and model_type == "llama"


def grouped_heads(size: Dimensions, shapes: Mapping[str, Shape]) -> dict[str, UnitKind]:
    """Return the kinds ``kv_group`` and ``query_slot`` of separate q, k, v and o projections.

    Args:
        size: the model's sizes.
        shapes: the layer's parameters (with or without biases).
    """
    per_group = size.heads // size.kv_heads
    head_of_row = np.arange(size.heads * size.head_dim) // size.head_dim
    kv_row = np.arange(size.kv_heads * size.head_dim) // size.head_dim
    group_of_row, slot_of_row = head_of_row // per_group, head_of_row % per_group
    return {
        "kv_group": UnitKind(
            "kv_group",
            size.kv_heads,
            rows(shapes, "self_attn.q_proj", group_of_row)
            + rows(shapes, "self_attn.k_proj", kv_row)
            + rows(shapes, "self_attn.v_proj", kv_row)
            + columns("self_attn.o_proj", group_of_row),
        ),
        "query_slot": UnitKind(
            "query_slot",
            per_group,
            rows(shapes, "self_attn.q_proj", slot_of_row)
            + columns("self_attn.o_proj", slot_of_row),
        ),
    }


def grouped_widths(size: Dimensions, kept: Mapping[str, Sequence[int]]) -> LayerFields:
    """Return the config fields of a layer with grouped heads that keeps the units ``kept``."""
    groups = kept_count(kept, "kv_group", size.kv_heads)
    slots = kept_count(kept, "query_slot", size.heads // size.kv_heads)
    return {
        "num_attention_heads": groups * slots,
        "num_key_value_heads": groups,
        "intermediate_size": kept_count(kept, "mlp_channel", size.inner),
        **residual_width(kept),
    }


def widest(layers: Sequence[LayerFields]) -> LayerFields:
    """Return the largest value of every field, for the global fields.

    Readers of a config.json that do not know ``per_layer_config`` look at these.
    """
    return {key: max(fields[key] for fields in layers) for key in layers[0]}


class LlamaFamily(Family):
    """Pre-norm decoder: q/k/v/o with rotary heads, gated MLP, RMS norms, no positions table.

    Units: ``kv_group`` (a kv head with its query heads), ``query_slot`` (the same query head out
    of every kv group), ``mlp_channel`` (a gate row, an up row and a down column) and
    ``residual_channel`` (a column of the embedding, the head and every map that reads the residual
    stream, a row of every map that writes it, a weight of every norm of it). transformers
    assigns query head ``h`` to kv head ``h // (heads / kv heads)``.
    """

    name = "llama"
    layer_prefix = "model.layers"
    last_norm = "model.norm"
    embedding = "model.embed_tokens.weight"
    # The linear maps that read what the second norm of a layer gives.
    mlp_inputs: ClassVar[tuple[str, ...]] = ("mlp.gate_proj", "mlp.up_proj")

    def check(self, config: Config) -> None:
        """Refuse configs whose widths already differ by layer or do not divide."""
        refuse_pruned(config)
        size = self.dimensions(config)
        if size.heads % size.kv_heads:
            raise InputError(
                f"num_attention_heads {size.heads} is not a multiple of "
                f"num_key_value_heads {size.kv_heads}"
            )

    def dimensions(self, config: Config) -> Dimensions:
        """Return the sizes of the unpruned model."""
        heads = int(config["num_attention_heads"])
        # Some published configs leave the number of positions to the architecture's default.
        positions = config.get("max_position_embeddings")
        return Dimensions(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=head_dim(config),
            inner=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            positions=int(positions) if positions else None,
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    def layer_shapes(self, config: Config) -> dict[str, Shape]:
        """Return the shape of every parameter of one unpruned layer."""
        size = self.dimensions(config)
        qkv_bias, o_bias, mlp_bias = _biases(config)
        queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
        shapes = linear_shapes(
            {
                "self_attn.q_proj": (queries, size.hidden, qkv_bias),
                "self_attn.k_proj": (keys, size.hidden, qkv_bias),
                "self_attn.v_proj": (keys, size.hidden, qkv_bias),
                "self_attn.o_proj": (size.hidden, queries, o_bias),
                "mlp.gate_proj": (size.inner, size.hidden, mlp_bias),
                "mlp.up_proj": (size.inner, size.hidden, mlp_bias),
                "mlp.down_proj": (size.hidden, size.inner, mlp_bias),
            }
        )
        if config["model_type"] == "qwen3":
            shapes["self_attn.q_norm.weight"] = (size.head_dim,)
            shapes["self_attn.k_norm.weight"] = (size.head_dim,)
        shapes["input_layernorm.weight"] = (size.hidden,)
        shapes["post_attention_layernorm.weight"] = (size.hidden,)
        return shapes

    def outer_shapes(self, config: Config) -> dict[str, Shape]:
        """Return the embedding, final norm and (untied) head shapes."""
        hidden, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
        shapes: dict[str, Shape] = {
            "model.embed_tokens.weight": (vocabulary, hidden),
            "model.norm.weight": (hidden,),
        }
        if not config.get("tie_word_embeddings", False):
            shapes["lm_head.weight"] = (vocabulary, hidden)
        return shapes

    def units(self, config: Config) -> dict[str, UnitKind]:
        """Return kv groups, query slots and MLP channels with the slices they own."""
        size, shapes = self.dimensions(config), self.layer_shapes(config)
        channel = np.arange(size.inner)
        return {
            **grouped_heads(size, shapes),
            "mlp_channel": UnitKind(
                "mlp_channel",
                size.inner,
                rows(shapes, "mlp.gate_proj", channel)
                + rows(shapes, "mlp.up_proj", channel)
                + columns("mlp.down_proj", channel),
            ),
        }

    def model_units(self, config: Config) -> dict[str, UnitKind]:
        """Return the channels of the residual stream with the slices they own."""
        size, shapes = self.dimensions(config), self.layer_shapes(config)
        channel = np.arange(size.hidden)
        attention = tuple(f"self_attn.{name}_proj" for name in "qkv")
        layer = (
            *rows(shapes, "input_layernorm", channel),
            *(part for name in attention for part in columns(name, channel)),
            *rows(shapes, "self_attn.o_proj", channel),
            *rows(shapes, "post_attention_layernorm", channel),
            *(part for name in self.mlp_inputs for part in columns(name, channel)),
            *rows(shapes, "mlp.down_proj", channel),
        )
        head = () if size.tied else columns("lm_head", channel)
        return residual_channels(
            size.hidden,
            self.layer_prefix,
            size.layers,
            columns("model.embed_tokens", channel),
            layer,
            rows(self.outer_shapes(config), "model.norm", channel) + head,
        )

    def activation_inputs(self) -> tuple[str, ...]:
        """Return one module per distinct input: q shares its input with k and v, gate with up."""
        return ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")

    def widths(self, config: Config, kept: Mapping[str, Sequence[int]]) -> LayerFields:
        """Return head counts and MLP width of a layer that keeps the units ``kept``."""
        return grouped_widths(self.dimensions(config), kept)

    def pruned_config(
        self, config: Config, layers: Sequence[LayerFields], kept_layers: Sequence[int]
    ) -> tuple[dict[str, Any], bool]:
        """Write the config of a pruned model.

        Equal layers give a stock config. ``LlamaConfig`` refuses head counts that do not divide
        the (pruned) hidden size; a bias-free LLaMA is the same network as a Mistral without sliding
        window, whose config accepts them, and is then saved as that. Everything else gets
        ``per_layer_config`` and the modelling file.
        """
        new = dict(config)
        new["head_dim"] = head_dim(config)
        new["num_hidden_layers"] = len(layers)
        if config.get("layer_types"):
            new["layer_types"] = [config["layer_types"][i] for i in kept_layers]
        if all(fields == layers[0] for fields in layers):
            new |= layers[0]
            divides = int(new["hidden_size"]) % new["num_attention_heads"] == 0
            if config["model_type"] != "llama" or divides:
                return new, True
            if not any(_biases(config)):
                new |= {
                    "model_type": "mistral",
                    "architectures": ["MistralForCausalLM"],
                    "sliding_window": None,
                }
                for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
                    new.pop(key, None)
                return new, True
        new |= widest(layers)
        title = str(config["model_type"]).capitalize()
        return per_layer(new, layers, title=title, module="modeling_pruned_llama"), False

    def model_class(self, config: Config) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        """Return the transformers classes, or ours for layers of different widths."""
        import transformers

        from prunelib.families import modeling_pruned_llama as pruned

        model_type = str(config["model_type"])
        if model_type.startswith("pruned_"):
            title = model_type.removeprefix("pruned_").capitalize()
            source: Any = pruned
            title = f"Pruned{title}"
        else:
            source, title = transformers, model_type.capitalize()
        return getattr(source, f"{title}Config"), getattr(source, f"{title}ForCausalLM")

    def modeling_file(self) -> str:
        """Return the path of ``modeling_pruned_llama.py``."""
        from prunelib.families import modeling_pruned_llama

        return modeling_pruned_llama.__file__


FAMILY = LlamaFamily
