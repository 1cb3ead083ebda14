"""The card for tests: runs launches over byte buffers, times variants, measures a device copy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qcn_compile.runtime.cuda.device import CudaDevice, Prepared
from qcn_compile.targets.base import Kernel
from qcn_compile.targets.triton.families import FAMILIES

SLAB = 6 << 30  # weights of timed variants: far more than any cache
REPEAT = 24


class Card:
    """A GPU with the kernels of one folder; a Runner for the harness of tests/targets/triton."""

    def __init__(self, kernels: Path, arch: int = 90) -> None:
        self.device = CudaDevice({"arch": arch, "name": "test"})
        self.kernels = kernels
        self._loaded: set[str] = set()

    def load(self, names: set[str]) -> None:
        self.device.load(self.kernels, names - self._loaded)
        self._loaded |= names

    def run(self, launches: Sequence[tuple[Kernel, tuple[int, ...], list[str]]],
            buffers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.load({kernel.symbol for kernel, _, _ in launches})
        places, at = {}, 0
        for name, data in buffers.items():
            places[name] = at
            at += -(-data.nbytes // 256) * 256 + 256
        base = int(self.device.driver("cuMemAlloc", at))
        for name, data in buffers.items():
            self.device.upload(base + places[name], np.ascontiguousarray(data))
        for kernel, grid, names in launches:
            self.device.launch(self.device.prepare(kernel.symbol, grid, [base + places[n] for n in names]))
        self.device.synchronize()
        after = {}
        for name, data in buffers.items():
            after[name] = np.empty_like(data)
            self.device.driver("cuMemcpyDtoH", after[name].ctypes.data, base + places[name], data.nbytes)
        self.device.driver("cuMemFree", base)
        return after

    def seconds(self, launches: list[Prepared], times: int = 5) -> float:
        """Median seconds of the launches together, replayed as a graph."""
        def work() -> None:
            for prepared in launches:
                self.device.launch(prepared)

        graph = self.device.capture(work)
        found = []
        first, last = self.device.event(), self.device.event()
        for _ in range(times + 1):
            self.device.record(first)
            self.device.replay(graph)
            self.device.record(last)
            self.device.synchronize()
            found.append(self.device.seconds(first, last))
        self.device.driver("cuGraphExecDestroy", graph)
        return float(np.median(found[1:]))

    def copy_bandwidth(self, slab: int) -> float:
        """GB/s of a device-to-device copy, read and written bytes together."""
        half = SLAB // 2
        first, last = self.device.event(), self.device.event()
        found = []
        for _ in range(5):
            self.device.record(first)
            self.device.driver("cuMemcpyDtoDAsync", slab + half, slab, half, self.device.stream)
            self.device.record(last)
            self.device.synchronize()
            found.append(2 * half / self.device.seconds(first, last) / 1e9)
        return float(np.median(found))

    def slab(self) -> int:
        """Device memory full of valid small fp8 codes (0x30..0x37: bf16 and f32 of them are small and finite too)."""
        base = self.device.allocate(SLAB)
        data = np.random.default_rng(0).integers(0x30, 0x38, 64 << 20, np.uint8)
        for start in range(0, SLAB, len(data)):
            self.device.upload(base + start, data)
        return base

    def numbers(self) -> dict[str, int]:
        """Input arrays of one token of one sequence with 1023 tokens before it, by the kernels' names for them."""
        arrays = {"counts": [1, 1, 1, 64], "cu": [0, 1], "context_lens": [1023], "slots": [0], "token_seq": [0],
                  "block_table": list(range(64)), "ids": [46 * i % 512 for i in range(1, 11)] + [512],
                  "rows": [0]}
        places = {}
        for name, values in arrays.items():
            places[name] = self.device.allocate(4096)
            self.device.upload(places[name], np.resize(np.array(values, np.int32), 1024))
        return places

    def variant(self, kernel: Kernel, grid: tuple[int, ...], slab: int, ints: dict[str, int],
                nbytes: int) -> list[Prepared]:
        """REPEAT launches of a variant over other weights each; activations at the slab's end."""
        self.load({kernel.symbol})
        pointers, _ = FAMILIES[kernel.family].pointers(kernel)
        launches = []
        step = max(-(-nbytes // 4096) * 4096, 4096) + (1 << 20)
        reach = 1100 << 20 if kernel.family.startswith("moe_") else nbytes + (1 << 20)
        for i in range(REPEAT):
            at = (i * step * 7) % (SLAB - (256 << 20) - reach - step) // 4096 * 4096
            places = []
            for number, pointer in enumerate(pointers):
                scratch = slab + SLAB - (128 << 20) + number * (4 << 20)
                big = pointer.name in ("w", "state", "keys", "values")
                whole = pointer.dtype == "i32" and pointer.name in ints
                places.append(ints[pointer.name] if whole else slab + at if big else scratch)
            launches.append(self.device.prepare(kernel.symbol, grid, places))
        return launches
