"""LLaMA-like decoders with grouped-query attention: LLaMA 1-3, Vicuna, Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prunelib.errors import InputError
from prunelib.families.base import Config, Family, LayerWidths, Shape, UnitKind, UnitSlice

if TYPE_CHECKING:
    from torch import nn
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


class LlamaFamily(Family):
    """Pre-norm decoder: q/k/v/o with rotary heads, gated MLP, RMS norms, no positions table.

    Units: ``kv_group`` (a kv head with its query heads), ``query_slot`` (the same query head out
    of every kv group), ``mlp_channel`` (a gate row, an up row and a down column). transformers
    assigns query head ``h`` to kv head ``h // (heads / kv heads)``.
    """

    name = "llama"
    layer_prefix = "model.layers"

    def check(self, config: Config) -> None:
        """Refuse configs whose widths already differ by layer or do not divide."""
        if config.get("per_layer_config"):
            raise InputError(
                "the model is already pruned layer by layer (config.json has per_layer_config); "
                "prune the original model instead"
            )
        heads = int(config["num_attention_heads"])
        groups = int(config.get("num_key_value_heads") or heads)
        if heads % groups:
            raise InputError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
            )

    def _dimensions(self, config: Config) -> tuple[int, int, int, int, int]:
        heads = int(config["num_attention_heads"])
        return (
            int(config["hidden_size"]),
            heads,
            int(config.get("num_key_value_heads") or heads),
            head_dim(config),
            int(config["intermediate_size"]),
        )

    def layer_shapes(self, config: Config) -> dict[str, Shape]:
        """Return the shape of every parameter of one unpruned layer."""
        hidden, heads, groups, width, inner = self._dimensions(config)
        qkv_bias, o_bias, mlp_bias = _biases(config)
        linears: dict[str, tuple[int, int, bool]] = {
            "self_attn.q_proj": (heads * width, hidden, qkv_bias),
            "self_attn.k_proj": (groups * width, hidden, qkv_bias),
            "self_attn.v_proj": (groups * width, hidden, qkv_bias),
            "self_attn.o_proj": (hidden, heads * width, o_bias),
            "mlp.gate_proj": (inner, hidden, mlp_bias),
            "mlp.up_proj": (inner, hidden, mlp_bias),
            "mlp.down_proj": (hidden, inner, mlp_bias),
        }
        shapes: dict[str, Shape] = {}
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)
        if config["model_type"] == "qwen3":
            shapes["self_attn.q_norm.weight"] = (width,)
            shapes["self_attn.k_norm.weight"] = (width,)
        shapes["input_layernorm.weight"] = (hidden,)
        shapes["post_attention_layernorm.weight"] = (hidden,)
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
        _, heads, groups, width, inner = self._dimensions(config)
        per_group = heads // groups
        head_of_row = np.arange(heads * width) // width
        kv_row = np.arange(groups * width) // width
        channel = np.arange(inner)
        shapes = self.layer_shapes(config)

        def rows(module: str, owner: np.ndarray) -> list[UnitSlice]:
            names = [f"{module}.weight", f"{module}.bias"]
            return [UnitSlice(name, 0, owner) for name in names if name in shapes]

        def columns(module: str, owner: np.ndarray) -> list[UnitSlice]:
            return [UnitSlice(f"{module}.weight", 1, owner)]

        group_of_row, slot_of_row = head_of_row // per_group, head_of_row % per_group
        return {
            "kv_group": UnitKind(
                "kv_group",
                groups,
                tuple(
                    rows("self_attn.q_proj", group_of_row)
                    + rows("self_attn.k_proj", kv_row)
                    + rows("self_attn.v_proj", kv_row)
                    + columns("self_attn.o_proj", group_of_row)
                ),
            ),
            "query_slot": UnitKind(
                "query_slot",
                per_group,
                tuple(
                    rows("self_attn.q_proj", slot_of_row) + columns("self_attn.o_proj", slot_of_row)
                ),
            ),
            "mlp_channel": UnitKind(
                "mlp_channel",
                inner,
                tuple(
                    rows("mlp.gate_proj", channel)
                    + rows("mlp.up_proj", channel)
                    + columns("mlp.down_proj", channel)
                ),
            ),
        }

    def activation_inputs(self) -> tuple[str, ...]:
        """Return one module per distinct input: q shares its input with k and v, gate with up."""
        return ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")

    def widths(self, config: Config, kept: Mapping[str, Sequence[int]]) -> LayerWidths:
        """Return head counts and MLP width of a layer that keeps the units ``kept``."""
        _, heads, groups, _, inner = self._dimensions(config)
        kept_groups = len(kept["kv_group"]) if "kv_group" in kept else groups
        slots = len(kept["query_slot"]) if "query_slot" in kept else heads // groups
        channels = len(kept["mlp_channel"]) if "mlp_channel" in kept else inner
        return LayerWidths(kept_groups * slots, kept_groups, channels)

    def pruned_config(
        self, config: Config, layers: Sequence[LayerWidths], kept_layers: Sequence[int]
    ) -> tuple[dict[str, Any], bool]:
        """Write the config of a pruned model.

        Equal layers give a stock config. ``LlamaConfig`` refuses head counts that do not divide
        the hidden size; a bias-free LLaMA is the same network as a Mistral without sliding
        window, whose config accepts them, and is then saved as that. Everything else gets
        ``per_layer_config`` and the modelling file.
        """
        new = dict(config)
        new["head_dim"] = head_dim(config)
        new["num_hidden_layers"] = len(layers)
        if config.get("layer_types"):
            new["layer_types"] = [config["layer_types"][i] for i in kept_layers]
        first = layers[0]
        new["num_attention_heads"] = first.num_attention_heads
        new["num_key_value_heads"] = first.num_key_value_heads
        new["intermediate_size"] = first.intermediate_size
        if all(widths == first for widths in layers):
            divides = int(config["hidden_size"]) % first.num_attention_heads == 0
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
        base = str(config["model_type"])
        title = base.capitalize()
        module = "modeling_pruned_llama"
        # The widest layer stands in the global fields, which readers of config.json look at first.
        for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            new[key] = max(getattr(widths, key) for widths in layers)
        new |= {
            "model_type": f"pruned_{base}",
            "architectures": [f"Pruned{title}ForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{module}.Pruned{title}Config",
                "AutoModelForCausalLM": f"{module}.Pruned{title}ForCausalLM",
            },
            "per_layer_config": {
                str(i): {
                    "num_attention_heads": widths.num_attention_heads,
                    "num_key_value_heads": widths.num_key_value_heads,
                    "intermediate_size": widths.intermediate_size,
                }
                for i, widths in enumerate(layers)
            },
        }
        return new, False

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

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return ``model.model.layers``."""
        layers: nn.ModuleList = model.model.layers
        return layers

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        """Return ``model.model.norm``."""
        norm: nn.Module = model.model.norm
        return norm


FAMILY = LlamaFamily
