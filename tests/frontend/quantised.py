"""Checkpoints in the layouts that quantisers publish, written from their descriptions, and the values they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Stored = dict[str, Tensor]
Writer = Callable[[str, Tensor, torch.Generator], tuple[Stored, Tensor]]
KEPT = ("embed_tokens", "lm_head", "norm", "conv1d", "in_proj_ba", "mlp.gate.", "shared_expert_gate", "A_log",
        "dt_bias", "mtp.fc")


def words(codes: Tensor, places: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Numbers 0..15 [N, K] in i32 words [N, K/8]; the i-th of eight in nibble places[i]."""
    word = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for i, place in enumerate(places):
        word |= codes[:, i::8].long() << (4 * place)
    return (word - (word >= 1 << 31).long() * (1 << 32)).int()


def random_codes(weight: Tensor, size: int, generator: torch.Generator, symmetric: bool,
                 half: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers 0..15 [N, K], zeros and scales [N, K/size]."""
    rows, depth = weight.shape
    size = min(size, depth)
    codes = torch.randint(0, 16, (rows, depth), generator=generator)
    zeros = torch.randint(1, 16, (rows, depth // size), generator=generator)
    scales = (torch.rand(rows, depth // size, generator=generator) * 0.02 + 0.01).to(half)
    return codes, torch.full_like(zeros, 8) if symmetric else zeros, scales


def values(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    return (codes - zeros[:, groups]).float() * scales.float()[:, groups]


def fp8(name: str, weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
    """X [.., N, K] e4m3, X_scale_inv: one scale a block of 128 x 128."""
    scales = (torch.rand(*weight.shape[:-2], *(-(-n // 128) for n in weight.shape[-2:]), generator=generator) * 0.01
              + 0.001).bfloat16()
    codes = (torch.randn(weight.shape, generator=generator) * 50).to(torch.float8_e4m3fn)
    wide = torch.zeros(weight.shape)
    for n in range(weight.shape[-2]):
        for k in range(0, weight.shape[-1], 128):
            part = codes[..., n, k:k + 128].float()
            wide[..., n, k:k + 128] = part * scales[..., n // 128, k // 128].float()[..., None]
    return {name: codes, f"{name}_scale_inv": scales}, wide


def packed(size: int, symmetric: bool = True, shuffled: bool = False) -> Writer:
    """compressed-tensors, pack-quantized; size 0: one group a row."""
    def write(name: str, weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
        step = min(size or weight.shape[1], weight.shape[1])
        codes, zeros, scales = random_codes(weight, step, generator, symmetric, torch.bfloat16)
        groups = torch.arange(weight.shape[1]) // step
        stored = {f"{name}_packed": words(codes), f"{name}_scale": scales, f"{name}_shape": torch.tensor(weight.shape)}
        if shuffled:
            groups = groups[torch.randperm(len(groups), generator=generator)]
            stored[f"{name}_g_idx"] = groups.int()
        if not symmetric:
            stored[f"{name}_zero_point"] = words(zeros.T).T.contiguous()
        return stored, values(codes, zeros, scales, groups)
    return write


def scaled(kind: torch.dtype, per_row: bool) -> Writer:
    """compressed-tensors, float-quantized or int-quantized."""
    def write(name: str, weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
        codes = (torch.randn(weight.shape, generator=generator) * 40).clamp(-127, 127).to(kind)
        scales = torch.rand(weight.shape[0] if per_row else 1, 1, generator=generator) * 0.01
        stored = {name: codes, f"{name}_scale": scales if per_row else scales.reshape(1)}
        return {**stored, name.removesuffix("weight") + "input_scale": torch.ones(1)}, codes.float() * scales
    return write


def gptq(size: int, symmetric: bool = True, shuffled: bool = False, second: bool = False) -> Writer:
    """AutoGPTQ: words along K; zeros are stored less one in the first version of the format."""
    def write(name: str, weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
        codes, zeros, scales = random_codes(weight, size, generator, symmetric, torch.float16)
        groups = torch.arange(weight.shape[1]) // min(size, weight.shape[1])
        if shuffled:
            groups = groups[torch.randperm(len(groups), generator=generator)]
        stem, kept = name.removesuffix("weight"), zeros - (0 if second else 1)
        return {f"{stem}qweight": words(codes).T.contiguous(), f"{stem}qzeros": words(kept.T), f"{stem}g_idx":
                groups.int(), f"{stem}scales": scales.T.contiguous()}, values(codes, zeros, scales, groups)
    return write


def awq(size: int) -> Writer:
    """AutoAWQ, gemm: words along N, whose nibbles hold columns 0, 2, 4, 6, 1, 3, 5, 7."""
    def write(name: str, weight: Tensor, generator: torch.Generator) -> tuple[Stored, Tensor]:
        codes, zeros, scales = random_codes(weight, size, generator, False, torch.float16)
        holds = (0, 2, 4, 6, 1, 3, 5, 7)
        places = tuple(holds.index(i) for i in range(8))
        stem, groups = name.removesuffix("weight"), torch.arange(weight.shape[1]) // min(size, weight.shape[1])
        return {f"{stem}qweight": words(codes.T, places), f"{stem}qzeros": words(zeros.T, places),
                f"{stem}scales": scales.T.contiguous()}, values(codes, zeros, scales, groups)
    return write


LAYOUTS: dict[str, tuple[Writer, dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}),
    "ct-int4-32": (packed(32), {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "ct-int4-64": (packed(64), {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "ct-int4-128": (packed(128), {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "ct-int4-128-zeros": (packed(128, symmetric=False),
                          {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "ct-int4-row": (packed(0), {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "ct-int4-zeros": (packed(32, symmetric=False), {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "ct-int4-order": (packed(32, shuffled=True), {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "ct-fp8": (scaled(torch.float8_e4m3fn, True), {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "ct-fp8-one": (scaled(torch.float8_e4m3fn, False), {"quant_method": "compressed-tensors"}),
    "ct-int8": (scaled(torch.int8, True), {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "gptq": (gptq(32), {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "gptq-128": (gptq(128), {"quant_method": "gptq", "bits": 4, "group_size": 128}),
    "gptq-v2-zeros": (gptq(32, symmetric=False, second=True),
                      {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}),
    "gptq-order": (gptq(32, shuffled=True), {"quant_method": "gptq", "bits": 4, "desc_act": True}),
    "awq": (awq(32), {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "awq-128": (awq(128), {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 128}),
}


def quantise(folder: Path, writer: Writer, scheme: dict[str, Any]) -> dict[str, Tensor]:
    """Rewrite a bf16 or f32 checkpoint in one file; returns the values that each of its weights now stands for."""
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    stored: Stored = {}
    wide: dict[str, Tensor] = {}
    left_out = []
    for name, tensor in load_file(file).items():
        if tensor.ndim < 2 or any(part in name for part in KEPT):
            stored[name] = wide[name] = tensor.bfloat16()
            left_out += [name.removesuffix(".weight")] if tensor.ndim == 2 else []
        else:
            parts, wide[name] = writer(name, tensor, generator)
            stored |= parts
    save_file(stored, file)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**scheme, "modules_to_not_convert": left_out}
    (folder / "config.json").write_text(json.dumps(config))
    return wide
