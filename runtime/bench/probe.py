"""What this machine does now: memory read in GB/s and fp32 products in GFLOP/s. Run as a process, prints JSON.

Reading: the largest element of an array far beyond the caches, one part a thread. Products: NumPy's matrix product,
one a thread, BLAS itself on one thread. Both are lower bounds of the hardware's limits, measured in the same minutes as
what they are compared with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from qcn_compile.errors import DeviceError

ARRAY = 1 << 29  # bytes read in all
SIDE = 768  # of the square matrices
ROUNDS = 5


def roof(threads: int, under: Sequence[str] = ()) -> dict[str, float]:
    """{"read": GB/s, "flops": GFLOP/s} with that many threads, measured in a process of its own, `under` a command."""
    single = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run([*under, sys.executable, "-m", __name__, str(threads)], env={**os.environ, **single},
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeviceError(f"the machine's limits could not be measured: {done.stderr.strip()[-300:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def best(work: Callable[[int], Any], threads: int, pool: ThreadPoolExecutor) -> float:
    """Fewest seconds of all threads together over some rounds."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        list(pool.map(work, range(threads)))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(threads: int) -> dict[str, float]:
    """Both limits, in this process."""
    parts = np.array_split(np.ones(ARRAY // 8, np.float64), threads)
    squares = [np.ones((SIDE, SIDE), np.float32) for _ in range(threads)]
    repeat = 4
    with ThreadPoolExecutor(threads) as pool:
        read = best(lambda i: parts[i].max(), threads, pool)
        product = best(lambda i: [squares[i] @ squares[i] for _ in range(repeat)], threads, pool)
    return {"read": ARRAY / read / 1e9, "flops": threads * repeat * 2 * SIDE ** 3 / product / 1e9}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
