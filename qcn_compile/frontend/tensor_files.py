"""Safetensors files: headers first, then any rows of any tensor into memory of its own (nothing is mapped)."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcn_compile.errors import ModelError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
          "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
          "I64": torch.int64, "BOOL": torch.bool}


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: its file, its dtype in safetensors' spelling, its shape, where its bytes start and end."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    span: tuple[int, int]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, or its rows start..stop; any thread may call it. Raises ModelError when the file has shrunk."""
        kind, shape = DTYPES[self.dtype], self.shape
        if shape:
            shape = ((shape[0] if stop is None else stop) - start, *shape[1:])
        row = prod(shape[1:]) * kind.itemsize
        data = bytearray(prod(shape) * kind.itemsize)
        try:
            with self.file.open("rb", buffering=0) as handle:
                handle.seek(self.span[0] + start * row)
                _fill(handle, memoryview(data))
        except OSError as error:
            raise ModelError(f"{self.file} cannot be read ({error}); download it again") from error
        return torch.frombuffer(data, dtype=kind).reshape(shape) if data else torch.empty(shape, dtype=kind)


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file. Raises ModelError naming both sizes when it is truncated or damaged."""
    again = "download it again"
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or 8 + length > size:
            raise ModelError(f"{file} is damaged: {size} bytes, but its header alone needs {8 + length}; {again}")
        text = stream.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        found = {name: _stored(file, 8 + length, name, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(f"{file} is damaged: its header cannot be read ({error}); {again}") from None
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "damaged"
        raise ModelError(f"{file} is {what}: {size} bytes, but its header describes {8 + length + end}; {again}")
    return found


def _stored(file: Path, base: int, name: str, entry: dict[str, Any]) -> Stored:
    shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ModelError(f"{file}: {name} is stored in {entry['dtype']}; known are {', '.join(DTYPES)}")
    if prod(shape) * DTYPES[entry["dtype"]].itemsize != last - first:
        raise ValueError(f"{name} has shape {list(shape)} in {last - first} bytes")
    return Stored(file, entry["dtype"], shape, (base + first, base + last))


def _fill(handle: FileIO, view: memoryview) -> None:
    while view:
        count = handle.readinto(view)
        if not count:
            raise OSError("the file ends early")
        view = view[count:]
