"""The one architecture this package trains: Qwen3-Next with every feature of the 80B model, at 12 M parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_TOKENS = (
    "<tool_call>", "</tool_call>",
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
    "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip
VOCAB_SIZE = 4096
ADDED_START = VOCAB_SIZE - len(SPECIAL_TOKENS) - len(PLAIN_TOKENS)
END_OF_TEXT = ADDED_START  # also the padding token and the nominal BOS, as in Qwen
IM_END = ADDED_START + 2


@dataclass(frozen=True)
class TinyConfig:
    """Fields of the checkpoint's config.json that decide shapes; names as in `Qwen3NextConfig`."""

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 8
    full_attention_interval: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    partial_rotary_factor: float = 0.25
    rope_theta: float = 5_000_000.0
    max_position_embeddings: int = 32768
    linear_num_key_heads: int = 4
    linear_num_value_heads: int = 8
    linear_key_head_dim: int = 32
    linear_value_head_dim: int = 32
    linear_conv_kernel_dim: int = 4
    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 96
    shared_expert_intermediate_size: int = 96
    rms_norm_eps: float = 1e-6

    def is_full_attention(self, layer: int) -> bool:
        return (layer + 1) % self.full_attention_interval == 0

    def to_checkpoint(self) -> dict:
        """The whole config.json, in the wording of the published Qwen3-Next checkpoints."""
        return {
            "architectures": ["Qwen3NextForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": END_OF_TEXT,
            "decoder_sparse_step": 1,
            "eos_token_id": IM_END,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "mlp_only_layers": [],
            "model_type": "qwen3_next",
            "norm_topk_prob": True,
            "output_router_logits": False,
            "rope_scaling": None,
            "router_aux_loss_coef": 0.001,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            **asdict(self),
        }
