"""A checkpoint's tensors by rows: what is asked for is read, in the form it is stored in, and no more."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcn_compile.errors import ModelError

BLOCK = 128
SCALES = "_scale_inv"
STORED = {"BF16": np.uint16, "F32": np.float32, "F16": np.float16, "F8_E4M3": np.uint8}


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

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows of the first axis; in f32 when they cut a block of scales of a matrix."""
        if self.scales is None:
            return Tensor(self.kind, self.data[start:stop])
        step = 1 if self.data.ndim > 2 else BLOCK
        if start % step or (stop % step and stop != len(self.data)):
            return Tensor("f32", self.wide()[start:stop])
        return Tensor(self.kind, self.data[start:stop], self.scales[start // step:-(-stop // step)])


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes lie."""

    file: int
    start: int
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder of safetensors files. Raises ModelError naming what is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} holds no *.safetensors files; give the directory of the checkpoint to --model")
        self._handles = [file.open("rb") for file in files]
        self._places: dict[str, _Place] = {}
        for index, file in enumerate(files):
            self._places |= self._header(index, file)

    def _header(self, index: int, file: Path) -> dict[str, _Place]:
        handle = self._handles[index]
        first = handle.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
        try:
            if not 0 <= length < file.stat().st_size:
                raise ValueError("its header is cut off")
            header: dict[str, Any] = json.loads(handle.read(length))
        except ValueError as error:
            raise ModelError(f"{file} is damaged ({error}); download it again") from None
        header.pop("__metadata__", None)
        return {name: _Place(index, 8 + length + row["data_offsets"][0], row["dtype"], tuple(row["shape"]))
                for name, row in header.items()}

    def has(self, name: str) -> bool:
        return name in self._places

    def place(self, name: str) -> _Place:
        """Raises ModelError for a tensor that is not there or stored in a way that is not known."""
        if name not in self._places:
            raise ModelError(f"{self.folder} has no tensor {name}; the build was made for another model: "
                             "build again with --model naming this checkpoint")
        place = self._places[name]
        if place.dtype not in STORED:
            raise ModelError(f"{self.folder}: {name} is stored in {place.dtype}; known are {', '.join(STORED)}")
        return place

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of a tensor as stored; in f32 when they cut a block of scales."""
        place = self.place(name)
        count = place.shape[0] if place.shape else 1
        last = count if stop is None else min(stop, count)
        if place.dtype != "F8_E4M3":
            return Tensor("bf16" if place.dtype == "BF16" else "f32", self._bytes(place, start, last))
        step = 1 if len(place.shape) > 2 else BLOCK
        low, high = start // step * step, min(-(-last // step) * step, count)
        scales = self.read(name + SCALES, low // step, -(-high // step)).wide()
        return Tensor("fp8", self._bytes(place, low, high), scales).rows(start - low, last - low)

    def _bytes(self, place: _Place, start: int, stop: int) -> np.ndarray:
        kind = np.dtype(STORED[place.dtype])
        row = int(np.prod(place.shape[1:], dtype=np.int64)) * kind.itemsize
        data = np.empty((stop - start) * row, np.uint8)
        got = os.preadv(self._handles[place.file].fileno(), [data.data], place.start + start * row) if len(data) else 0
        while got < len(data):  # Linux reads at most 2 GiB at a time
            more = os.preadv(self._handles[place.file].fileno(), [data.data[got:]], place.start + start * row + got)
            if not more:
                raise ModelError(f"{self._handles[place.file].name} ended early; download it again")
            got += more
        return data.view(kind).reshape((stop - start, *place.shape[1:]) if place.shape else ())


def concat(parts: Sequence[Tensor], axis: int) -> Tensor:
    """One after another; in f32 when kinds differ or a part ends inside a block of scales."""
    if len(parts) == 1:
        return parts[0]
    whole = all(p.data.ndim - axis > 2 or p.data.shape[axis] % BLOCK == 0 for p in parts[:-1])
    if len({p.kind for p in parts}) > 1 or (parts[0].scales is not None and not whole):
        return Tensor("f32", np.concatenate([p.wide() for p in parts], axis))
    scales = [p.scales for p in parts if p.scales is not None]
    return Tensor(parts[0].kind, np.concatenate([p.data for p in parts], axis),
                  np.concatenate(scales, axis) if scales else None)


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
