"""A small HTTP/1.1 client on asyncio streams: one connection a request, events as they come."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from qcn_compile.errors import UsageError

_LINE = 1 << 22  # bytes: longest header or chunk line
_ERROR_BYTES = 65536


class HttpError(Exception):
    """A status that is not 200, or an error event; `kind` is short enough to count by."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text[:300]}")
        self.kind = kind


@dataclass(frozen=True)
class Server:
    """Where requests go. `prefix` is the path before /v1."""

    host: str
    port: int
    prefix: str = ""
    tls: bool = False
    key: str | None = None

    @classmethod
    def at(cls, url: str, key: str | None = None) -> Server:
        """From a base URL, with or without /v1. Raises UsageError."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            raise UsageError(f"--url {url}: the port must be a number up to 65535") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--url {url}: give http://HOST:PORT")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), prefix, tls, key)

    def head(self, method: str, path: str, length: int) -> bytes:
        """A request's first line and headers."""
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Connection: close",
                 "Content-Type: application/json", f"Content-Length: {length}"]
        if self.key:
            lines.append(f"Authorization: Bearer {self.key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    @contextlib.asynccontextmanager
    async def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> AsyncIterator[Answer]:
        """Send and read the head of the answer. Leaving closes the connection, which cancels a stream."""
        context = ssl.create_default_context() if self.tls else None
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=context, limit=_LINE)
        try:
            data = b"" if body is None else json.dumps(body).encode()
            writer.write(self.head(method, path, len(data)) + data)
            await writer.drain()
            yield await Answer.read_head(reader)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """A whole answer. Raises HttpError for other statuses than 200."""
        async with self.request(method, path, body) as answer:
            await answer.check()
            return json.loads(await answer.body())


@dataclass(frozen=True)
class Answer:
    """An answer whose head was read."""

    status: int
    headers: Mapping[str, str]
    reader: asyncio.StreamReader

    @classmethod
    async def read_head(cls, reader: asyncio.StreamReader) -> Answer:
        """Status and headers. Raises ConnectionError when the server says nothing."""
        words = (await reader.readline()).split(None, 2)
        if len(words) < 2 or not words[1].isdigit():
            raise ConnectionError("the server closed the connection without an answer")
        headers = {}
        while (line := await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        return cls(int(words[1]), headers, reader)

    async def check(self) -> None:
        """Raises HttpError unless the status is 200."""
        if self.status != 200:
            text = (await self.body())[:_ERROR_BYTES].decode("utf-8", "replace")
            raise HttpError(f"HTTP {self.status}", text)

    async def body(self) -> bytes:
        """All of it."""
        return b"".join([piece async for piece in self.pieces()])

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises ConnectionError when it breaks off."""
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int((await self.reader.readline()).split(b";")[0] or b"?", 16):
                    yield (await self.reader.readexactly(size + 2))[:-2]
            elif "content-length" in self.headers:
                yield await self.reader.readexactly(int(self.headers["content-length"]))
            else:
                while piece := await self.reader.read(65536):
                    yield piece
        except (asyncio.IncompleteReadError, ValueError):
            raise ConnectionError("the answer broke off") from None

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The objects of a server-sent event stream, up to [DONE]. Raises ConnectionError when that never comes."""
        rest = b""
        async for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                if data == b"[DONE]":
                    return
                if data:
                    yield json.loads(data)
        raise ConnectionError("the stream ended without [DONE]")
