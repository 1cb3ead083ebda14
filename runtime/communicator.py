"""What ranks exchange: sums, columns, a broadcast, a barrier, transfers; every wait has a deadline and ends when a rank
dies."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from itertools import combinations
from typing import Protocol

import numpy as np

from qcn_compile.artifact import Collective
from qcn_compile.errors import DeviceError
from qcn_compile.runtime.device import HostLibrary, address

KINDS = {"all_reduce": 0, "all_gather": 1, "broadcast": 2, "barrier": 3, "send": 4, "recv": 5}  # as in ranks.c
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

    A collective is one of the `tp` ranks of a stage (None: of all); `send` and `recv` are between any two.
    parent: the process of rank 0, in the others; its death ends their waits.
    """

    def __init__(self, host: HostLibrary, file: int, rank: int, ranks: int, deadline: float, parent: int = 0,
                 tp: int | None = None) -> None:
        self.world, self._host, self._rooms = rank, host, Rooms(host, ranks, tp or ranks)
        self.rank, self.ranks = rank % self._rooms.tp, self._rooms.tp
        host.bind_ranks()
        self._memory = mmap.mmap(file, self._rooms.nbytes)
        self._room = np.frombuffer(self._memory, np.uint8)
        self._start = np.zeros(1, _RANKS)
        self._start[0] = (address(self._room), SLOT_BYTES, int(deadline * 1e9), 0, 0, parent, 0)
        self._state = self._enter(self._rooms.of_stage(rank), self.rank, self.ranks)
        self._pairs: dict[int, np.ndarray] = {}
        self._descriptors: dict[Collective, np.ndarray] = {}

    def _enter(self, offset: int, rank: int, ranks: int) -> np.ndarray:
        """What this rank knows of the room that lies at an offset."""
        state = self._start.copy()
        state["room"] += np.uint64(offset)
        state["rank"], state["ranks"] = rank, ranks
        return state

    def _pair(self, peer: int) -> np.ndarray:
        if peer not in self._pairs:
            self._pairs[peer] = self._enter(self._rooms.of_pair(self.world, peer), int(self.world > peer), 2)
        return self._pairs[peer]

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

    def send(self, x: np.ndarray, to: int) -> None:
        """Bytes of x to a rank. Returns when it has what was sent before."""
        x = np.ascontiguousarray(x)
        self._collective("send", x, x, 1, x.nbytes, self._pair(to))

    def recv(self, y: np.ndarray, source: int) -> np.ndarray:
        """Fill a dense array with what a rank sends."""
        return self._collective("recv", y, y, 1, y.nbytes, self._pair(source))

    def fail(self, reason: str) -> None:
        for offset, ranks in self._rooms:
            self._host.ranks_fail(address(self._enter(offset, 0, ranks)), reason.encode()[:500])

    def descriptor(self, collective: Collective) -> int:
        """Address of what a launch table needs to know of a collective; its function is `HostLibrary.ranks_launch`."""
        if collective.dtype != "f32":
            raise DeviceError(f"{collective.kind} of {collective.dtype} between CPU ranks; they exchange f32")
        if collective not in self._descriptors:
            row = np.zeros(1, _COLLECTIVE)
            state = self._state if collective.peer < 0 else self._pair(collective.peer)
            row[0] = (address(state), KINDS[collective.kind], COUNTS[collective.rows], collective.width)
            self._descriptors[collective] = row
        return address(self._descriptors[collective])

    def _collective(self, kind: str, x: np.ndarray, y: np.ndarray, rows: int, count: int,
                    state: np.ndarray | None = None) -> np.ndarray:
        state = self._state if state is None else state
        if self._host.ranks_collective(address(state), KINDS[kind], address(x), address(y), rows, count):
            raise DeviceError(self._host.error())
        return y


class Rooms:
    """Where rooms lie in the shared memory: one for each stage of `tp` ranks, then, of several stages, one for each two
    ranks. What nobody enters takes no memory. Iterates over (offset, ranks)."""

    def __init__(self, host: HostLibrary, ranks: int, tp: int) -> None:
        host.bind_ranks()
        self.tp, self._ranks, self._stages = tp, ranks, ranks // tp
        self._stage_bytes, self._pair_bytes = host.ranks_bytes(tp, SLOT_BYTES), host.ranks_bytes(2, SLOT_BYTES)
        self._pairs = list(combinations(range(ranks), 2)) if self._stages > 1 else []
        self.nbytes = self._stages * self._stage_bytes + len(self._pairs) * self._pair_bytes

    def of_stage(self, rank: int) -> int:
        return rank // self.tp * self._stage_bytes

    def of_pair(self, rank: int, other: int) -> int:
        pair = min(rank, other), max(rank, other)
        return self._stages * self._stage_bytes + self._pairs.index(pair) * self._pair_bytes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        yield from ((stage * self._stage_bytes, self.tp) for stage in range(self._stages))
        yield from ((self.of_pair(*pair), 2) for pair in self._pairs)


def room(host: HostLibrary, ranks: int, tp: int | None = None) -> int:
    """Zeroed shared memory for `ranks` ranks: a file descriptor that other processes may inherit."""
    file = os.memfd_create("qcn-ranks", 0)
    os.ftruncate(file, Rooms(host, ranks, tp or ranks).nbytes)
    return file
