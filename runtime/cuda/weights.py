"""Weights in device memory: copied from the build's files, bound from a checkpoint, or made up."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcn_compile.artifact import ALIGNMENT, Plan
from qcn_compile.errors import ArtifactError, UsageError
from qcn_compile.runtime.cuda.device import CudaDevice
from qcn_compile.runtime.weights import Report, blobs_in

LINE = 256
PATTERN = 64 << 20
CHUNK = 256 << 20


def total_bytes(build: Path, spec: dict[str, Any], on_host: Collection[str] = ()) -> int:
    """Device bytes of all weights of a manifest, but of the blobs that lie in host memory."""
    blobs = sum(_whole(row["bytes"]) for name, row in spec.get("blobs", {}).items() if name not in on_host)
    late = sum(_whole(size) for name, size in _late_sizes(spec).items() if name not in on_host)
    files = sum((build / name).stat().st_size for name in spec["files"])
    return int(blobs + late) + files - sum(size for name, (_, size) in _stored(build, spec).items() if name in on_host)


def host_bytes(build: Path, spec: dict[str, Any], on_host: Collection[str]) -> int:
    """Bytes of the blobs that lie in host memory."""
    sizes = {**{name: row["bytes"] for name, row in spec.get("blobs", {}).items()}, **_late_sizes(spec),
             **{name: size for name, (_, size) in _stored(build, spec).items()}}
    return sum(int(sizes[name]) for name in on_host)


def look_ups(plans: Sequence[Plan]) -> frozenset[str]:
    """Blobs of which a step reads the rows of its tokens only: those that nothing but embeddings take."""
    uses: dict[str, set[bool]] = {}
    for launch in (launch for plan in plans for launch in plan.launches):
        for arg in launch.args:
            if arg.kind == "weight":
                uses.setdefault(arg.name, set()).add(launch.op.startswith("embedding "))
    return frozenset(name for name, kinds in uses.items() if kinds == {True})


def _late_sizes(spec: dict[str, Any]) -> dict[str, int]:
    return {f"{name}.{part}": size for name, row in spec.get("recipes", {}).items()
            for part, size in row["parts"].items()}


def _stored(build: Path, spec: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Blob -> where it starts in its file, and its bytes up to the next one."""
    found: dict[str, tuple[int, int]] = {}
    for file in spec["files"]:
        data = _mapped(build / file)
        found |= _extents(blobs_in(build / file, data), len(data))
    return found


def _extents(starts: dict[str, int], end: int) -> dict[str, tuple[int, int]]:
    places = sorted(starts.items(), key=lambda item: item[1])
    ends = [start for _, start in places[1:]] + [end]
    return {name: (start, stop - start) for (name, start), stop in zip(places, ends, strict=True)}


def _mapped(path: Path) -> np.ndarray:
    with path.open("rb") as handle:
        return np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _whole(nbytes: int) -> int:
    """Bytes from one blob to the next."""
    return -(-nbytes // LINE) * LINE


class DeviceWeights:
    """Blob name -> the address a kernel reads it at. `model` is the checkpoint that late weights are bound from.

    Blobs named in `on_host` lie in pinned host memory, which kernels read over the bus.
    """

    def __init__(self, build: Path, spec: dict[str, Any], device: CudaDevice, model: Path | None = None,
                 report: Report | None = None, on_host: Collection[str] = ()) -> None:
        self._device, self._report = device, report or (lambda what, done, total: None)
        self.on_host = frozenset(on_host)
        self.nbytes = total_bytes(build, spec, on_host)
        self.host_bytes = host_bytes(build, spec, on_host)
        self._done = 0
        self._addresses: dict[str, int] = {}
        self._host: dict[str, np.ndarray] = {}
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
        self._fill(name, data.view(np.uint8))

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._report("loading weights", self._done, self.nbytes + self.host_bytes)

    def _fill(self, name: str, data: np.ndarray, start: int = 0) -> None:
        """Contents of a blob that has its place, from byte `start` on."""
        if name in self._host:
            self._host[name][start:start + data.nbytes] = data.reshape(-1).view(np.uint8)
        else:
            self._device.upload(self.address(name) + start, data)

    def _take_host(self, name: str, nbytes: int) -> None:
        self._host[name], self._addresses[name] = self._device.mapped(nbytes)

    def _file(self, path: Path) -> None:
        """A file as it is, but for blobs of the host: what follows them moves up."""
        data = _mapped(path)
        extents = _extents(blobs_in(path, data), len(data))
        apart = sorted(extent for name, extent in extents.items() if name in self.on_host)
        base = self._device.allocate(len(data) - sum(size for _, size in apart))
        start = at = 0
        for stop, skip in [*apart, (len(data), 0)]:
            for piece in np.split(data[start:stop], range(CHUNK, stop - start, CHUNK)):
                self._device.upload(base + at, piece)
                self._advance(len(piece))
                at += len(piece)
            start = stop + skip
        for name, (place, size) in extents.items():
            if name in self.on_host:
                self._take_host(name, size)
                self._fill(name, data[place:place + size])
                self._advance(size)
            else:
                self._addresses[name] = base + place - sum(size for start, size in apart if start < place)

    def _place(self, sizes: dict[str, int]) -> None:
        """One allocation for blobs of those bytes, and one for each of the host's."""
        offsets, at = {}, 0
        for name, nbytes in sizes.items():
            if name in self.on_host:
                self._take_host(name, nbytes)
                continue
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
            if name in self._host:
                self._host[name][:] = np.resize(filling(row["fill"], min(PATTERN, row["bytes"])), row["bytes"])
                self._advance(int(row["bytes"]))
                continue
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

        self._place(_late_sizes({"recipes": recipes}))
        checkpoint = Checkpoint(model)
        for name, row in recipes.items():
            lacking = dict(row["parts"])
            for part, offset, data in pieces(row, checkpoint):
                lacking[part] -= data.nbytes
                if lacking[part] < 0:
                    break
                self._fill(f"{name}.{part}", data, offset)
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
    if kind == "fp4":
        return rng.integers(0, 256, nbytes, np.uint8)
    if kind == "e4m3":
        return np.full(nbytes, 0x58, np.uint8)  # 16
    if kind == "f16":
        return np.full(nbytes // 2, -4e-3, np.float16).view(np.uint8)
    if kind == "scale":
        return np.full(nbytes // 4, 2e-4, np.float32).view(np.uint8)
    if kind == "bf16":
        values = rng.standard_normal(nbytes // 2, np.float32) * np.float32(0.02)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if kind == "f32":
        return (-0.5 - rng.random(nbytes // 4, np.float32) / 2).view(np.uint8)
    raise ArtifactError(f"dummy weights of kind {kind!r} are unknown to this qcn-run; build again with qcn-compile")
