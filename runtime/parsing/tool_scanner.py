"""What the tool call formats share: content around calls, whitespace at their edges, numbering."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable

from qcn_compile.runtime.parsing.events import (
    Content,
    ToolCallArguments,
    ToolCallFinished,
    ToolCallStarted,
)
from qcn_compile.runtime.parsing.scanning import Scanner, Tag, literal

CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"

_CLOSE_TAG = Tag([literal(CALL_CLOSE)])


def random_call_id() -> str:
    """An id as OpenAI's clients expect it."""
    return f"call_{os.urandom(12).hex()}"


class ToolScanner(Scanner):
    """Finds calls in the answer. Whitespace before the first call alone, and after any call, is not content."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        super().__init__()
        self._new_id = new_id
        self._calls = 0
        self._spaces: list[str] = []  # whitespace at an edge: content only if content follows
        self._at_edge = True
        self._block_open = False  # a call has ended whose </tool_call> may follow

    @abstractmethod
    def _open_call(self) -> bool:
        """Enter a call if one begins at this `<`."""

    def _content(self) -> None:
        """One step outside calls."""
        if self._at_edge and (spaces := self._take_spaces()):
            self._spaces.append(spaces)
        elif plain := self._take_until("<"):
            self._say(plain)
        elif self._block_open and (closing := self._match(_CLOSE_TAG)):
            self._position = closing.end()
            self._reach_edge()
            self._block_open = False
        elif self._block_open and self._at_edge and self._final and _CLOSE_TAG.begins(self._text, self._position):
            self._position = len(self._text)
        elif not self._open_call():
            self._position += 1
            self._say("<")

    def _end(self) -> None:
        if not self._calls:
            self._say("")

    def _say(self, text: str) -> None:
        """Content, with the whitespace kept back before it."""
        self._events.add(Content("".join(self._spaces) + text))
        self._spaces.clear()
        self._at_edge = False

    def _reach_edge(self) -> None:
        self._spaces.clear()
        self._at_edge = True

    def _start_call(self, name: str) -> None:
        self._reach_edge()
        self._block_open = False
        self._events.add(ToolCallStarted(self._calls, self._new_id(), name))
        self._calls += 1

    def _argue(self, text: str) -> None:
        """More arguments of the current call."""
        self._events.add(ToolCallArguments(self._calls - 1, text))

    def _finish_call(self, complete: bool) -> None:
        self._events.add(ToolCallFinished(self._calls - 1, complete))
        self._reach_edge()
        self._block_open = True
