"""How the engine's thread tells the event loop that something lies there for it."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable


class Doorbell:
    """Calls made on the event loop, in order, for one other thread that posts them.

    Rings once for all that lies there. An eventfd where there is one: asyncio's own way is a socket, which costs both
    threads more, and it is rung with every token.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[Callable[[], None]] = deque()
        self._rung = False
        self._fd: int | None = None
        if hasattr(os, "eventfd"):
            self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            loop.add_reader(self._fd, self._heard)

    def post(self, call: Callable[[], None]) -> None:
        """Leave a call; it is made after the next ring."""
        self._posted.append(call)

    def ring(self) -> None:
        """Have everything posted called soon."""
        if self._rung or not self._posted or self._loop.is_closed():
            return
        self._rung = True
        if self._fd is None:
            self._loop.call_soon_threadsafe(self._answer)
        else:
            os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """Once nobody rings any more."""
        if self._fd is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def _heard(self) -> None:
        assert self._fd is not None
        os.eventfd_read(self._fd)
        self._answer()

    def _answer(self) -> None:
        self._rung = False  # before looking: what is posted from here on may ring again
        while self._posted:
            self._posted.popleft()()
