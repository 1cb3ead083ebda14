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
from transformers.modeling_layers import MtpModel

from qcn_compile.frontend.trace import build, trace_main
from qcn_compile.ir.graph import Graph
from qcn_compile.ir.interpret import default_inputs, run

VOCABULARY = 128
_RENAMED = {"eh_proj.weight": "fc.weight", "enorm.weight": "pre_fc_norm_embedding.weight",
            "hnorm.weight": "pre_fc_norm_hidden.weight", "post_norm.weight": "norm.weight"}
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


def published(mtp: MtpModel) -> dict[str, Tensor]:
    """The head's tensors under the names of the hub: one per expert."""
    tensors: dict[str, Tensor] = {}
    for path, value in mtp.named_parameters():
        if not path.startswith("layers."):
            continue
        inner = path.removeprefix("layers.0.")
        name = "mtp." + (_RENAMED.get(inner) or f"layers.0.{inner.removeprefix('mtp_block.')}")
        if name.endswith("experts.gate_up_proj"):
            for e, one in enumerate(value.data):
                head = f"{name.removesuffix('gate_up_proj')}{e}."
                tensors[head + "gate_proj.weight"], tensors[head + "up_proj.weight"] = (x.clone() for x in one.chunk(2))
        elif name.endswith("experts.down_proj"):
            for e, one in enumerate(value.data):
                tensors[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = one.clone()
        else:
            tensors[name] = value.data.clone()
    return tensors


def save_with_draft_head(config: PreTrainedConfig, folder: Path) -> tuple[PreTrainedModel, MtpModel, Path]:
    """A random model and an MTP head for it, and the checkpoint that holds both."""
    config.num_mtp_layers, config.mtp_layer_types = 1, ["full_attention"]
    main = eager(config)
    mtp = MtpModel(main, 1).eval()
    randomise(mtp.layers, seed=1)
    del main.config.num_mtp_layers, main.config.mtp_layer_types
    return main, mtp, save(main, folder, lambda tensors: tensors.update(published(mtp)))


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
