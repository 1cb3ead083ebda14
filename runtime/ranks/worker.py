"""The process of a rank other than 0: `python -m qcn_compile.runtime.ranks.worker FD`, started by `Team`."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qcn_compile.errors import DeviceError, QcnError
from qcn_compile.runtime.memory import MemoryPlan
from qcn_compile.runtime.prefix.rows import Rows
from qcn_compile.runtime.ranks.team import CALL, STEP

OWN = ("replace_weight", "write_slot", "write_hidden", "carry_hidden")  # of the executable; others: of its cache rows


class Follower(Protocol):
    """What a worker runs: an executable of its rank."""

    rows: Rows

    def follow(self, name: str, step: np.ndarray) -> None: ...

    def replace_weight(self, name: str, data: np.ndarray) -> None: ...

    def settle(self) -> None: ...


@dataclass(frozen=True)
class Setup:
    """What a worker is told first. `open` is imported by name: "module:function" of (setup) -> (follower, fail)."""

    open: str
    build: Path
    rank: int
    ranks: int
    memory: MemoryPlan
    deadline: float
    options: dict[str, Any]


def main(file: int) -> int:
    """Obey until the connection closes. Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 gets them, too, and decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_orphaned, args=(os.getppid(),), daemon=True).start()
    connection = Connection(file)
    setup: Setup = pickle.loads(connection.recv_bytes())
    try:
        module, _, name = setup.open.partition(":")
        follower, fail = getattr(__import__(module, fromlist=[name]), name)(setup)
    except (QcnError, OSError) as error:
        return _last_words(connection, setup, error)
    connection.send_bytes(pickle.dumps("ready"))
    try:
        _obey(connection, follower)
        follower.settle()
    except (QcnError, OSError) as error:
        fail(f"rank {setup.rank} (process {os.getpid()}): {error}")
        print(f"qcn-run: rank {setup.rank}: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, QcnError) else 1
    return 0


def _orphaned(parent: int) -> None:
    """End this process when rank 0 is gone, whatever it waits for: it may be a library, or a GPU."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _last_words(connection: Connection, setup: Setup, error: Exception) -> int:
    told = type(error) if isinstance(error, QcnError) else DeviceError
    connection.send_bytes(pickle.dumps(told(f"rank {setup.rank}: {error}")))
    return 1


def _obey(connection: Connection, follower: Follower) -> None:
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            return
        if message[:1] == STEP:
            stop = 3 + int.from_bytes(message[1:3], "little")
            follower.follow(message[3:stop].decode(), np.frombuffer(message, np.int32, offset=stop))
            continue
        result = _call(follower, *pickle.loads(message[1:]))
        if message[:1] == CALL:
            connection.send_bytes(pickle.dumps(result))


def _call(follower: Follower, method: str, arguments: tuple[Any, ...]) -> Any:
    """What a method returns."""
    if method == "sizes":
        return follower.rows.page_bytes, follower.rows.state_bytes
    function: Callable[..., Any] = getattr(follower if method in OWN else follower.rows, method)
    return function(*arguments)


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)  # a GPU may still wait for a rank that is gone
