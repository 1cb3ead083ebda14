"""Weight blobs: safetensors files mapped into memory, or copied once into huge pages, by the threads that use them."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qcn_compile.artifact import ALIGNMENT
from qcn_compile.errors import ArtifactError
from qcn_compile.runtime.device import address, allocate, collapse

Report = Callable[[str, int, int], None]  # what, bytes done, bytes in all
Read = Callable[[int, int, np.ndarray], None]  # a file, where to start, the array to fill


class Weights:
    """Blob name -> address, for as long as this object lives.

    Mapped (default): pages come from the file on first use, and several processes share them. With `copy` (see
    `CpuDevice.read`) the files are read into private memory in huge pages: a slower start and more memory, for about a
    sixth more read bandwidth.
    Raises ArtifactError for a weight mode this runtime cannot serve and for damaged files.
    """

    def __init__(self, build: Path, spec: dict[str, Any], copy: Read | None = None,
                 report: Report | None = None) -> None:
        if spec.get("mode") != "copied":
            raise ArtifactError(f"{build} has weights of mode {spec.get('mode')!r}, this qcn-run reads mode 'copied'; "
                                "build again with --weights copied")
        self.nbytes = 0
        self._addresses: dict[str, int] = {}
        self._keep: list[np.ndarray] = []
        total = sum((build / name).stat().st_size for name in spec["files"])
        for name in spec["files"]:
            path = build / name
            data = _copy(path, copy, self.nbytes, total, report) if copy else _map(path)
            self._keep.append(data)
            base = address(data)
            self._addresses |= {name: base + offset for name, offset in blobs_in(path, data).items()}
            self.nbytes += len(data)

    def replace(self, name: str, data: np.ndarray) -> None:
        """Other contents for a blob, of which the file's stay as they are."""
        self.address(name)
        own = allocate(data.nbytes)
        own[:] = data.view(np.uint8)
        self._keep.append(own)
        self._addresses[name] = address(own)

    def address(self, name: str) -> int:
        """Where a blob starts. Raises ArtifactError when the files lack it."""
        try:
            return self._addresses[name]
        except KeyError:
            raise ArtifactError(f"the weights lack the blob {name}; build again with qcn-compile") from None


def _map(path: Path) -> np.ndarray:
    with path.open("rb") as handle:
        memory = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(memory, np.uint8)


def _copy(path: Path, read: Read, done: int, total: int, report: Report | None) -> np.ndarray:
    """The file blob by blob, so that each is divided among the threads as products with it are."""
    mapped = _map(path)
    data = allocate(len(mapped))
    starts = sorted({0, *blobs_in(path, mapped).values()})
    with path.open("rb", buffering=0) as handle:
        for start, stop in zip(starts, [*starts[1:], len(data)], strict=True):
            try:
                read(handle.fileno(), start, data[start:stop])
            except OSError as error:
                raise ArtifactError(f"{path} cannot be read at {start}: {error}; copy the build again") from None
            if report:
                report("reading weights", done + stop, total)
    collapse(data)
    return data


def blobs_in(path: Path, data: np.ndarray) -> dict[str, int]:
    """Where the blobs of one safetensors file start in it, each checked to lie inside and on a 64-byte boundary."""
    damaged = f"{path} is no safetensors file of ours"
    length = struct.unpack("<Q", data[:8].tobytes())[0] if len(data) >= 8 else len(data)
    start = 8 + length
    if start > len(data):
        raise ArtifactError(f"{damaged}: its header is cut off; build again with qcn-compile")
    try:
        header = json.loads(data[8:start].tobytes())
    except ValueError as error:
        raise ArtifactError(f"{damaged}: {error}; build again with qcn-compile") from None
    header.pop("__metadata__", None)
    blobs = {}
    for name, row in header.items():
        first, last = row["data_offsets"]
        if (start + first) % ALIGNMENT or start + last > len(data):
            raise ArtifactError(f"{damaged}: blob {name} is misaligned or outside the file; "
                                "build again with qcn-compile")
        blobs[name] = start + first
    return blobs
