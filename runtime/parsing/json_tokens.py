"""One JSON object, token by token, from a text that comes in pieces."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum, auto

from qcn_compile.runtime.parsing.scanning import Tag, Undecided

_MAX_DEPTH = 256
_MAX_SCALAR = 4096
_SPACE = re.compile(r"[ \t\r\n]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_ESCAPE = Tag([["\\\\", r'["\\/bfnrt]'], ["\\\\", "u", *["[0-9a-fA-F]"] * 4]])
_SCALAR_RUN = re.compile(r'[^\s,:\[\]{}"<]+')
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_CLOSERS = {"{": "}", "[": "]"}


class JsonError(Exception):
    """The text at the asked position cannot continue the object."""


class Kind(Enum):
    """What a token is; a string comes in several TEXT tokens between two QUOTE tokens."""

    SPACE = auto()
    OPEN = auto()
    CLOSE = auto()
    COMMA = auto()
    COLON = auto()
    QUOTE = auto()
    TEXT = auto()
    SCALAR = auto()


class _Expect(Enum):
    VALUE = auto()
    VALUE_OR_CLOSE = auto()
    KEY = auto()
    KEY_OR_CLOSE = auto()
    COLON = auto()
    NEXT = auto()


@dataclass(frozen=True, slots=True)
class Token:
    """`text` is valid JSON: raw control characters in strings, which models write, are escaped in it."""

    kind: Kind
    end: int
    text: str
    in_key: bool


class JsonReader:
    """Checks the grammar strictly but for raw control characters in strings."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._expect = _Expect.VALUE
        self._in_string = False
        self._in_key = False

    @property
    def depth(self) -> int:
        """Objects and arrays that are open."""
        return len(self._open)

    @property
    def between_values(self) -> bool:
        """A value has just ended."""
        return self._expect is _Expect.NEXT

    def closing(self, depth: int) -> str:
        """What closes an open string value and all but the outer `depth` objects and arrays."""
        quote = '"' if self._in_string and not self._in_key else ""
        return quote + "".join(_CLOSERS[opener] for opener in reversed(self._open[depth:]))

    def next(self, text: str, start: int, final: bool) -> Token:
        """The token at `start`. Raises Undecided or JsonError, either of them without a change of state."""
        if self._in_string:
            return self._string(text, start, final)
        if spaces := _SPACE.match(text, start):
            return Token(Kind.SPACE, spaces.end(), spaces[0], in_key=False)
        character = text[start]
        if character == '"':
            return self._begin_string(start)
        if character in "{[":
            return self._begin_nested(character, start)
        if character in "}]":
            return self._end_nested(character, start)
        if character in ",:":
            return self._separator(character, start)
        return self._scalar(text, start, final)

    def _begin_string(self, start: int) -> Token:
        self._require(_Expect.VALUE, _Expect.VALUE_OR_CLOSE, _Expect.KEY, _Expect.KEY_OR_CLOSE)
        self._in_string = True
        self._in_key = self._expect in (_Expect.KEY, _Expect.KEY_OR_CLOSE)
        return Token(Kind.QUOTE, start + 1, '"', self._in_key)

    def _string(self, text: str, start: int, final: bool) -> Token:
        in_key = self._in_key
        if plain := _PLAIN.match(text, start):
            return Token(Kind.TEXT, plain.end(), plain[0], in_key)
        if text[start] == '"':
            self._in_string = self._in_key = False
            self._expect = _Expect.COLON if in_key else _Expect.NEXT
            return Token(Kind.QUOTE, start + 1, '"', in_key)
        if text[start] != "\\":
            return Token(Kind.TEXT, start + 1, json.dumps(text[start])[1:-1], in_key)
        escape = _ESCAPE.match(text, start, final)
        if escape is None:
            raise JsonError
        return Token(Kind.TEXT, escape.end(), escape[0], in_key)

    def _begin_nested(self, character: str, start: int) -> Token:
        self._require(_Expect.VALUE, _Expect.VALUE_OR_CLOSE)
        if len(self._open) >= _MAX_DEPTH:
            raise JsonError
        self._open.append(character)
        self._expect = _Expect.KEY_OR_CLOSE if character == "{" else _Expect.VALUE_OR_CLOSE
        return Token(Kind.OPEN, start + 1, character, in_key=False)

    def _end_nested(self, character: str, start: int) -> Token:
        self._require(_Expect.NEXT, _Expect.KEY_OR_CLOSE, _Expect.VALUE_OR_CLOSE)
        if _CLOSERS[self._open[-1]] != character:
            raise JsonError
        self._open.pop()
        self._expect = _Expect.NEXT
        return Token(Kind.CLOSE, start + 1, character, in_key=False)

    def _separator(self, character: str, start: int) -> Token:
        if character == ":":
            self._require(_Expect.COLON)
            self._expect = _Expect.VALUE
            return Token(Kind.COLON, start + 1, character, in_key=False)
        self._require(_Expect.NEXT)
        self._expect = _Expect.KEY if self._open[-1] == "{" else _Expect.VALUE
        return Token(Kind.COMMA, start + 1, character, in_key=False)

    def _scalar(self, text: str, start: int, final: bool) -> Token:
        self._require(_Expect.VALUE, _Expect.VALUE_OR_CLOSE)
        run = _SCALAR_RUN.match(text, start)
        if run is None or run.end() - start > _MAX_SCALAR:
            raise JsonError
        if run.end() == len(text) and not final:
            raise Undecided
        if not _SCALAR.fullmatch(run[0]):
            raise JsonError
        self._expect = _Expect.NEXT
        return Token(Kind.SCALAR, run.end(), run[0], in_key=False)

    def _require(self, *expected: _Expect) -> None:
        if self._expect not in expected:
            raise JsonError
