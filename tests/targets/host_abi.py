"""libqcnhost.so through ctypes alone: its structures and calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Any16(ctypes.Structure):
    """QcnAny."""

    _fields_ = (("type_index", ctypes.c_int32), ("padding", ctypes.c_int32), ("pointer", ctypes.c_uint64))


class Launch(ctypes.Structure):
    """QcnLaunch."""

    _fields_ = (("fn", ctypes.c_void_p), ("args", ctypes.POINTER(Any16)), ("n_args", ctypes.c_int32),
                ("reserved", ctypes.c_int32))


class Host:
    """libqcnhost.so through ctypes alone."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.qcn_host_load.restype = self.c.qcn_host_symbol.restype = ctypes.c_void_p
        self.c.qcn_host_load.argtypes = [ctypes.c_char_p]
        self.c.qcn_host_symbol.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        self.c.qcn_host_run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
        self.c.qcn_host_error.restype = ctypes.c_char_p
        self.c.qcn_host_read.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
        self.threads = 0

    def start(self, threads: int) -> None:
        """Have a pool of that many threads."""
        if threads != self.threads:
            self.c.qcn_host_shutdown()
            assert self.c.qcn_host_init(threads, 0) == 0, self.error()
            self.threads = threads

    def load(self, path: Path) -> int:
        library = self.c.qcn_host_load(str(path).encode())
        assert library, self.error()
        return int(library)

    def error(self) -> str:
        return str(self.c.qcn_host_error().decode())

    def table(self, library: int, launches: Sequence[tuple[str, Sequence[int]]]) -> Any:
        """A launch table; keep it alive while it runs."""
        rows = (Launch * len(launches))()
        for row, (symbol, addresses) in zip(rows, launches, strict=True):
            row.fn = self.c.qcn_host_symbol(library, symbol.encode())
            assert row.fn, f"no kernel {symbol}"
            row.args = (Any16 * len(addresses))(*[Any16(4, 0, a) for a in addresses])
            row.n_args = len(addresses)
        return rows

    def run(self, library: int, launches: Sequence[tuple[str, Sequence[int]]]) -> None:
        rows = self.table(library, launches)
        failed = self.c.qcn_host_run(ctypes.byref(rows), len(rows), None)
        assert failed == 0, f"launch {failed - 1} ({launches[failed - 1][0]}): {self.error()}"
