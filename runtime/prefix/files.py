"""Prefixes on disk: one file a tree node, named by its content's identity, whole or absent, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qcn_compile.artifact import alive

MAGIC = b"qcn-prefix 1\n"
SUFFIX = ".prefix"
_WAITING = 1 << 30  # bytes that may wait to be written; more are not stored


@dataclass(frozen=True)
class Header:
    """First line of a file. Then i32 tokens of the node, u8 [pages, page_bytes], u8 [state_bytes].

    build: artifact and layout that made it. prefix: digest of the tokens before the node, path: with the node's own.
    """

    build: str
    prefix: str
    path: str
    start: int
    tokens: int
    pages: int
    page_bytes: int
    state_bytes: int
    sha256: str

    @property
    def payload(self) -> int:
        return 4 * self.tokens + self.pages * self.page_bytes + self.state_bytes


@dataclass(frozen=True, eq=False)
class StoredFile:
    """A file of the store, or one on its way there."""

    path: Path
    header: Header


@dataclass(frozen=True)
class Contents:
    tokens: np.ndarray
    pages: np.ndarray
    state: np.ndarray | None


def digest(tokens: np.ndarray) -> str:
    """Identity of a run of i32 tokens."""
    return hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes()).hexdigest()


class PrefixFiles:
    """A folder of prefixes of one build, written in the background. Others' files in it are left alone.

    `limit` bytes: the files used longest ago make room.
    """

    def __init__(self, folder: Path, build: str, limit: int) -> None:
        self._folder, self._build, self._limit = folder, build, limit
        folder.mkdir(parents=True, exist_ok=True)
        self._pending: dict[Path, tuple[StoredFile, bytes]] = {}
        self._queue: queue.Queue[Path | None] = queue.Queue()
        self._warned = False
        self._thread: threading.Thread | None = None
        self._bytes = sum(path.stat().st_size for path in folder.glob("*" + SUFFIX))

    def scan(self) -> Iterator[tuple[StoredFile, np.ndarray]]:
        """Files of this build and their nodes' tokens, those of shorter prefixes first. Leftovers of writes go."""
        for path in self._folder.glob("*.partial-*"):
            with suppress(OSError, ValueError):
                writer = int(path.suffix.rpartition("-")[2])
                if writer == os.getpid() or not alive(writer):
                    path.unlink()
        found = []
        for path in self._folder.glob("*" + SUFFIX):
            header = self._header(path)
            if header is not None and header.build == self._build:
                found.append(StoredFile(path, header))
        for stored in sorted(found, key=lambda s: s.header.start):
            with suppress(OSError), stored.path.open("rb") as handle:
                _first_line(handle)
                data = handle.read(4 * stored.header.tokens)
                yield stored, np.frombuffer(data, np.int32)

    def add(self, tokens: np.ndarray, start: int, pages: np.ndarray, state: np.ndarray | None) -> StoredFile | None:
        """Store the node of `tokens[start:]`; None when too much waits to be written. Returns at once."""
        own = tokens[start:]
        data = b"".join((own.tobytes(), pages.tobytes(), b"" if state is None else state.tobytes()))
        header = Header(self._build, digest(tokens[:start]), digest(tokens), start, len(own), len(pages),
                        pages.shape[1], 0 if state is None else state.nbytes, hashlib.sha256(data).hexdigest())
        identity = f"{self._build} {start} {header.path} {header.state_bytes}"
        stored = StoredFile(self._folder / (hashlib.sha256(identity.encode()).hexdigest()[:40] + SUFFIX), header)
        if (pending := self._pending.get(stored.path)) is not None:
            return pending[0]
        if (known := self._header(stored.path)) is not None:
            return StoredFile(stored.path, known)
        waiting = sum(other.header.payload for other, _ in list(self._pending.values()))
        if waiting and waiting + len(data) > _WAITING:
            return None
        self._pending[stored.path] = stored, MAGIC + json.dumps(asdict(header)).encode() + b"\n" + data
        self._queue.put(stored.path)
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="prefix-store", daemon=True)
            self._thread.start()
        return stored

    def read(self, stored: StoredFile) -> Contents | None:
        """A file's contents; None, with a warning, when it is gone or damaged."""
        header = stored.header
        pending = self._pending.get(stored.path)
        if pending is not None:
            raw = pending[1]
        else:
            try:
                raw = stored.path.read_bytes()
            except OSError:
                return None
            with suppress(OSError):
                os.utime(stored.path)
        data = memoryview(raw)[len(raw) - header.payload:]
        if len(raw) < header.payload or hashlib.sha256(data).hexdigest() != header.sha256:
            self._warn(stored.path, "is damaged")
            with suppress(OSError):
                stored.path.unlink()
            return None
        middle = 4 * header.tokens
        pages = np.frombuffer(data, np.uint8, header.pages * header.page_bytes, middle)
        state = np.frombuffer(data, np.uint8, header.state_bytes, middle + pages.nbytes) if header.state_bytes else None
        return Contents(np.frombuffer(data, np.int32, header.tokens), pages.reshape(header.pages, -1), state)

    def close(self) -> None:
        """Write what waits, then end."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _header(self, path: Path) -> Header | None:
        """None for what is no file of ours, or cut short."""
        try:
            with path.open("rb") as handle:
                line = _first_line(handle)
                header = Header(**json.loads(line))
                if path.stat().st_size == len(MAGIC) + len(line) + header.payload:
                    return header
            self._warn(path, "is cut short")
        except OSError:
            pass
        except (ValueError, TypeError):
            self._warn(path, "is no prefix file of this version")
        return None

    def _warn(self, path: Path, what: str) -> None:
        """The first bad file is named; one line is enough."""
        if not self._warned:
            self._warned = True
            print(f"prefix store: {path} {what}; it and others like it are ignored", file=sys.stderr)

    def _write(self) -> None:
        while (path := self._queue.get()) is not None:
            data = self._pending[path][1]
            partial = path.with_suffix(f".partial-{os.getpid()}")
            try:
                with partial.open("wb") as handle:
                    handle.write(data)
                    handle.flush()
                    os.fsync(handle.fileno())
                partial.replace(path)
                self._bytes += len(data)
                self._make_room()
            except OSError as error:
                self._warn(path, f"could not be written ({error.strerror or error})")
                with suppress(OSError):
                    partial.unlink()
            del self._pending[path]

    def _make_room(self) -> None:
        if self._bytes <= self._limit:
            return
        rows = []
        for path in self._folder.glob("*" + SUFFIX):
            with suppress(OSError):
                status = path.stat()
                rows.append((status.st_mtime, status.st_size, path))
        self._bytes = sum(size for _, size, _ in rows)
        for _, size, path in sorted(rows):
            if self._bytes <= self._limit:
                return
            with suppress(OSError):
                path.unlink()
            self._bytes -= size


def _first_line(handle: BinaryIO) -> bytes:
    """The header, the handle then standing behind it. Raises ValueError when this is no file of ours."""
    if handle.read(len(MAGIC)) != MAGIC:
        raise ValueError("no prefix file")
    return handle.readline(4096)
