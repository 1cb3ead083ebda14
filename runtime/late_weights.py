"""Late-bound weights: a build's recipes evaluated over a checkpoint with NumPy alone, packed as the kernels want them.

A tensor stays in the form it is stored in (bf16 bits, or e4m3 codes with block scales) as long as steps only move rows,
so that a bf16 or FP8 checkpoint is copied, not converted, into kernels of the same format.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcn_compile.errors import ArtifactError, ModelError

BLOCK = 128
SCALES = "_scale_inv"
STORED = {"BF16": np.uint16, "F32": np.float32, "F16": np.float16, "F8_E4M3": np.uint8}
ALIGNMENT = 64


@dataclass(frozen=True)
class Tensor:
    """`kind` f32, bf16 (bits, u16) or fp8 (codes, u8, with f32 scales of 128 x 128 blocks)."""

    kind: str
    data: np.ndarray
    scales: np.ndarray | None = None

    def wide(self) -> np.ndarray:
        """The values in f32."""
        if self.kind == "bf16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        if self.scales is not None:
            return values()[self.data] * spread(self.scales, self.data.shape)
        return self.data.astype(np.float32, copy=False)


class Checkpoint:
    """The tensors of a folder of safetensors files, mapped. Raises ModelError naming what is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} holds no *.safetensors files; give the directory of the checkpoint to --model")
        self._rows: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
        for file in files:
            self._add(file)

    def _add(self, file: Path) -> None:
        with file.open("rb") as handle:
            data = np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        length = struct.unpack("<Q", data[:8].tobytes())[0] if len(data) >= 8 else len(data)
        try:
            header = json.loads(data[8:8 + length].tobytes())
        except ValueError as error:
            raise ModelError(f"{file} is damaged ({error}); download it again") from None
        header.pop("__metadata__", None)
        self._rows |= {name: (data[8 + length:], row) for name, row in header.items()}

    def has(self, name: str) -> bool:
        return name in self._rows

    def read(self, name: str) -> Tensor:
        """One tensor as stored."""
        if name not in self._rows:
            raise ModelError(f"{self.folder} has no tensor {name}; the build was made for another model: "
                             "build again with --model naming this checkpoint")
        data, row = self._rows[name]
        if row["dtype"] not in STORED:
            raise ModelError(f"{self.folder}: {name} is stored in {row['dtype']}; known are {', '.join(STORED)}")
        first, last = row["data_offsets"]
        array = data[first:last].view(STORED[row["dtype"]]).reshape(row["shape"])
        if row["dtype"] == "F8_E4M3":
            scales = self.read(name + SCALES)
            return Tensor("fp8", array, scales.wide())
        return Tensor("bf16" if row["dtype"] == "BF16" else "f32", array)


