"""The one address of several replicas: a request goes to one of them, to another when that is gone before it answers.

No client waits for a replica that is gone: what has begun to stream ends with an error event, the rest goes to another
replica, or gets a 503 when there is none. The same holds for one that refuses, or of which a rank died.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from qcn_compile.runtime.replicas.affinity import Affinity, prompt_of

T = TypeVar("T")
HOP = ("host", "content-length", "connection", "transfer-encoding", "accept-encoding", "date", "server")
"""Headers that are those of one connection."""
METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"]
GONE = {"error": {"type": "server_error", "code": "replica_lost",
                  "message": "the replica that answered this request is gone; send it again"}}
NONE = {"error": {"type": "server_error", "code": "no_replica", "message": "no replica is running yet; try again"}}


@dataclass
class Replica:
    """`url` None while it does not serve. `gone` is set when it stops serving, and is another event afterwards."""

    url: str | None = None
    pid: int = 0
    starts: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class Lost(Exception):
    """A replica is gone. `answer`: what it still said, if anything."""

    def __init__(self, answer: Response | None = None) -> None:
        self.answer = answer


class Proxy:
    """The ASGI application. `update` tells it what is known of a replica."""

    def __init__(self, count: int) -> None:
        self.replicas = [Replica() for _ in range(count)]
        self.affinity = Affinity(count)
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=5),
                                         limits=httpx.Limits(max_connections=None))
        self.app = Starlette(routes=[Route("/replicas", self._status), Route("/health", self._health),
                                     Route("/{path:path}", self._any, methods=METHODS)])

    def update(self, index: int, url: str | None, pid: int = 0) -> None:
        """A replica serves at `url` as process `pid`, or (None) does not."""
        replica = self.replicas[index]
        if replica.url is not None and (url, pid) != (replica.url, replica.pid):
            replica.gone.set()
            self.affinity.forget(index)
        if url is not None and (url, pid) != (replica.url, replica.pid):
            replica.gone, replica.starts = asyncio.Event(), replica.starts + 1
        replica.url, replica.pid = url, pid

    async def _status(self, request: Request) -> Response:
        rows = [{"url": r.url, "pid": r.pid, "starts": r.starts, "requests": self.affinity.busy[i]}
                for i, r in enumerate(self.replicas)]
        return JSONResponse({"replicas": rows})

    async def _health(self, request: Request) -> Response:
        serving = sum(r.url is not None for r in self.replicas)
        return JSONResponse({"serving": serving, "replicas": len(self.replicas)}, 200 if serving else 503)

    async def _any(self, request: Request) -> Response:
        body = await request.body()
        text, left = prompt_of(body) if body else "", set(range(len(self.replicas)))
        said: Response | None = None
        while (index := self.affinity.choose(text, {i for i in left if self.replicas[i].url is not None})) is not None:
            left.discard(index)
            try:
                return await self._forward(request, body, index)
            except (httpx.TransportError, Lost) as error:
                self.affinity.release(index)  # it did nothing: another may
                said = getattr(error, "answer", None) or said
            except BaseException:
                self.affinity.release(index)
                raise
        lost = len(left) < len(self.replicas)
        return said or JSONResponse(GONE if lost else NONE, 503, {"retry-after": "1"})

    async def _forward(self, request: Request, body: bytes, index: int) -> Response:
        replica = self.replicas[index]
        gone = replica.gone
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP]
        url = f"{replica.url}{request.url.path}" + (f"?{request.url.query}" if request.url.query else "")
        sent = self._client.build_request(request.method, url, headers=headers, content=body)
        answer = await _unless(gone, self._client.send(sent, stream=True))
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in HOP} | {"x-replica": str(index)}
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            try:
                whole = await _unless(gone, answer.aread())
            finally:
                await answer.aclose()
            if answer.status_code == 503:
                raise Lost(Response(whole, answer.status_code, kept))
            self.affinity.release(index)
            return Response(whole, answer.status_code, kept)
        return StreamingResponse(self._stream(answer, gone, index), answer.status_code, kept)

    async def _stream(self, answer: httpx.Response, gone: asyncio.Event, index: int) -> AsyncIterator[bytes]:
        chunks = answer.aiter_raw()
        try:
            while True:
                yield await _unless(gone, anext(chunks))
        except StopAsyncIteration:
            pass
        except (httpx.TransportError, Lost):
            yield f"data: {json.dumps(GONE)}\n\n".encode()
        finally:
            self.affinity.release(index)
            await answer.aclose()


async def _unless(gone: asyncio.Event, work: Awaitable[T]) -> T:
    """The result of `work`. Raises Lost when the replica is gone before."""
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(gone.wait())
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Lost
        return doing.result()
    finally:
        watching.cancel()
        doing.cancel()
