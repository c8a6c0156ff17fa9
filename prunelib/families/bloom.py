"""BLOOM: decoders with one fused projection per head, ALiBi and a norm after the embedding."""

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

MODEL_TYPES = ("bloom", "pruned_bloom")

# Published configs use either name; transformers writes the first.
_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "hidden_size": "n_embed",
}


def _field(config: Config, name: str) -> int:
    return int(config[name] if name in config else config[_NAMES[name]])


def _norm(module: str, width: int) -> dict[str, Shape]:
    return {f"{module}.weight": (width,), f"{module}.bias": (width,)}


class BloomFamily(Family):
    """BLOOM and BLOOMZ of all sizes.

    Units: ``kv_group`` (a head: its rows of ``query_key_value``, where every head holds its
    queries, keys and values one after the other, with their biases, and its columns of ``dense``),
    ``mlp_channel`` and ``residual_channel``, the norm of the embedding included. A head keeps the
    ALiBi slope of its place among the original heads.
    """

    name = "bloom"
    layer_prefix = "transformer.h"
    last_norm = "transformer.ln_f"
    embedding = "transformer.word_embeddings.weight"
    plain_attention = True
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("self_attention", "input_layernorm"),
        "mlp": ("mlp", "post_attention_layernorm"),
    }

    def check(self, config: Config) -> None:
        """Refuse what the modelling file does not compute."""
        refuse_pruned(config)
        size = self.dimensions(config)
        # A pruned model's config states the width of a head beside what is left of both.
        if "head_dim" not in config and size.hidden % size.heads:
            raise InputError(f"hidden_size {size.hidden} is not a multiple of n_head {size.heads}")
        if config.get("slow_but_exact") and int(config.get("pretraining_tp") or 1) > 1:
            raise InputError(
                "slow_but_exact in config.json computes in slices of the unpruned width; "
                "allowed: false, which changes rounding only"
            )

    def dimensions(self, config: Config) -> Dimensions:
        """Return the sizes of the unpruned model; the MLP is four times as wide as the rest."""
        hidden, heads = _field(config, "hidden_size"), _field(config, "n_head")
        return Dimensions(
            layers=_field(config, "n_layer"),
            hidden=hidden,
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            inner=4 * hidden,
            vocabulary=int(config["vocab_size"]),
            positions=None,
            # Published configs do not say it: transformers' default ties.
            tied=bool(config.get("tie_word_embeddings", True)),
        )

    def layer_shapes(self, config: Config) -> dict[str, Shape]:
        """Return the shape of every parameter of one unpruned layer."""
        size = self.dimensions(config)
        shapes = linear_shapes(
            {
                "self_attention.query_key_value": (3 * size.hidden, size.hidden, True),
                "self_attention.dense": (size.hidden, size.hidden, True),
                "mlp.dense_h_to_4h": (size.inner, size.hidden, True),
                "mlp.dense_4h_to_h": (size.hidden, size.inner, True),
            }
        )
        shapes |= _norm("input_layernorm", size.hidden)
        return shapes | _norm("post_attention_layernorm", size.hidden)

    def outer_shapes(self, config: Config) -> dict[str, Shape]:
        """Return the embedding with its norm, the final norm and the (untied) head."""
        size = self.dimensions(config)
        shapes: dict[str, Shape] = {
            "transformer.word_embeddings.weight": (size.vocabulary, size.hidden),
            **_norm("transformer.word_embeddings_layernorm", size.hidden),
            **_norm("transformer.ln_f", size.hidden),
        }
        if not size.tied:
            shapes["lm_head.weight"] = (size.vocabulary, size.hidden)
        return shapes

    def units(self, config: Config) -> dict[str, UnitKind]:
        """Return heads and MLP channels with the slices they own."""
        size, shapes = self.dimensions(config), self.layer_shapes(config)
        channel = np.arange(size.inner)
        fused = np.arange(3 * size.hidden) // (3 * size.head_dim)
        head = np.arange(size.hidden) // size.head_dim
        return {
            "kv_group": UnitKind(
                "kv_group",
                size.heads,
                rows(shapes, "self_attention.query_key_value", fused)
                + columns("self_attention.dense", head),
            ),
            "mlp_channel": UnitKind(
                "mlp_channel",
                size.inner,
                rows(shapes, "mlp.dense_h_to_4h", channel) + columns("mlp.dense_4h_to_h", channel),
            ),
        }

    def model_units(self, config: Config) -> dict[str, UnitKind]:
        """Return the channels of the residual stream with the slices they own."""
        size, shapes = self.dimensions(config), self.layer_shapes(config)
        outer, channel = self.outer_shapes(config), np.arange(size.hidden)
        layer = (
            *rows(shapes, "input_layernorm", channel),
            *columns("self_attention.query_key_value", channel),
            *rows(shapes, "self_attention.dense", channel),
            *rows(shapes, "post_attention_layernorm", channel),
            *columns("mlp.dense_h_to_4h", channel),
            *rows(shapes, "mlp.dense_4h_to_h", channel),
        )
        embedding = columns("transformer.word_embeddings", channel)
        head = () if size.tied else columns("lm_head", channel)
        return residual_channels(
            size.hidden,
            self.layer_prefix,
            size.layers,
            embedding + rows(outer, "transformer.word_embeddings_layernorm", channel),
            layer,
            rows(outer, "transformer.ln_f", channel) + head,
        )

    def activation_inputs(self) -> tuple[str, ...]:
        """Return all linear maps of a layer: no two share an input."""
        return (
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        )

    def widths(self, config: Config, kept: Mapping[str, Sequence[int]]) -> LayerFields:
        """Return the heads that a layer keeps, by original index, and its MLP width."""
        size = self.dimensions(config)
        heads = list(kept.get("kv_group", range(size.heads)))
        return {
            "n_head": len(heads),
            "alibi_heads": heads,
            "intermediate_size": kept_count(kept, "mlp_channel", size.inner),
            **residual_width(kept),
        }

    def pruned_config(
        self, config: Config, layers: Sequence[LayerFields], kept_layers: Sequence[int]
    ) -> tuple[dict[str, Any], bool]:
        """Write the config of a pruned model; stock BLOOM can lose whole blocks only.

        The global ``n_head`` stays that of the original, which the slopes depend on.
        """
        size = self.dimensions(config)
        new = {key: value for key, value in config.items() if key not in _NAMES.values()}
        new |= {"n_layer": len(layers), "n_head": size.heads, "hidden_size": size.hidden}
        whole = self.widths(config, {})
        if all(fields == whole for fields in layers):
            return new, True
        # Whoever reads the file without its classes, as tokenizers do, looks for this name.
        new |= {"head_dim": size.head_dim, "num_hidden_layers": len(layers)}
        new["hidden_size"] = layers[0].get("hidden_size", size.hidden)
        return per_layer(new, layers, title="Bloom", module="modeling_pruned_bloom"), False

    def model_class(self, config: Config) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        """Return the transformers classes, or ours for fewer heads or channels."""
        from transformers import BloomConfig, BloomForCausalLM

        from prunelib.families import modeling_pruned_bloom as pruned

        if config["model_type"] == "pruned_bloom":
            return pruned.PrunedBloomConfig, pruned.PrunedBloomForCausalLM
        return BloomConfig, BloomForCausalLM

    def modeling_file(self) -> str:
        """Return the path of ``modeling_pruned_bloom.py``."""
        from prunelib.families import modeling_pruned_bloom

        return modeling_pruned_bloom.__file__

    def zero_block_is_neutral(self, config: Config) -> bool:
        """With this switch the residual stream itself passes through the norms of a block."""
        return not config.get("apply_residual_connection_post_layernorm", False)


FAMILY = BloomFamily
