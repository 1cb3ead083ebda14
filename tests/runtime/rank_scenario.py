"""One rank of a communicator test: `rank_scenario.py LIBRARY FD RANK RANKS DEADLINE SCENARIO`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

from qcn_compile.errors import DeviceError
from qcn_compile.runtime.communicator import SharedMemory
from qcn_compile.runtime.device import HostLibrary


def data(rank: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(rank).normal(size=shape).astype(np.float32)


def values(ranks: SharedMemory) -> None:
    """Sums and columns at sizes off the slot, many times, with ranks out of step."""
    for turn, count in enumerate((1, 7, 300_001, 64, 64, 64, 64, 64)):
        time.sleep(0.002 * ((turn + ranks.rank) % 3))
        want = sum(data(r + 10 * turn, (count,)) for r in range(ranks.ranks))
        np.testing.assert_allclose(ranks.all_reduce(data(ranks.rank + 10 * turn, (count,))), want, rtol=0, atol=1e-5)
    for rows, width in ((1, 5), (3, 70_001), (40, 11)):
        want = np.concatenate([data(r, (rows, width)) for r in range(ranks.ranks)], 1)
        assert np.array_equal(ranks.all_gather(data(ranks.rank, (rows, width))), want)
    text = np.frombuffer(b"from rank 0", np.uint8)
    assert ranks.broadcast(text if ranks.rank == 0 else np.zeros(11, np.uint8)).tobytes() == b"from rank 0"
    ranks.barrier()


def same_bits(ranks: SharedMemory) -> None:
    """All ranks get the same sum, bit by bit: rank 0 tells its own."""
    total = ranks.all_reduce(data(ranks.rank, (1000,)) * 10.0**ranks.rank)
    assert np.array_equal(ranks.broadcast(total.view(np.uint8)), total.view(np.uint8))


def different(ranks: SharedMemory) -> None:
    ranks.all_reduce(np.zeros(8 if ranks.rank else 4, np.float32))


def absent(ranks: SharedMemory) -> None:
    if ranks.rank != 1:
        ranks.barrier()
    time.sleep(3)


def stages(ranks: SharedMemory) -> None:
    """Two stages of two ranks: sums within, transfers between at sizes off the slot, both ways, out of step."""
    other = (ranks.world + 2) % 4
    for turn, count in enumerate((1, 300_001, 7, 1_000_000, 64, 64)):
        time.sleep(0.002 * ((turn + ranks.world) % 3))
        want = data(ranks.world // 2 * 2 + turn, (9,)) + data(ranks.world // 2 * 2 + 1 + turn, (9,))
        np.testing.assert_allclose(ranks.all_reduce(data(ranks.world + turn, (9,))), want, rtol=0, atol=1e-6)
        if ranks.world < 2:
            for repeat in range(3):  # ahead of who takes them
                ranks.send(data(ranks.world + repeat, (count,)), other)
            assert np.array_equal(ranks.recv(np.empty(count, np.float32), other), data(other, (count,)))
        else:
            for repeat in range(3):
                got = ranks.recv(np.empty(count, np.float32), other)
                assert np.array_equal(got, data(other + repeat, (count,)))
            ranks.send(data(ranks.world, (count,)), other)


def cross(ranks: SharedMemory) -> None:
    """Two stages that both wait for the other."""
    ranks.recv(np.empty(1, np.float32), (ranks.world + 2) % 4)


def main() -> int:
    library, file, rank, ranks, deadline, scenario = sys.argv[1:]
    parent = os.getppid() if scenario == "orphan" else 0
    end = SharedMemory(HostLibrary(Path(library)), int(file), int(rank), int(ranks), float(deadline), parent,
                       2 if scenario in ("stages", "cross") else None)
    try:
        {"values": values, "same_bits": same_bits, "different": different, "absent": absent, "stages": stages,
         "cross": cross, "orphan": lambda e: e.barrier()}[scenario](end)
    except DeviceError as error:
        print(error)
        return 7
    return 0


if __name__ == "__main__":
    sys.exit(main())
