"""A worker process whose GPU and NCCL are made of Python; it tells a file what is put into its stream."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_driver import FakeDriver

from qcn_compile.runtime.cuda import driver, nccl
from qcn_compile.runtime.ranks import cuda


class FakeNccl:
    """Stands for libnccl.so.2: a gather finds every rank's part where this one's is."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.calls = ranks, list[tuple[str, int]]()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            if name == "ncclAllGather":
                for rank in range(self.ranks):
                    ctypes.memmove(args[1].value + rank * args[2].value, args[0].value, args[2].value)
            counted = {"ncclAllReduce": 2, "ncclAllGather": 2, "ncclSend": 1, "ncclRecv": 1}
            self.calls.append((name, args[counted[name]].value if name in counted else 0))
            return 0
        if not name.startswith("nccl"):
            raise AttributeError(name)
        call.restype = None  # type: ignore[attr-defined]
        self.__dict__[name] = call
        return call


def install(patch: Callable[[Any, str, Any], None]) -> tuple[FakeDriver, FakeNccl]:
    """Fakes in place of the driver and of NCCL, in this process."""
    made, library = FakeDriver(), FakeNccl(2)
    patch(driver, "bindings", lambda: made)
    patch(nccl, "library", lambda: library)
    return made, library


def open_worker(setup: Any) -> Any:
    made, library = install(setattr)
    executable, fail = cuda.open_worker(setup)
    log, follow = Path(os.environ["FAKE_RANKS"]), executable.follow

    def told(name: str, step: Any) -> None:
        follow(name, step)
        block = executable._stages[1].block
        words = block.view("int32")[:len(step)].tolist()
        log.write_text(json.dumps({"plan": name, "same": words == step.tolist(), "calls": library.calls,
                                   "replays": made.calls.count("cuGraphLaunch")}))
    executable.follow = told
    return executable, fail


