"""Rank 0's view of the other ranks: starts their processes, sends them steps, watches them, ends them."""

from __future__ import annotations

import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

from qcn_compile.errors import DeviceError, QcnError, RankError
from qcn_compile.runtime.prefix.rows import Rows

T = TypeVar("T")
WORKER = "qcn_compile.runtime.ranks.worker"
START_SECONDS = 600.0  # reading the weights of a large model from a slow disk
END_SECONDS = 3.0
STEP, CALL, TELL = b"S", b"C", b"T"


class Team:
    """Ranks 1..n-1 as child processes, each with a connection. Raises DeviceError when one is gone.

    `setup(rank)` is what a worker is told first (see `worker.Setup`); `files` are descriptors that workers inherit.
    `fail` ends waits inside collectives; `on_failure` is called once, from a thread, when a rank dies. `ready` must
    follow.
    """

    def __init__(self, ranks: int, setup: Callable[[int], Any], files: Sequence[int] = (),
                 fail: Callable[[str], None] = lambda reason: None) -> None:
        self._fail, self._closing = fail, False
        self.failure: DeviceError | None = None
        self.on_failure: Callable[[DeviceError], None] = lambda error: None
        self._lock, self._loaded = threading.Lock(), set[int]()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        try:
            for rank in range(1, ranks):
                self._start(rank, setup(rank), files)
        except BaseException:
            self.close()
            raise

    def ready(self) -> None:
        """Returns when every rank has loaded its part."""
        for rank in range(1, len(self._processes) + 1):
            if rank not in self._loaded:
                self._answer(rank, START_SECONDS)

    def during(self, work: Callable[[], T]) -> T:
        """What `work` returns, which needs all ranks; raises what ends one of them in the meantime."""
        done: list[Any] = []
        thread = threading.Thread(target=lambda: done.append(_outcome(work)), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.02)
            for rank, connection in enumerate(self._connections, 1):
                if not done and connection.poll():
                    self._answer(rank, START_SECONDS)
                    self._loaded.add(rank)
        if isinstance(done[0], BaseException):
            raise done[0]
        found: T = done[0]
        return found

    def _start(self, rank: int, setup: Any, files: Sequence[int]) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", WORKER, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(), *files), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)
        theirs.close()
        self._processes.append(process)
        self._connections.append(Connection(ours.detach()))
        threading.Thread(target=self._watch, args=(rank, process), name=f"rank-{rank}", daemon=True).start()
        self._connections[-1].send_bytes(pickle.dumps(setup))

    @property
    def processes(self) -> list[int]:
        """Process ids of ranks 1, 2, ..."""
        return [process.pid for process in self._processes]

    def step(self, plan: str, inputs: np.ndarray) -> None:
        """Let all ranks run a plan on packed inputs. Returns at once; they meet in its collectives."""
        name = plan.encode()
        self._send(b"".join((STEP, len(name).to_bytes(2, "little"), name, inputs.tobytes())))

    def tell(self, method: str, *arguments: Any) -> None:
        """Let every rank call a method of its cache rows, in turn with steps. Returns at once."""
        self._send(TELL + pickle.dumps((method, arguments)))

    def call(self, method: str, *arguments: Any, each: Sequence[Any] = ()) -> list[Any]:
        """What a method of every rank's cache rows returns, in order of ranks; `each`: last arguments of their own."""
        ranks = range(1, len(self._processes) + 1)
        if each:
            for rank, last in zip(ranks, each, strict=True):
                self._send(CALL + pickle.dumps((method, (*arguments, last))), [rank])
        else:
            self._send(CALL + pickle.dumps((method, arguments)))
        return [self._answer(rank, START_SECONDS) for rank in ranks]

    def _send(self, message: bytes, ranks: Sequence[int] | None = None) -> None:
        if self.failure is not None:
            raise self.failure
        for rank in ranks or range(1, len(self._processes) + 1):
            try:
                self._connections[rank - 1].send_bytes(message)
            except OSError:
                raise self._gone(rank) from None

    def _answer(self, rank: int, seconds: float) -> Any:
        connection = self._connections[rank - 1]
        try:
            if not connection.poll(seconds):
                raise RankError(f"rank {rank} (process {self._processes[rank - 1].pid}) gave no answer within "
                                  f"{seconds:g} s")
            answer = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            raise self._gone(rank) from None
        if isinstance(answer, QcnError):
            raise answer
        return answer

    def _gone(self, rank: int) -> DeviceError:
        """The error of a rank whose connection closed: its process is ending."""
        try:
            self._processes[rank - 1].wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return RankError(f"rank {rank} closed its connection but did not end")
        return self.failure or RankError(_ended(rank, self._processes[rank - 1]))

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        with self._lock:
            if self._closing or self.failure is not None:
                return
            self.failure = RankError(_ended(rank, process))
        self._fail(str(self.failure))
        self.on_failure(self.failure)

    def close(self) -> None:
        """Ask all ranks to end, and end those that do not."""
        with self._lock:
            self._closing = True
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            try:
                process.wait(END_SECONDS if self.failure is None else 1.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except BaseException as error:
        return error


def _ended(rank: int, process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"rank {rank} (process {process.pid}) {how}; its requests are lost: start qcn-run again"


class TeamRows:
    """The cache rows of all ranks as one: a page or a state is rank 0's bytes, then rank 1's, and so on."""

    def __init__(self, own: Rows, team: Team) -> None:
        self._own, self._team = own, team
        sizes = [(own.page_bytes, own.state_bytes), *team.call("sizes")]
        self.page_bytes, self.state_bytes = (sum(size[i] for size in sizes) for i in (0, 1))
        self._page_ends, self._state_ends = (np.cumsum([size[i] for size in sizes])[:-1] for i in (0, 1))

    def read_pages(self, pages: Sequence[int]) -> np.ndarray:
        return np.concatenate([self._own.read_pages(pages), *self._team.call("read_pages", [int(p) for p in pages])], 1)

    def write_pages(self, pages: Sequence[int], data: np.ndarray) -> None:
        self._scatter("write_pages", [int(p) for p in pages], np.split(data, self._page_ends, 1))

    def copy_page(self, source: int, target: int) -> None:
        self._team.tell("copy_page", int(source), int(target))
        self._own.copy_page(source, target)

    def read_state(self, slot: int) -> np.ndarray:
        return np.concatenate([self._own.read_state(slot), *self._team.call("read_state", int(slot))])

    def write_state(self, slot: int, data: np.ndarray) -> None:
        self._scatter("write_state", int(slot), np.split(data, self._state_ends))

    def copy_state(self, source: int, target: int) -> None:
        self._team.tell("copy_state", int(source), int(target))
        self._own.copy_state(source, target)

    def _scatter(self, method: str, place: Any, parts: Sequence[np.ndarray]) -> None:
        getattr(self._own, method)(place, parts[0])
        self._team.call(method, place, each=[np.ascontiguousarray(part) for part in parts[1:]])