def bound(recipe: dict[str, Any], checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Part name -> bytes of one blob."""
    made: list[Tensor] = []
    for step in recipe["steps"]:
        made.append(_weight(step, checkpoint) if step["op"] == "weight"
                    else _STEPS[step["op"]](step, [made[i] for i in step["args"]]))
    return pack(recipe["layout"], recipe["format"], made[-1])


def _weight(step: dict[str, Any], checkpoint: Checkpoint) -> Tensor:
    """A parameter, or a stack of the experts' tensors when the checkpoint keeps them apart."""
    name, shape = step["name"], step["shape"]
    if checkpoint.has(name) or not step.get("merged"):
        found = checkpoint.read(name)
    else:
        experts = [[checkpoint.read(pattern.replace("*", str(e))) for pattern in step["merged"]]
                   for e in range(shape[0])]
        found = stacked([concat(parts, 0) for parts in experts])
    if list(found.data.shape) != list(shape):
        raise ModelError(f"{checkpoint.folder}: {name} has shape {list(found.data.shape)}, the build expects {shape}: "
                         "another model than it was built for")
    return found


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Equal tensors along a new first axis."""
    return concat([Tensor(p.kind, p.data[None], None if p.scales is None else p.scales[None]) for p in parts], 0)


def concat(parts: Sequence[Tensor], axis: int) -> Tensor:
    """One after another; in f32 when kinds differ or a part ends inside a block of scales."""
    whole = all(p.data.ndim > 2 or p.data.shape[axis] % BLOCK == 0 for p in parts[:-1])
    if len({p.kind for p in parts}) > 1 or (parts[0].scales is not None and not whole):
        return Tensor("f32", np.concatenate([p.wide() for p in parts], axis))
    scales = None if parts[0].scales is None else np.concatenate([p.scales for p in parts], axis)
    return Tensor(parts[0].kind, np.concatenate([p.data for p in parts], axis), scales)


def _take_rows(step: dict[str, Any], args: list[Tensor]) -> Tensor:
    x, runs = args[0], step["runs"]
    rows = np.concatenate([np.arange(start, start + count) for start, count in runs])
    if x.scales is None:
        return Tensor(x.kind, x.data[rows])
    if all(start % BLOCK == 0 and count % BLOCK == 0 for start, count in runs):
        return Tensor(x.kind, x.data[rows], x.scales[rows[::BLOCK] // BLOCK])
    return Tensor("f32", x.wide()[rows])


def _reshape(step: dict[str, Any], args: list[Tensor]) -> Tensor:
    x, shape = args[0], step["shape"]
    if x.scales is None:
        return Tensor(x.kind, x.data.reshape(shape))
    if list(shape[-2:]) == list(x.data.shape[-2:]):
        return Tensor(x.kind, x.data.reshape(shape), x.scales.reshape(*shape[:-2], *x.scales.shape[-2:]))
    return Tensor("f32", x.wide().reshape(shape))


def _slice(step: dict[str, Any], args: list[Tensor]) -> Tensor:
    x, at = args[0], [slice(None)] * args[0].data.ndim
    at[step["axis"]] = slice(step["start"], step["stop"])
    return Tensor(x.kind, x.data[tuple(at)]) if x.scales is None else Tensor("f32", x.wide()[tuple(at)])


def _transpose(step: dict[str, Any], args: list[Tensor]) -> Tensor:
    x = args[0]
    data = x.data if x.scales is None else x.wide()
    return Tensor(x.kind if x.scales is None else "f32", data.swapaxes(step["a"], step["b"]))


def _cast(step: dict[str, Any], args: list[Tensor]) -> Tensor:
    if step["dtype"] == "f32":
        return Tensor("f32", args[0].wide())
    return args[0] if args[0].kind == "bf16" else Tensor("bf16", to_bf16(args[0].wide()))


def _pointwise(compute: Callable[[np.ndarray, dict[str, Any]], np.ndarray]) -> Callable[..., Tensor]:
    return lambda step, args: Tensor("f32", compute(args[0].wide(), step))


_STEPS: dict[str, Callable[[dict[str, Any], list[Tensor]], Tensor]] = {
    "concat": lambda step, args: concat(args, step["axis"]), "take_rows": _take_rows, "reshape": _reshape,
    "slice": _slice, "transpose": _transpose, "cast": _cast,
    "add_scalar": _pointwise(lambda x, step: x + np.float32(step["value"])),
    "mul_scalar": _pointwise(lambda x, step: x * np.float32(step["value"])),
    "neg": _pointwise(lambda x, step: -x), "exp": _pointwise(lambda x, step: np.exp(x)),
}


def pack(layout: str, format_: str, x: Tensor) -> dict[str, np.ndarray]:
    """Part name -> flat array, as the GPU target packs it (targets/triton/packing.py)."""
    if layout == "vector":
        return {"w": flat(x.wide())}
    if layout == "channels":
        return {"w": flat(x.wide().T)}
    if layout != "matrix" or format_ not in ("bf16", "fp8"):
        raise ArtifactError(f"this qcn-run cannot pack weights as {layout} in {format_}; build again with qcn-compile")
    if format_ == "bf16":
        return {"w": flat(x.data if x.kind == "bf16" else to_bf16(x.wide()))}
    if x.scales is not None:
        return {"w": flat(x.data), "s": flat(x.scales)}
    matrices = x.data if x.data.ndim > 2 else x.data[None]
    with ThreadPoolExecutor() as pool:  # NumPy works outside the interpreter's lock
        done = list(pool.map(lambda m: quantize(Tensor(x.kind, m).wide()), matrices))
    return {"w": flat(np.stack([codes for codes, _ in done])), "s": flat(np.stack([scales for _, scales in done]))}


def flat(data: np.ndarray) -> np.ndarray:
    """1-D bytes, a multiple of 64."""
    line = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    lack = -line.nbytes % ALIGNMENT
    return line if lack == 0 else np.concatenate([line, np.zeros(lack, np.uint8)])


def to_bf16(w: np.ndarray) -> np.ndarray:
    """Bit patterns of f32 rounded to bf16, nearest even."""
    bits = np.ascontiguousarray(w, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32 [N, K] -> e4m3 codes u8 [N, K] and f32 scales [ceil(N/128), ceil(K/128)] = max|block| / 448."""
    rows, columns = (np.arange(0, n, BLOCK) for n in w.shape)
    most = np.maximum.reduceat(np.maximum.reduceat(np.abs(w), rows, 0), columns, 1)
    scales = (most / np.float32(448)).astype(np.float32)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    x = w * spread(inverse, w.shape)
    size = np.minimum(np.abs(x), np.float32(448))
    exponent = np.clip(np.frexp(size)[1] - 1, -6, 8)
    steps = np.rint(np.ldexp(size, 3 - exponent)).astype(np.int32)
    codes = np.minimum(np.where(steps > 0, (exponent + 6) * 8 + steps, 0), 0x7E)
    return (codes | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8), scales


def spread(scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every element's scale, [..., N, K]."""
    return scales.repeat(BLOCK, -2)[..., :shape[-2], :].repeat(BLOCK, -1)[..., :shape[-1]]


def values() -> np.ndarray:
    """The f32 value of every e4m3 code."""
    codes = np.arange(256)
    exponent, fraction = (codes >> 3) & 15, codes & 7
    size = np.where(exponent > 0, np.ldexp(8.0 + fraction, exponent - 10), np.ldexp(1.0 * fraction, -9))
    size = np.where((codes & 0x7F) == 0x7F, np.nan, size)
    return np.where(codes & 0x80, -size, size).astype(np.float32)
