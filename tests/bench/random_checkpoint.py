"""Checkpoints of random bf16 numbers with the names and shapes of a configuration, written file by file."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

import qcn_compile
from qcn_compile.frontend.checkpoint import INDEX, load_config
from qcn_compile.frontend.trace import build
from qcn_compile.ir.types import DType
from qcn_compile.write import TOKENIZER_FILES

BUNDLED = Path(qcn_compile.__file__).parent / "assets/tiny-coder"
SHARD = 1 << 30
POOL = torch.randn(32 << 20, generator=torch.Generator().manual_seed(0))


def make(folder: Path, config: dict[str, Any], sparse: bool = False) -> int:
    """A checkpoint in `folder`, files of about 1 GB, without content when sparse; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = build(load_config(folder)[0], DType.bf16)
    shapes = {k: tuple(v.shape) for k, v in revert_weight_conversion(model, dict(model.named_parameters())).items()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * int(np.prod(shape))
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(shard, file)
        _write(folder / file, shard, sparse)
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    return total


def _write(file: Path, shapes: dict[str, tuple[int, ...]], sparse: bool) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            handle.truncate(8 + len(text) + at)
            return
        for name, shape in shapes.items():
            handle.write(content(name, int(np.prod(shape))).view(torch.uint8).numpy().data)


def content(name: str, count: int) -> Tensor:
    """Random bf16 numbers in the range that a trained weight of that name has, another stretch of the pool each."""
    if name.endswith("norm.weight"):  # all but the gated one are stored as their distance from 1
        return torch.full((count,), float("linear_attn" in name), dtype=torch.bfloat16)
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % len(POOL)
    repeated = POOL.roll(-start) if count > len(POOL) // 2 else torch.cat([POOL[start:start + count], POOL[:count]])
    values = repeated.repeat(-(-count // len(repeated)))[:count]
    if name.endswith("A_log"):
        return values.abs().clamp(0.01).mul(4).log().bfloat16()
    if name.endswith("dt_bias"):
        return values.sub(3).bfloat16()
    return values.mul(0.25 if "conv1d" in name else 0.02).bfloat16()


def main() -> None:
    """python -m tests.bench.random_checkpoint CONFIG FOLDER, with the bundled model's tokenizer."""
    folder = Path(sys.argv[2])
    make(folder, json.loads(Path(sys.argv[1]).read_text()))
    for name in TOKENIZER_FILES:
        shutil.copyfile(BUNDLED / name, folder / name)


if __name__ == "__main__":
    main()
