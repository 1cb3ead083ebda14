"""Contents of the caches of a GPU: a KV page, or a state slot, over all layers at once, copied in the stream.

Arrays of one size lie at equal distances, so the rows of all layers are one pitched copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcn_compile.runtime.cuda.device import CudaDevice


@dataclass(frozen=True)
class Group:
    """`count` arrays of rows of `unit` bytes, `pitch` bytes from one array to the next, the first at `base`."""

    base: int
    count: int
    pitch: int
    unit: int

    @property
    def nbytes(self) -> int:
        """Of one row of all arrays."""
        return self.count * self.unit


class CudaRows:
    """Rows of caches in device memory: pages u8 [page_bytes], states u8 [state_bytes]. One pinned buffer for both."""

    def __init__(self, device: CudaDevice, pages: Sequence[Group], states: Sequence[Group]) -> None:
        self._device, self._pages, self._states = device, tuple(pages), tuple(states)
        self.page_bytes = sum(group.nbytes for group in pages)
        self.state_bytes = sum(group.nbytes for group in states)
        self._pinned: np.ndarray | None = None
        self._free = device.event(timed=False)

    @property
    def _buffer(self) -> np.ndarray:
        """Pinned memory for a state or some pages, taken when first needed, free for use."""
        if self._pinned is None:
            self._pinned = self._device.pinned(max(self.state_bytes, 8 * self.page_bytes))
        self._device.wait(self._free)
        return self._pinned

    def read_pages(self, pages: Sequence[int]) -> np.ndarray:
        """A copy, u8 [pages, page_bytes]."""
        data = np.empty((len(pages), self.page_bytes), np.uint8)
        for start, stop in self._batches(len(pages)):
            self._read(self._pages, pages[start:stop], data[start:stop].reshape(-1))
        return data

    def write_pages(self, pages: Sequence[int], data: np.ndarray) -> None:
        for start, stop in self._batches(len(pages)):
            self._write(self._pages, pages[start:stop], data[start:stop].reshape(-1))

    def copy_page(self, source: int, target: int) -> None:
        self._copy(self._pages, source, target)

    def read_state(self, slot: int) -> np.ndarray:
        """A copy, u8 [state_bytes]."""
        data = np.empty(self.state_bytes, np.uint8)
        self._read(self._states, [slot], data)
        return data

    def write_state(self, slot: int, data: np.ndarray) -> None:
        self._write(self._states, [slot], data)

    def copy_state(self, source: int, target: int) -> None:
        self._copy(self._states, source, target)

    def _batches(self, count: int) -> list[tuple[int, int]]:
        each = max(self.state_bytes // self.page_bytes, 8) if self.page_bytes else 1
        return [(start, min(start + each, count)) for start in range(0, count, each)]

    def _read(self, groups: Sequence[Group], rows: Sequence[int], data: np.ndarray) -> None:
        self._device.activate()
        buffer = self._buffer
        self._each(groups, rows, lambda group, row, at: self._device.copy_rows(
            int(buffer.ctypes.data) + at, group.unit, row, group.pitch, group.unit, group.count, "DtoH"))
        self._device.synchronize()
        data[:] = buffer[:len(data)]

    def _write(self, groups: Sequence[Group], rows: Sequence[int], data: np.ndarray) -> None:
        self._device.activate()
        buffer = self._buffer
        buffer[:len(data)] = data
        self._each(groups, rows, lambda group, row, at: self._device.copy_rows(
            row, group.pitch, int(buffer.ctypes.data) + at, group.unit, group.unit, group.count, "HtoD"))
        self._device.record(self._free)

    def _each(self, groups: Sequence[Group], rows: Sequence[int], copy: Callable[[Group, int, int], Any]) -> None:
        """`copy` with the place of each row in its group's first array, and its place in the buffer."""
        at = 0
        for row in rows:
            for group in groups:
                copy(group, group.base + int(row) * group.unit, at)
                at += group.nbytes

    def _copy(self, groups: Sequence[Group], source: int, target: int) -> None:
        self._device.activate()
        for group in groups:
            self._device.copy_rows(group.base + target * group.unit, group.pitch, group.base + source * group.unit,
                                   group.pitch, group.unit, group.count, "DtoD")
