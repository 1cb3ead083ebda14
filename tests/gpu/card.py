"""The card for tests: runs launches over byte buffers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qcn_compile.runtime.cuda.device import CudaDevice
from qcn_compile.targets.base import Kernel


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
