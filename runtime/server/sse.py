"""Answers over HTTP that notice when the client goes away: streams of events, and whole answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from json.encoder import encode_basestring
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

PING_SECONDS = 15.0
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class ClientGone(Exception):
    """Nobody is there to read the answer."""


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {_encode(data)}\n\n".encode("utf-8", "replace")


class TextEvent:
    """An event that differs from others of its stream in one text only: all but that is encoded once.

    `data` holds TEXT where the text goes.
    """

    TEXT = "\x00text\x00"

    def __init__(self, data: Any) -> None:
        self._before, self._after = event(data).split(json.dumps(self.TEXT).encode())

    def __call__(self, text: str) -> bytes:
        """The event with this text."""
        return self._before + encode_basestring(text).encode("utf-8", "replace") + self._after


DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends events as they come; a comment when nothing came for a while. `close` is called in any case."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._events, self._close = events, close
        self._quiet = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        watch = asyncio.ensure_future(self._watch(receive, send))
        try:
            await asyncio.wait({pump, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._close()
            unfinished = [task for task in (pump, watch) if not task.done()]
            for task in unfinished:
                task.cancel()
            results = await asyncio.gather(pump, watch, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, OSError):
                raise result

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._events:
            self._quiet = False
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self, receive: Receive, send: Send) -> None:
        while True:
            try:
                message = await asyncio.wait_for(receive(), PING_SECONDS)
            except TimeoutError:
                if self._quiet:
                    await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
                self._quiet = True
                continue
            if message["type"] == "http.disconnect":
                return


async def while_connected(request: Request, answer: Awaitable[Any], close: Callable[[], None]) -> Any:
    """The awaited answer. Raises ClientGone when the client leaves first; `close` is called in any case."""
    work = asyncio.ensure_future(answer)
    watch = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        return work.result()
    finally:
        close()
        work.cancel()
        watch.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def _disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
