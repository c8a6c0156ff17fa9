"""OPT: decoders with multi-head attention, biases everywhere and learned positions."""

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
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

MODEL_TYPES = ("opt", "pruned_opt")

# The table of positions begins with two rows that no position uses.
POSITION_OFFSET = 2


def _embedding_width(config: Config) -> int:
    return int(config.get("word_embed_proj_dim") or config["hidden_size"])


def _affine(config: Config, module: str, width: int) -> dict[str, Shape]:
    """Return the parameters of a layer norm, which some configs make free of parameters."""
    if not config.get("layer_norm_elementwise_affine", True):
        return {}
    return {f"{module}.weight": (width,), f"{module}.bias": (width,)}


class OptFamily(Family):
    """OPT of all sizes, the post-norm opt-350m with its narrower embedding included.

    Units: ``kv_group`` (a head: q, k and v rows with their biases, o columns), ``mlp_channel``
    (an fc1 row with its bias and an fc2 column; there is no gate) and ``residual_channel``, to
    which the biases of the output projections and a column of the positions belong. With a
    narrower embedding it ends at the projections around the layers. Queries are scaled by the
    head's width, which pruning does not change.
    """

    name = "opt"
    layer_prefix = "model.decoder.layers"
    last_norm = "model.decoder.final_layer_norm"
    embedding = "model.decoder.embed_tokens.weight"
    other_embeddings = ("model.decoder.embed_positions.weight",)
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("self_attn", "self_attn_layer_norm"),
        "mlp": ("fc1", "fc2", "final_layer_norm"),
    }

    def check(self, config: Config) -> None:
        """Refuse configs whose widths already differ by layer or do not divide."""
        refuse_pruned(config)
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        # A pruned model's config states the width of a head beside the number that is left.
        if "head_dim" not in config and hidden % heads:
            raise InputError(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            )

    def dimensions(self, config: Config) -> Dimensions:
        """Return the sizes of the unpruned model."""
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return Dimensions(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            inner=int(config["ffn_dim"]),
            vocabulary=int(config["vocab_size"]),
            positions=int(config["max_position_embeddings"]),
            # Published configs do not say it: transformers' default ties.
            tied=bool(config.get("tie_word_embeddings", True)),
        )

    def layer_shapes(self, config: Config) -> dict[str, Shape]:
        """Return the shape of every parameter of one unpruned layer."""
        size, bias = self.dimensions(config), bool(config.get("enable_bias", True))
        square = (size.hidden, size.hidden, bias)
        shapes = linear_shapes(
            {
                "self_attn.k_proj": square,
                "self_attn.v_proj": square,
                "self_attn.q_proj": square,
                "self_attn.out_proj": square,
                "fc1": (size.inner, size.hidden, bias),
                "fc2": (size.hidden, size.inner, bias),
            }
        )
        shapes |= _affine(config, "self_attn_layer_norm", size.hidden)
        return shapes | _affine(config, "final_layer_norm", size.hidden)

    def outer_shapes(self, config: Config) -> dict[str, Shape]:
        """Return embeddings, projections around the layers, final norm and (untied) head."""
        size, width = self.dimensions(config), _embedding_width(config)
        shapes: dict[str, Shape] = {
            "model.decoder.embed_tokens.weight": (size.vocabulary, width),
            "model.decoder.embed_positions.weight": (
                (size.positions or 0) + POSITION_OFFSET,
                size.hidden,
            ),
        }
        if width != size.hidden:
            shapes["model.decoder.project_in.weight"] = (size.hidden, width)
            shapes["model.decoder.project_out.weight"] = (width, size.hidden)
        if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm"):
            shapes |= _affine(config, "model.decoder.final_layer_norm", size.hidden)
        if not size.tied:
            shapes["lm_head.weight"] = (size.vocabulary, width)
        return shapes

    def units(self, config: Config) -> dict[str, UnitKind]:
        """Return heads and MLP channels with the slices they own."""
        size, shapes = self.dimensions(config), self.layer_shapes(config)
        head, channel = np.arange(size.hidden) // size.head_dim, np.arange(size.inner)
        return {
            "kv_group": UnitKind(
                "kv_group",
                size.heads,
                rows(shapes, "self_attn.q_proj", head)
                + rows(shapes, "self_attn.k_proj", head)
                + rows(shapes, "self_attn.v_proj", head)
                + columns("self_attn.out_proj", head),
            ),
            "mlp_channel": UnitKind(
                "mlp_channel", size.inner, rows(shapes, "fc1", channel) + columns("fc2", channel)
            ),
        }

    def model_units(self, config: Config) -> dict[str, UnitKind]:
        """Return the channels of the residual stream with the slices they own."""
        size, shapes = self.dimensions(config), self.layer_shapes(config)
        outer, channel = self.outer_shapes(config), np.arange(size.hidden)
        attention = (
            *(part for name in "qkv" for part in columns(f"self_attn.{name}_proj", channel)),
            *rows(shapes, "self_attn.out_proj", channel),
        )
        mlp = columns("fc1", channel) + rows(shapes, "fc2", channel)
        norms = [
            rows(shapes, name, channel) for name in ("self_attn_layer_norm", "final_layer_norm")
        ]
        if config.get("do_layer_norm_before", True):
            layer = norms[0] + attention + norms[1] + mlp
        else:
            layer = attention + norms[0] + mlp + norms[1]
        body = "model.decoder"
        narrow = f"{body}.project_in.weight" in outer
        first = (
            rows(outer, f"{body}.project_in", channel)
            if narrow
            else columns(f"{body}.embed_tokens", channel)
        )
        last = rows(outer, f"{body}.final_layer_norm", channel)
        if narrow:
            last += columns(f"{body}.project_out", channel)
        elif not size.tied:
            last += columns("lm_head", channel)
        return residual_channels(
            size.hidden,
            self.layer_prefix,
            size.layers,
            first + columns(f"{body}.embed_positions", channel),
            layer,
            last,
        )

    def activation_inputs(self) -> tuple[str, ...]:
        """Return one module per distinct input: q shares its input with k and v."""
        return ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")

    def widths(self, config: Config, kept: Mapping[str, Sequence[int]]) -> LayerFields:
        """Return head count and MLP width of a layer that keeps the units ``kept``."""
        size = self.dimensions(config)
        return {
            "num_attention_heads": kept_count(kept, "kv_group", size.heads),
            "ffn_dim": kept_count(kept, "mlp_channel", size.inner),
            **residual_width(kept),
        }

    def pruned_config(
        self, config: Config, layers: Sequence[LayerFields], kept_layers: Sequence[int]
    ) -> tuple[dict[str, Any], bool]:
        """Write the config of a pruned model.

        Equal layers with all heads give a stock config. Stock OPT takes the width of a head from
        ``hidden_size / num_attention_heads``, so that fewer heads or residual channels need the
        modelling file.
        """
        size, width = self.dimensions(config), _embedding_width(config)
        new = dict(config) | {"num_hidden_layers": len(layers)}
        equal = all(fields == layers[0] for fields in layers)
        narrower = "hidden_size" in layers[0]
        if equal and layers[0]["num_attention_heads"] == size.heads and not narrower:
            return new | layers[0], True
        new["head_dim"] = size.head_dim
        for key in layers[0]:
            new[key] = max(fields[key] for fields in layers)
        if narrower:
            # Stock OPT projects where the widths differ; pruned ones may become equal by chance.
            new["embedding_projection"] = width != size.hidden
            if width == size.hidden:
                new["word_embed_proj_dim"] = new["hidden_size"]
        return per_layer(new, layers, title="OPT", module="modeling_pruned_opt"), False

    def model_class(self, config: Config) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        """Return the transformers classes, or ours for fewer heads or different layers."""
        from transformers import OPTConfig, OPTForCausalLM

        from prunelib.families import modeling_pruned_opt as pruned

        if config["model_type"] == "pruned_opt":
            return pruned.PrunedOPTConfig, pruned.PrunedOPTForCausalLM
        return OPTConfig, OPTForCausalLM

    def modeling_file(self) -> str:
        """Return the path of ``modeling_pruned_opt.py``."""
        from prunelib.families import modeling_pruned_opt

        return modeling_pruned_opt.__file__

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        """Return the final norm and the projection to the embedding's width, as far as there."""
        from torch import nn

        decoder = model.model.decoder
        after = (decoder.final_layer_norm, decoder.project_out)
        return nn.Sequential(*(module for module in after if module is not None))

    def zero_block_is_neutral(self, config: Config) -> bool:
        """A post-norm block (opt-350m) normalises the residual stream itself."""
        return bool(config.get("do_layer_norm_before", True))


FAMILY = OptFamily
