"""Pages and states of a GPU's caches, over the fake driver: what CacheRows does with the same caches in host memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from fake_driver import FakeDriver

from qcn_compile.runtime.cuda.device import CudaDevice
from qcn_compile.runtime.cuda.driver import Driver
from qcn_compile.runtime.cuda.rows import CudaRows, Group
from qcn_compile.runtime.prefix.rows import CacheRows

PAGES, SLOTS = 7, 5


class Both:
    """The same random caches on the fake card and in host memory: 3 layers of two kinds of states, 2 of pages."""

    def __init__(self, widest: int) -> None:
        fake = FakeDriver()
        fake.attributes["pitch"] = widest
        self.device = CudaDevice({"arch": 90, "name": "h100"}, driver=Driver(fake))
        rng = np.random.default_rng(0)
        self.views: list[np.ndarray] = []
        self.card = CudaRows(self.device, [self._group(rng, 4, PAGES, 96)],
                             [self._group(rng, 3, SLOTS, 64), self._group(rng, 3, SLOTS, 160)])
        self.host = CacheRows([v.copy() for v in self.views[:4]], [v.copy() for v in self.views[4:]])

    def _group(self, rng: np.random.Generator, count: int, rows: int, unit: int) -> Group:
        pitch = -(-rows * unit // 256) * 256
        base = self.device.allocate(count * pitch)
        for i in range(count):
            data = rng.integers(0, 256, rows * unit, np.uint8)
            self.device.upload(base + i * pitch, data)
            self.views.append(data.reshape(rows, unit))
        return Group(base, count, pitch, unit)

    def agree(self) -> None:
        every: Sequence[int] = range(PAGES)
        assert np.array_equal(self.card.read_pages(every), self.host.read_pages(every))
        for slot in range(SLOTS):
            assert np.array_equal(self.card.read_state(slot), self.host.read_state(slot))


@pytest.mark.parametrize("widest", [2**31 - 1, 100])  # by pitch, and row by row where arrays are too far apart
def test_rows_are_those_of_host_memory(widest: int) -> None:
    both, rng = Both(widest), np.random.default_rng(1)
    assert (both.card.page_bytes, both.card.state_bytes) == (both.host.page_bytes, both.host.state_bytes) == (384, 672)
    both.agree()
    pages, state = rng.integers(0, 256, (3, 384), np.uint8), rng.integers(0, 256, 672, np.uint8)
    many = rng.integers(0, 256, (PAGES * 3, 384), np.uint8)
    for rows in (both.card, both.host):
        rows.write_pages([6, 0, 3], pages)
        rows.write_state(4, state)
        rows.copy_page(3, 1)
        rows.copy_state(4, 0)
        rows.copy_state(2, 3)
    both.agree()
    order = np.tile(np.arange(PAGES), 3).tolist()  # more than the pinned buffer holds
    both.card.write_pages(order, many)
    assert np.array_equal(both.card.read_pages(order), np.tile(many[2 * PAGES:], (3, 1)))
    assert both.card.read_pages([]).shape == (0, 384)
