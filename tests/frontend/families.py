"""Small random models of every supported family, traced once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qcn_compile.frontend.trace import build, trace_main
from qcn_compile.ir.graph import Graph
from qcn_compile.ir.interpret import default_inputs, run

VOCABULARY = 128
FAMILIES = ["qwen3_next", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3"]
_BASE = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
           "linear_value_head_dim": 16}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", {**_LINEAR, **_EXPERTS, "intermediate_size": 96,
                                       "shared_expert_intermediate_size": 32}),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_5_text": ("Qwen3_5TextConfig", {**_LINEAR, "intermediate_size": 96}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "intermediate_size": 96}),
    "qwen3": ("Qwen3Config", {"intermediate_size": 96}),
}


def tiny(family: str, **changes: Any) -> PreTrainedConfig:
    """A config of `family` with 4 layers and 64 channels."""
    name, fields = _FIELDS[family]
    config: PreTrainedConfig = getattr(transformers, name)(**{**_BASE, **fields, **changes})
    return config


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights that are neither trivial nor large: norms and biases off their defaults, matrices N(0, 0.1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)


def eager(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' own model, eager attention and experts, random weights in fp32."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    randomise(model)
    return model


def save(model: PreTrainedModel, folder: Path, changes: Callable[[dict[str, Tensor]], None] | None = None) -> Path:
    """A checkpoint in one file with published names; `changes` may edit its tensors first."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    if changes is not None:
        tensors = load_file(file)
        changes(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return folder


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def relative(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance."""
    return float((got - want).norm() / want.norm())


@dataclass
class Case:
    """A family: its config, the reference model, the graph traced on the meta device."""

    family: str

    @cached_property
    def config(self) -> PreTrainedConfig:
        return tiny(self.family)

    @cached_property
    def model(self) -> PreTrainedModel:
        return build(self.config)

    @cached_property
    def graph(self) -> Graph:
        return trace_main(self.model)

    @cached_property
    def reference(self) -> PreTrainedModel:
        return eager(self.config)

    def weight(self, name: str) -> Tensor:
        """The reference's parameter of that name."""
        return self.reference.get_parameter(name).data

    def logits(self, tokens: list[list[int]]) -> Tensor:
        """transformers' logits, one sequence at a time, joined."""
        with torch.no_grad():
            return torch.cat([self.reference(input_ids=torch.tensor([t]), use_cache=False).logits[0] for t in tokens])

    def interpreted(self, tokens: list[list[int]]) -> list[Tensor]:
        """Outputs of the graph for a ragged batch."""
        return run(self.graph, default_inputs(self.graph, tokens), self.weight)
