"""Other members of the family, tiny and random: a saved checkpoint, compiled, against transformers' logits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from qcn_compile import load
from qcn_compile.compile import compile as build

BASE = {"vocab_size": 4096, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 512, "bos_token_id": None,
        "eos_token_id": 4081, "pad_token_id": None}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
         "linear_value_head_dim": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "qwen3_next": ("Qwen3NextConfig", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3_next, wider shared expert": ("Qwen3NextConfig", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3_next, yarn": ("Qwen3NextConfig", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 24,
                         "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6,
                                             "original_max_position_embeddings": 128, "partial_rotary_factor": 0.25}}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS),
    "qwen3": ("Qwen3Config", {}),
    "qwen3, tied": ("Qwen3Config", {"tie_word_embeddings": True}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3_5": ("Qwen3_5TextConfig", DELTA),
}


def save_random(family: str, folder: Path, tokenizer: Path) -> torch.nn.Module:
    """A random checkpoint of the family, as transformers saves it; returns the fp32 model."""
    name, extra = FAMILIES[family]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**BASE, **extra),
                                             attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1) if parameter.ndim == 1 else parameter.normal_(0, 0.12)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder / file)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_equals_transformers(family: str, tmp_path: Path, bundled: Path) -> None:
    model = save_random(family, tmp_path / "checkpoint", bundled)
    build(tmp_path / "checkpoint", "cpu", tmp_path / "build", dtype="fp32", quant="none")
    ids = np.random.default_rng(0).integers(0, 4096, 90).tolist()
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].numpy()
    with load(tmp_path / "build", threads=2) as compiled:
        whole = compiled.logits(ids)
        parts = [compiled.step([("s", ids[a:b])])[0] for a, b in ((0, 37), (37, 38), (38, 90))]
    assert np.linalg.norm(whole - want) <= 1e-4 * np.linalg.norm(want)
    assert np.linalg.norm(np.concatenate(parts) - want) <= 1e-4 * np.linalg.norm(want)


def test_quantised_build_equals_the_interpreter(loaded: Callable[..., object], bundled: Path) -> None:
    """int4 weights with fp32 activations: kernels compute what the final graph says, encode op included."""
    from qcn_compile.compile import Options, optimised
    from qcn_compile.frontend import trace_model
    from qcn_compile.frontend.checkpoint import locate
    from qcn_compile.ir.interpret import default_inputs, run

    graph = optimised(None, "cpu", Options(dtype="bf16", quant="int4", activations="fp32"))
    weights = trace_model(locate(None, "cpu")).weights
    assert weights is not None
    ids = np.random.default_rng(1).integers(0, 4096, 40).tolist()
    want = run(graph, default_inputs(graph, [ids]), weights.get)[0].numpy()
    got = loaded("int4-f32").logits(ids)  # type: ignore[attr-defined]
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)
