"""Weights at build time: evaluate what depends on weights alone, pack it for its kernel, write it shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qcn_compile.artifact import ALIGNMENT
from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.interpret import run_op
from qcn_compile.targets.base import Target

SHARD_BYTES = 256 << 20
Source = Callable[[str], Tensor]


@dataclass(frozen=True)
class BlobKey:
    """A weight value in one layout and encoding."""

    value: Value
    layout: str
    encoding: Encoding


def sources(value: Value) -> list[str]:
    """Names of the checkpoint weights a static value is made from, in order."""
    names: dict[str, None] = {}

    def visit(op: Op | None) -> None:
        if op is None:
            return
        if op.name == "weight":
            names[str(op.attrs["name"])] = None
        for operand in op.inputs:
            visit(operand.op)

    visit(value.op)
    return list(names)


def name_blobs(keys: Iterable[BlobKey]) -> dict[BlobKey, str]:
    """A readable, unique name for each blob: its first weight, how many more it holds, layout and format."""
    table: dict[BlobKey, str] = {}
    taken: set[str] = set()
    for key in keys:
        parts = sources(key.value)
        more = f"+{len(parts) - 1}" if len(parts) > 1 else ""
        stem = f"{parts[0] if parts else key.value.name}{more}:{key.layout}.{key.encoding.format}"
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}.{number}"
        taken.add(name)
        table[key] = name
    return table


@torch.no_grad()
def evaluate(value: Value, weights: Source) -> Tensor:
    """The tensor of a static value. Nothing is kept: what two values share is computed twice, memory stays low."""
    if value.op is None:
        raise ValueError(f"%{value.name} is an input, not a static value")
    results = run_op(value.op, [evaluate(v, weights) for v in value.op.inputs], weights)
    tensor: Tensor = results[value.op.results.index(value)]
    return tensor


def packed(names: dict[BlobKey, str], weights: Source, target: Target,
           progress: Callable[[int, int], None] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """All blobs, one weight in memory at a time."""
    for index, (key, name) in enumerate(names.items()):
        array = evaluate(key.value, weights).float().contiguous().numpy()
        for part, blob in target.pack(key.layout, key.encoding, array).items():
            yield f"{name}.{part}", blob
        if progress:
            progress(index + 1, len(names))


def write_shards(blobs: Iterable[tuple[str, np.ndarray]], folder: Path) -> list[str]:
    """Write blobs into safetensors files of about 256 MB; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[str] = []
    pending: list[tuple[str, np.ndarray]] = []
    size = 0

    def flush() -> None:
        if pending:
            files.append(f"weights-{len(files) + 1:05d}.safetensors")
            write_safetensors(folder / files[-1], pending)
            pending.clear()

    for name, blob in blobs:
        if size + blob.nbytes > SHARD_BYTES and pending:
            flush()
            size = 0
        pending.append((name, blob))
        size += blob.nbytes
    flush()
    return files


def write_safetensors(path: Path, blobs: list[tuple[str, np.ndarray]]) -> None:
    """One safetensors file of byte blobs whose data starts at a multiple of 64 (the header is padded with spaces)."""
    header, at = {}, 0
    for name, blob in blobs:
        if blob.nbytes % ALIGNMENT:
            raise ValueError(f"blob {name} has {blob.nbytes} bytes, not a multiple of {ALIGNMENT}")
        header[name] = {"dtype": "U8", "shape": [blob.nbytes], "data_offsets": [at, at + blob.nbytes]}
        at += blob.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for _, blob in blobs:
            handle.write(np.ascontiguousarray(blob).data)
