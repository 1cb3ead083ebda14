"""Relative error of every weight format on the matrices of a checkpoint: `python -m tests.bench.format_errors [DIR]`.

Without DIR, the bundled model: the figures of qcn_compile/planning/errors.toml. Formats without a packing here (int4 in
groups of 128, nvfp4, mxfp4) are rounded by their definition (OCP MX 1.0; NVIDIA's e4m3 scale a group of 16).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from qcn_compile.ir.encoding import LIMITS, Encoding, dequantize, group_scales, quantize

BUNDLED = Path("qcn_compile/assets/tiny-coder")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FORMATS = {"fp8": Encoding("fp8", 128), "int8": Encoding("int8", 32), "int4": Encoding("int4", 32)}


def stored(w: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """What a packed matrix [N, K] stands for."""
    codes, scales = quantize(w.numpy(), encoding)
    return torch.from_numpy(np.array(dequantize(codes, scales, encoding, w.shape[1])))


def int4(w: torch.Tensor, group: int) -> torch.Tensor:
    """Symmetric int4 with the scales that the int4 packing chooses, in other groups."""
    blocks = torch.nn.functional.pad(w, (0, -w.shape[1] % group)).reshape(w.shape[0], -1, group)
    scales = group_scales(blocks, "int4").float().reshape(*blocks.shape[:2], 1)
    codes = (blocks / torch.where(scales != 0, scales, 1.0)).round().clamp(*LIMITS["int4"])
    return (codes * scales).reshape(w.shape[0], -1)[:, :w.shape[1]]


def four_bit(w: torch.Tensor, group: int, power: bool) -> torch.Tensor:
    """e2m1 codes with a scale a group: a power of two (mxfp4) or e4m3 under one f32 scale (nvfp4)."""
    blocks = torch.nn.functional.pad(w, (0, -w.shape[1] % group)).reshape(-1, group)
    most = blocks.abs().amax(1, keepdim=True)
    if power:
        scale = torch.exp2(torch.floor(torch.log2(most.clamp(min=2.0**-126))) - 2)
    else:
        whole = most.max() / (6 * 448)
        scale = (most / 6 / whole).to(torch.float8_e4m3fn).float() * whole
    scaled = blocks / torch.where(scale > 0, scale, 1.0)
    nearest = (scaled.abs().clamp(max=6)[..., None] - E2M1).abs().argmin(-1)
    back = (E2M1[nearest] * scaled.sign() * scale).reshape(w.shape[0], -1)
    return back[:, :w.shape[1]]


def matrices(folder: Path) -> Iterator[torch.Tensor]:
    """Every matrix of a checkpoint, f32; stacked experts one by one."""
    for path in sorted(folder.glob("*.safetensors")):
        for tensor in load_file(path).values():
            if tensor.dim() >= 2 and min(tensor.shape[-2:]) >= 16:
                yield from tensor.float().reshape(-1, *tensor.shape[-2:])


def main() -> None:
    """The median and the largest relative error of each format."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else BUNDLED
    errors: dict[str, list[float]] = {}
    count = 0
    for w in matrices(folder):
        count += 1
        made = {name: stored(w, encoding) for name, encoding in FORMATS.items()}
        made |= {"int4-g128": int4(w, 128), "nvfp4": four_bit(w, 16, False), "mxfp4": four_bit(w, 32, True)}
        for name, back in made.items():
            errors.setdefault(name, []).append(float((back - w).norm() / w.norm()))
    print(f"{count} matrices of {folder.name}")
    for name, found in errors.items():
        print(f"{name:10s} error = {np.median(found):.4f}, largest = {max(found):.4f}")


if __name__ == "__main__":
    main()
