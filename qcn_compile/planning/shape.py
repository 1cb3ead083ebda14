"""The sizes of a model, read from its config: enough to count bytes and FLOPs without tracing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcn_compile.errors import ModelError

NEXT = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")
"""Model types that are planned for: DeltaNet and gated attention layers in turn, a mixture of experts in each."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Qwen3-Next-family model; names as in its config, counts in elements."""

    hidden: int
    delta_layers: int
    attention_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    experts: int
    top_k: int
    expert_width: int
    shared_width: int
    vocab: int
    longest: int

    @property
    def layers(self) -> int:
        return self.delta_layers + self.attention_layers

    @property
    def channels(self) -> int:
        """Inputs of the convolution: q, k and v side by side."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def mixed(self) -> int:
        """Width of a DeltaNet layer's output."""
        return self.value_heads * self.value_dim

    @property
    def attended(self) -> int:
        """Width of an attention layer's output."""
        return self.heads * self.head_dim


def share(count: int, ranks: int) -> int:
    """What the fullest of `ranks` holds of `count` things."""
    return -(-count // ranks)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The sizes behind a config.json. Raises ModelError for a family that is not planned for, naming the key."""
    config = config.get("text_config") or config
    kind = config.get("model_type")
    if kind not in NEXT:
        raise ModelError(f"model type {kind!r}: planning knows {', '.join(NEXT)}; build it without --plan-only")
    try:
        layers = int(config["num_hidden_layers"])
        kinds = config.get("layer_types")
        every = int(config.get("full_attention_interval", 4))
        full = kinds.count("full_attention") if kinds else layers // every
        dim = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
        return ModelShape(
            hidden=int(config["hidden_size"]), delta_layers=layers - full, attention_layers=full,
            heads=int(config["num_attention_heads"]), kv_heads=int(config["num_key_value_heads"]), head_dim=dim,
            rotary=int(dim * _rotary(config)), key_heads=int(config["linear_num_key_heads"]),
            value_heads=int(config["linear_num_value_heads"]), key_dim=int(config["linear_key_head_dim"]),
            value_dim=int(config["linear_value_head_dim"]), taps=int(config["linear_conv_kernel_dim"]),
            experts=int(config["num_experts"]), top_k=int(config["num_experts_per_tok"]),
            expert_width=int(config["moe_intermediate_size"]),
            shared_width=int(config.get("shared_expert_intermediate_size") or 0), vocab=int(config["vocab_size"]),
            longest=int(config.get("max_position_embeddings", 32768)))
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]}; take the file from the model's repository") from None


def _rotary(config: Mapping[str, Any]) -> float:
    inner = config.get("rope_parameters") or {}
    return float(config.get("partial_rotary_factor", inner.get("partial_rotary_factor", 0.25)))
