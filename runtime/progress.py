"""A progress line on a terminal, for loads that take long enough to wonder about."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

_PATIENCE = 0.7  # seconds before anything is shown
_WIDTH = 24


class Progress:
    """Shows what happens on stderr, only when that is a terminal and only after a while; clears its line at the end."""

    def __init__(self) -> None:
        self._shown = False
        self._what, self._done, self._total = "loading", 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if sys.stderr.isatty() else None

    def report(self, what: str, done: int, total: int) -> None:
        """What is being done, and how many bytes of how many."""
        self._what, self._done, self._total = what, done, total

    def __enter__(self) -> Progress:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _watch(self) -> None:
        started = time.monotonic()
        wait = _PATIENCE
        while not self._stop.wait(wait):
            self._shown, wait = True, 0.1
            sys.stderr.write(f"\r\x1b[K{self.line()} {time.monotonic() - started:.0f} s")
            sys.stderr.flush()

    def line(self) -> str:
        """The bar as text."""
        if not self._total:
            return f"{self._what} ..."
        filled = _WIDTH * self._done // self._total
        bar = "#" * filled + "." * (_WIDTH - filled)
        return f"{self._what} [{bar}] {self._done / 1e9:.1f}/{self._total / 1e9:.1f} GB"
