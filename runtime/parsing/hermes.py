"""The Hermes format: <tool_call>{"name": ..., "arguments": {...}}</tool_call>.

Arguments are streamed as written once the name is known. What breaks the JSON before that point makes the block
content; after it, the arguments are closed so that they stay one JSON object, and the rest is content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from qcn_compile.runtime.parsing.json_tokens import JsonError, JsonReader, Kind, Token
from qcn_compile.runtime.parsing.scanning import SPACES, Tag, literal
from qcn_compile.runtime.parsing.tool_scanner import CALL_OPEN, ToolScanner
from qcn_compile.runtime.parsing.values import encodable

_ONE = [*literal(CALL_OPEN), SPACES]
OPENING = Tag([[*_ONE, r"\{"], [*_ONE, *_ONE, r"\{"]])
_HALF_TOKEN = re.compile(r"(?:\\(?:u[0-9a-fA-F]{0,3})?|[-+.0-9eE]+|t(?:ru?)?|f(?:a(?:ls?)?)?|n(?:ul?)?)\Z")


class HermesParser(ToolScanner):
    """Incremental parser of one message."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        super().__init__(new_id)
        self._block: _Block | None = None

    def _step(self) -> None:
        block, start = self._block, self._position
        if block is None:
            self._content()
            return
        try:
            token = block.reader.next(self._text, start, self._final)
        except JsonError:
            if block.started and self._final and _HALF_TOKEN.match(self._text, start):
                self._position = len(self._text)
            self._leave(block)
            return
        self._position = token.end
        block.accept(token, self._text[start:token.end])
        if block.reader.depth == 0:
            self._leave(block)

    def _end(self) -> None:
        if self._block is not None:
            self._leave(self._block)
        super()._end()

    def _open_call(self) -> bool:
        opening = self._match(OPENING)
        if opening is None:
            return False
        self._position = opening.end() - 1
        self._block = _Block(opening[0][:-1], self._start_call, self._argue)
        return True

    def _leave(self, block: _Block) -> None:
        """The block's object is complete, or broken here, or the text ends."""
        self._block = None
        rest = block.finish()
        cut_off = self._final and self._position == len(self._text)
        if block.started:
            self._finish_call(block.arguments_done)
        if rest.strip() and not (block.started and cut_off):
            self._say(rest)


class _Block:
    """One wrapper object: finds `name` and `arguments` in any order."""

    def __init__(self, opening: str, start: Callable[[str], None], argue: Callable[[str], None]) -> None:
        self.reader = JsonReader()
        self.started = False
        self.arguments_done = False
        self._start = start
        self._argue = argue
        self._raw = [opening]  # text that no event tells of yet
        self._pending: list[str] = []  # arguments kept back until they can be closed after them
        self._streaming = False
        self._key = ""
        self._parts: list[str] = []  # of the current key or value
        self._fields: dict[str, str] = {}

    def accept(self, token: Token, raw: str) -> None:
        """Take the reader's token, written as `raw`."""
        self._raw.append(raw)
        if self._streaming:
            self._stream(token)
        elif self.reader.depth == 0:
            self._end_object()
        elif self.reader.depth > 1 or token.kind is Kind.CLOSE:
            self._value_part(token)
        elif token.kind is Kind.COLON:
            self._key, self._parts = json.loads("".join(self._parts)), []
        elif token.in_key:
            self._parts.append(token.text)
        elif token.kind in (Kind.QUOTE, Kind.TEXT, Kind.SCALAR):
            self._value_part(token)

    def finish(self) -> str:
        """No more tokens. Closes the arguments; returns text that belongs to no call."""
        if self._streaming:
            self._argue(self.reader.closing(depth=1))
        return "".join(self._raw)

    def _value_part(self, token: Token) -> None:
        opens_arguments = token.text == "{" and token.kind is Kind.OPEN and not self._parts and self._key == "arguments"
        if opens_arguments and not self.started and self._name():
            self._begin(self._name())
            self._streaming = True
            self._stream(token)
            return
        self._parts.append(token.text)
        if self.reader.depth == 1 and self.reader.between_values:
            self._fields.setdefault(self._key, "".join(self._parts))
            self._parts = []

    def _stream(self, token: Token) -> None:
        self._pending.append(token.text)
        if token.in_key or token.kind in (Kind.SPACE, Kind.COMMA, Kind.COLON):
            return
        self._argue(encodable("".join(self._pending)))
        self._pending.clear()
        self._raw.clear()
        if self.reader.depth == 1:
            self._streaming, self.arguments_done = False, True

    def _begin(self, name: str) -> None:
        self.started = True
        self._start(name)

    def _end_object(self) -> None:
        """The whole object is read; what was not streamed becomes a call if it is one."""
        if not self.started:
            arguments = _as_object(self._fields.get("arguments", "null"))
            if not self._name() or arguments is None:
                return
            self._begin(self._name())
            self._argue(encodable(arguments))
            self.arguments_done = True
        self._raw.clear()

    def _name(self) -> str:
        name: Any = json.loads(self._fields.get("name", "null"))
        return name if isinstance(name, str) else ""


def _as_object(arguments: str) -> str | None:
    """JSON text of an arguments object that may be missing, or encoded as a string; None if it is neither."""
    if arguments.startswith("{"):
        return arguments
    try:
        value = json.loads(arguments)
        if isinstance(value, str) and isinstance(json.loads(value), dict):
            return value.strip()
    except (ValueError, RecursionError):
        return None
    return "{}" if value is None or value == "" else None
