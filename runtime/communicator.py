"""What ranks exchange: sums, columns, a broadcast, a barrier; every wait has a deadline and ends when a rank dies."""

from __future__ import annotations

import mmap
import os
from typing import Protocol

import numpy as np

from qcn_compile.artifact import Collective
from qcn_compile.errors import DeviceError
from qcn_compile.runtime.device import HostLibrary, address

KINDS = {"all_reduce": 0, "all_gather": 1, "broadcast": 2, "barrier": 3}  # as ranks.c numbers them
COUNTS = {"T": 0, "S": 1, "R": 2}
SLOT_BYTES = 1 << 20
_RANKS = np.dtype([("room", "<u8"), ("capacity", "<i8"), ("deadline_ns", "<i8"), ("rank", "<i4"), ("ranks", "<i4"),
                   ("parent", "<i4"), ("meetings", "<u4")])
_COLLECTIVE = np.dtype([("ranks", "<u8"), ("kind", "<i4"), ("rows", "<i4"), ("width", "<i8")])


class Communicator(Protocol):
    """One rank's end. All ranks call the same methods in the same order; each raises DeviceError when one does not."""

    rank: int
    ranks: int

    def all_reduce(self, x: np.ndarray) -> np.ndarray:
        """The sum over ranks, f32."""
        ...

    def all_gather(self, x: np.ndarray) -> np.ndarray:
        """x [rows, width] of every rank side by side: [rows, ranks*width], f32."""
        ...

    def broadcast(self, x: np.ndarray) -> np.ndarray:
        """Rank 0's x; the others give an array of its size, u8."""
        ...

    def barrier(self) -> None:
        """Returns when all have come."""
        ...

    def fail(self, reason: str) -> None:
        """End every wait of every rank with this reason."""
        ...


class SharedMemory:
    """Ranks of one host; `file` is the shared memory, made once by `room` and handed to every rank's process.

    parent: the process of rank 0, in the others; its death ends their waits.
    """

    def __init__(self, host: HostLibrary, file: int, rank: int, ranks: int, deadline: float, parent: int = 0) -> None:
        self.rank, self.ranks, self._host = rank, ranks, host
        host.bind_ranks()
        self._memory = mmap.mmap(file, host.ranks_bytes(ranks, SLOT_BYTES))
        self._room = np.frombuffer(self._memory, np.uint8)
        self._state = np.zeros(1, _RANKS)
        self._state[0] = (address(self._room), SLOT_BYTES, int(deadline * 1e9), rank, ranks, parent, 0)
        self._descriptors: dict[Collective, np.ndarray] = {}

    def all_reduce(self, x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x, np.float32)
        return self._collective("all_reduce", x, np.empty_like(x), 1, x.size)

    def all_gather(self, x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x, np.float32)
        rows, width = x.shape
        return self._collective("all_gather", x, np.empty((rows, self.ranks * width), np.float32), rows, 4 * width)

    def broadcast(self, x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x, np.uint8)
        return self._collective("broadcast", x, x.copy(), 1, x.nbytes)

    def barrier(self) -> None:
        self._collective("barrier", np.empty(0, np.uint8), np.empty(0, np.uint8), 1, 0)

    def fail(self, reason: str) -> None:
        self._host.ranks_fail(address(self._state), reason.encode()[:500])

    def descriptor(self, collective: Collective) -> int:
        """Address of what a launch table needs to know of a collective; its function is `HostLibrary.ranks_launch`."""
        if collective.dtype != "f32":
            raise DeviceError(f"{collective.kind} of {collective.dtype} between CPU ranks; they exchange f32")
        if collective not in self._descriptors:
            row = np.zeros(1, _COLLECTIVE)
            row[0] = (address(self._state), KINDS[collective.kind], COUNTS[collective.rows], collective.width)
            self._descriptors[collective] = row
        return address(self._descriptors[collective])

    def _collective(self, kind: str, x: np.ndarray, y: np.ndarray, rows: int, count: int) -> np.ndarray:
        if self._host.ranks_collective(address(self._state), KINDS[kind], address(x), address(y), rows, count):
            raise DeviceError(self._host.error())
        return y


def room(host: HostLibrary, ranks: int) -> int:
    """Zeroed shared memory for `ranks` ranks: a file descriptor that other processes may inherit."""
    host.bind_ranks()
    file = os.memfd_create("qcn-ranks", 0)
    os.ftruncate(file, host.ranks_bytes(ranks, SLOT_BYTES))
    return file
