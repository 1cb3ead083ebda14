"""Checkpoints in int4 with groups of 128, as GPTQ and AWQ publish them through compressed-tensors, compiled and run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import eager, save, tiny
from quantised import packed, quantise
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import qcn_compile as qcn
from qcn_compile.frontend.checkpoint import locate

SCHEME = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def checkpoint(folder: Path, symmetric: bool) -> torch.nn.Module:
    """A random one of the bundled model's size in groups of 128; returns transformers' model of the values it means."""
    config = tiny("qwen3_next", vocab_size=4096, hidden_size=256, num_experts=16, num_experts_per_tok=4, head_dim=64,
                  moe_intermediate_size=128, shared_expert_intermediate_size=128, linear_key_head_dim=32,
                  linear_value_head_dim=32, linear_num_key_heads=4, linear_num_value_heads=8, eos_token_id=4081)
    values = quantise(save(eager(config), folder), packed(128, symmetric), SCHEME)
    tokenizer = locate(None, "cpu").path
    assert tokenizer is not None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    plain = folder / "values"
    plain.mkdir()
    save_file({name: value.float().contiguous() for name, value in values.items()}, plain / "model.safetensors",
              {"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    del described["quantization_config"]
    (plain / "config.json").write_text(json.dumps(described))
    return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize(("symmetric", "format_"), [(True, "int4"), (False, "int8")])
def test_a_build_computes_with_the_codes_of_the_checkpoint(symmetric: bool, format_: str, tmp_path: Path) -> None:
    """Symmetric codes fit our int4, those with zero points our int8: nothing is rounded a second time."""
    model = checkpoint(tmp_path / "model", symmetric)
    qcn.compile(tmp_path / "model", "cpu", tmp_path / "build", quant=f"experts={format_},dense={format_},head=none",
                activations="fp32", dtype="fp32")
    ids = np.random.default_rng(0).integers(0, 4096, 40).tolist()
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].numpy()
    with qcn.load(tmp_path / "build", threads=2) as compiled:
        got = compiled.logits(ids)
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)
