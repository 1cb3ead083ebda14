"""Relative error of every weight format on the matrices of a checkpoint: `python -m tests.bench.format_errors [DIR]`.

Without DIR, the bundled model: the figures of qcn_compile/planning/errors.toml. All but mxfp4, which nothing packs (OCP
MX 1.0), are rounded as builds round them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from qcn_compile.ir.encoding import Encoding, encode

BUNDLED = Path("qcn_compile/assets/tiny-coder")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FORMATS = {"fp8": Encoding("fp8", 128), "int8": Encoding("int8", 32), "int4": Encoding("int4", 32),
           "int4-g128": Encoding("int4-g128", 128), "nvfp4": Encoding("nvfp4", 16)}


def mxfp4(w: torch.Tensor) -> torch.Tensor:
    """e2m1 codes [N, K] with a power of two as the scale of a group of 32."""
    blocks = torch.nn.functional.pad(w, (0, -w.shape[1] % 32)).reshape(-1, 32)
    most = blocks.abs().amax(1, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(most.clamp(min=2.0**-126))) - 2)
    scaled = blocks / scale
    nearest = (scaled.abs().clamp(max=6)[..., None] - E2M1).abs().argmin(-1)
    return (E2M1[nearest] * scaled.sign() * scale).reshape(w.shape[0], -1)[:, :w.shape[1]]


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
        made = {name: torch.from_numpy(encode(w.numpy(), encoding)) for name, encoding in FORMATS.items()}
        made["mxfp4"] = mxfp4(w)
        for name, back in made.items():
            errors.setdefault(name, []).append(float((back - w).norm() / w.norm()))
    print(f"{count} matrices of {folder.name}")
    for name, found in errors.items():
        print(f"{name:10s} error = {np.median(found):.4f}, largest = {max(found):.4f}")


if __name__ == "__main__":
    main()
