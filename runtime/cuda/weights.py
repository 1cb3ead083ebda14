"""Weights in device memory: copied from the build's files, bound from a checkpoint, or made up."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from qcn_compile.artifact import ALIGNMENT
from qcn_compile.errors import ArtifactError, UsageError
from qcn_compile.runtime.cuda.device import CudaDevice
from qcn_compile.runtime.weights import Report, blobs_in

LINE = 256
PATTERN = 64 << 20
CHUNK = 256 << 20


def total_bytes(build: Path, spec: dict[str, Any]) -> int:
    """Device bytes of all weights of a manifest."""
    blobs = sum(_whole(row["bytes"]) for row in spec.get("blobs", {}).values())
    late = sum(_whole(size) for row in spec.get("recipes", {}).values() for size in row["parts"].values())
    return int(blobs + late) + sum((build / name).stat().st_size for name in spec["files"])


def _whole(nbytes: int) -> int:
    """Bytes from one blob to the next."""
    return -(-nbytes // LINE) * LINE


class DeviceWeights:
    """Blob name -> device address. `model` is the checkpoint that late weights are bound from."""

    def __init__(self, build: Path, spec: dict[str, Any], device: CudaDevice, model: Path | None = None,
                 report: Report | None = None) -> None:
        self._device, self._report = device, report or (lambda what, done, total: None)
        self.nbytes = total_bytes(build, spec)
        self._done = 0
        self._addresses: dict[str, int] = {}
        for name in spec["files"]:
            self._file(build / name)
        if spec["mode"] == "dummy":
            self._dummy(spec["blobs"])
        elif spec["mode"] == "late":
            if model is None:
                raise UsageError(f"{build} was built without weights: name their checkpoint with --model DIR")
            self._late(spec["recipes"], model)
        elif spec["mode"] != "copied":
            raise ArtifactError(f"{build} has weights of mode {spec['mode']!r}, which this qcn-run does not know; "
                                "build again with qcn-compile")

    def address(self, name: str) -> int:
        """Where a blob starts. Raises ArtifactError when there is none of that name."""
        try:
            return self._addresses[name]
        except KeyError:
            raise ArtifactError(f"the weights lack the blob {name}; build again with qcn-compile") from None

    def replace(self, name: str, data: np.ndarray) -> None:
        """Other contents for a blob, as many bytes."""
        self._device.upload(self.address(name), data.view(np.uint8))

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._report("loading weights", self._done, self.nbytes)

    def _file(self, path: Path) -> None:
        with path.open("rb") as handle:
            data = np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        base = self._device.allocate(len(data))
        for start in range(0, len(data), CHUNK):
            piece = data[start:start + CHUNK]
            self._device.upload(base + start, piece)
            self._advance(len(piece))
        for name, offset in blobs_in(path, data).items():
            self._addresses[name] = base + offset

    def _place(self, sizes: dict[str, int]) -> None:
        """One allocation for blobs of those bytes."""
        offsets, at = {}, 0
        for name, nbytes in sizes.items():
            offsets[name] = at
            at += _whole(nbytes)
        base = self._device.allocate(at)
        self._addresses |= {name: base + offset for name, offset in offsets.items()}

    def _dummy(self, blobs: dict[str, dict[str, Any]]) -> None:
        """Random numbers of a harmless size: 64 MB of each kind are made and repeated."""
        self._place({name: row["bytes"] for name, row in blobs.items()})
        patterns: dict[str, int] = {}
        for kind in sorted({row["fill"] for row in blobs.values()}):
            patterns[kind] = self._device.allocate(PATTERN)
            self._device.upload(patterns[kind], filling(kind, PATTERN))
        for number, (name, row) in enumerate(blobs.items()):
            at, left = self._addresses[name], int(row["bytes"])
            skip = 4096 * (number * 97 % 4096)  # blobs of one shape differ
            while left:
                count = min(left, PATTERN - skip)
                self._device.driver("cuMemcpyDtoDAsync", at, patterns[row["fill"]] + skip, count, self._device.stream)
                at, left, skip = at + count, left - count, 0
            self._advance(int(row["bytes"]))
        self._device.synchronize()
        for pattern in patterns.values():
            self._device.free(pattern)

    def _late(self, recipes: dict[str, dict[str, Any]], model: Path) -> None:
        from qcn_compile.runtime.late_checkpoint import Checkpoint
        from qcn_compile.runtime.late_weights import pieces

        self._place({f"{name}.{part}": size for name, row in recipes.items() for part, size in row["parts"].items()})
        checkpoint = Checkpoint(model)
        for name, row in recipes.items():
            lacking = dict(row["parts"])
            for part, offset, data in pieces(row, checkpoint):
                lacking[part] -= data.nbytes
                if lacking[part] < 0:
                    break
                self._device.upload(self._addresses[f"{name}.{part}"] + offset, data)
                self._advance(data.nbytes)
            if not all(0 <= size < ALIGNMENT for size in lacking.values()):  # a part ends at a whole line
                raise ArtifactError(f"{model}: {name} makes {row['parts']} bytes but for {lacking}: another model than "
                                    "it was built for")
            self._advance(sum(lacking.values()))


def filling(kind: str, nbytes: int) -> np.ndarray:
    """Random valid numbers of one kind, u8: weights of about 0.02, vectors of about -0.75 (so that states decay)."""
    rng = np.random.default_rng(0)
    if kind == "fp8":
        codes = rng.integers(0, 256, nbytes, np.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
        return codes
    if kind == "scale":
        return np.full(nbytes // 4, 2e-4, np.float32).view(np.uint8)
    if kind == "bf16":
        values = rng.standard_normal(nbytes // 2, np.float32) * np.float32(0.02)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if kind == "f32":
        return (-0.5 - rng.random(nbytes // 4, np.float32) / 2).view(np.uint8)
    raise ArtifactError(f"dummy weights of kind {kind!r} are unknown to this qcn-run; build again with qcn-compile")
