"""A call's arguments, written as JSON while their raw values come in."""

from __future__ import annotations

from collections.abc import Callable

from qcn_compile.runtime.parsing.schema import Types
from qcn_compile.runtime.parsing.values import may_be_typed, quote, to_json


class ArgumentWriter:
    """Writes `{"name": value, ...}`. A value is held only while it may still be something else than a string."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._types: Types = frozenset()
        self._held: list[str] = []
        self._compound = False
        self._streaming = False
        self.names: set[str] = set()

    def open(self, name: str, types: Types) -> None:
        self._write(f"{', ' if self.names else '{'}{quote(name)}: ")
        self.names.add(name)
        self._types, self._held = types, []
        self._compound = self._streaming = False
        self._decide()

    def text(self, piece: str) -> None:
        """More of the open value."""
        if self._streaming:
            self._write(quote(piece)[1:-1])
            return
        self._held.append(piece)
        self._decide()

    def close(self) -> None:
        """End of the open value."""
        self._write('"' if self._streaming else to_json("".join(self._held), self._types))

    def finish(self) -> None:
        self._write("}" if self.names else "{}")

    def _decide(self) -> None:
        """Stream as a string as soon as the text can be nothing else."""
        if self._compound:
            return
        start = "".join(self._held)
        if may_be_typed(start, self._types):
            self._compound = start.lstrip(" \t\r\n")[:1] in ("{", "[")
            return
        self._streaming = True
        self._write(quote(start)[:-1])
