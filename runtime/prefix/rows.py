"""Contents of the caches as plain bytes: a KV page, or a state slot, over all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Rows(Protocol):
    """What the prefix cache asks of a device's memory."""

    @property
    def page_bytes(self) -> int: ...

    @property
    def state_bytes(self) -> int: ...

    def read_pages(self, pages: Sequence[int]) -> np.ndarray:
        """A copy, u8 [pages, page_bytes]."""
        ...

    def write_pages(self, pages: Sequence[int], data: np.ndarray) -> None: ...

    def copy_page(self, source: int, target: int) -> None: ...

    def read_state(self, slot: int) -> np.ndarray:
        """A copy, u8 [state_bytes]."""
        ...

    def write_state(self, slot: int, data: np.ndarray) -> None: ...

    def copy_state(self, source: int, target: int) -> None: ...


class CacheRows:
    """Rows of caches that lie in this process's memory: u8 [pages, bytes] arrays, u8 [slots, bytes] arrays."""

    def __init__(self, pages: Sequence[np.ndarray], states: Sequence[np.ndarray]) -> None:
        self._pages, self._states = tuple(pages), tuple(states)
        self.page_bytes = sum(array.shape[1] for array in self._pages)
        self.state_bytes = sum(array.shape[1] for array in self._states)

    def read_pages(self, pages: Sequence[int]) -> np.ndarray:
        data = np.empty((len(pages), self.page_bytes), np.uint8)
        start = 0
        for array in self._pages:
            stop = start + array.shape[1]
            data[:, start:stop] = array[list(pages)]
            start = stop
        return data

    def write_pages(self, pages: Sequence[int], data: np.ndarray) -> None:
        start = 0
        for array in self._pages:
            stop = start + array.shape[1]
            array[list(pages)] = data[:, start:stop]
            start = stop

    def copy_page(self, source: int, target: int) -> None:
        for array in self._pages:
            array[target] = array[source]

    def read_state(self, slot: int) -> np.ndarray:
        return np.concatenate([array[slot] for array in self._states]) if self._states else np.empty(0, np.uint8)

    def write_state(self, slot: int, data: np.ndarray) -> None:
        start = 0
        for array in self._states:
            stop = start + array.shape[1]
            array[slot] = data[start:stop]
            start = stop

    def copy_state(self, source: int, target: int) -> None:
        for array in self._states:
            array[target] = array[source]
