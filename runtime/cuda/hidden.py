"""Hidden states between the main model, the host and the draft head: bits of bf16, u16 [T, hidden]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcn_compile.artifact import Plan
from qcn_compile.runtime.cuda.device import CudaDevice
from qcn_compile.runtime.cuda.footprint import hidden_bytes


class HiddenStates:
    """What the draft head reads, in device memory at `place`, and a pinned buffer for either way."""

    def __init__(self, device: CudaDevice, plans: Sequence[Plan], width: int) -> None:
        self._device = device
        self.place = device.allocate(hidden_bytes(plans, width))
        rows = max(plan.tokens for plan in plans)
        self._pinned = device.pinned(2 * rows * width).view(np.uint16).reshape(rows, width)

    def send(self, states: np.ndarray) -> None:
        """To the head, in the stream; the steps before have ended."""
        self._pinned[:len(states)] = states
        self._device.upload_soon(self.place, self._pinned[:len(states)])

    def carry(self, source: int, rows: Sequence[int]) -> None:
        """From states at `source` on the device to the head, these rows one after the other, in the stream."""
        size = 2 * self._pinned.shape[1]
        for place, row in enumerate(rows):
            self._device.copy_rows(self.place + place * size, size, source + int(row) * size, size, size, 1, "DtoD")

    def fetch(self, source: int, rows: int) -> np.ndarray:
        """Rows that lie at `source`, when the stream has reached them; a view, valid until the next call."""
        found = self._pinned[:rows]
        self._device.download_soon(found, source)
        self._device.synchronize()
        return found
