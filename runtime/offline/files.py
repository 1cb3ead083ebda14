"""The files of a batch, in OpenAI's format: requests in, answers out, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qcn_compile.errors import UsageError

_START = b'{"id": "batch_req_'  # of every line of answers
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@dataclass(frozen=True)
class Line:
    """One request of a batch."""

    custom_id: str
    url: str
    body: Mapping[str, Any]


def read_requests(path: Path) -> list[Line]:
    """All lines. Raises UsageError that names the first wrong one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--batch {path}: {getattr(error, 'strerror', None) or error}") from None
    lines: dict[str, Line] = {}
    for number, row in enumerate(text.splitlines(), 1):
        if row.strip():
            try:
                line = _line(json.loads(row))
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: {error}") from None
            if line.custom_id in lines:
                raise UsageError(f"{path}, line {number}: the custom_id {line.custom_id!r} was there before")
            lines[line.custom_id] = line
    if not lines:
        raise UsageError(f"--batch {path}: no requests in it")
    return list(lines.values())


def _line(row: Any) -> Line:
    if not isinstance(row, dict):
        raise ValueError("must be a JSON object")
    name, url, body = row.get("custom_id"), row.get("url"), row.get("body")
    if not isinstance(name, str) or not name:
        raise ValueError("custom_id must be a text that names the request")
    if row.get("method", "POST") != "POST" or url not in URLS:
        raise ValueError(f"method must be POST and url one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise ValueError("body must be a JSON object")
    return Line(name, url, {key: value for key, value in body.items() if key not in ("stream", "stream_options")})


class Answers:
    """The output file, to which answers are appended as they come. What an earlier run wrote stays."""

    def __init__(self, path: Path) -> None:
        self.done: set[str] = set()
        self.failed = 0
        try:
            self._file: BinaryIO = path.open("a+b")
            self._resume(path)
        except OSError as error:
            raise UsageError(f"--batch-output {path}: {error.strerror or error}") from None

    def add(self, line: Line, number: int, status: int, body: Any) -> None:
        """One more answer, on disk when this returns as far as the system's cache."""
        row = {"id": f"batch_req_{number}", "custom_id": line.custom_id,
               "response": {"status_code": status, "request_id": f"req_{number}", "body": body}, "error": None}
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.done.add(line.custom_id)
        self.failed += status != 200

    def close(self) -> None:
        """On disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _resume(self, path: Path) -> None:
        """Names of whole answers; a last line that was cut short goes."""
        self._file.seek(0)
        end = 0
        for row in self._file:
            if not row.startswith(_START[:len(row)]):
                raise UsageError(f"{path} exists and holds no answers of a batch; name another --batch-output")
            if not row.endswith(b"\n"):
                break
            end += len(row)
            self.done.add(json.loads(row)["custom_id"])
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)
