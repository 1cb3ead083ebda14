"""Splits `reasoning</think>answer`.

Newlines right around the tags are markup, as in the chat templates. A tool call that opens inside the reasoning ends
it; a mere mention of <tool_call> does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qcn_compile.errors import UsageError
from qcn_compile.runtime.parsing.events import Content, Reasoning
from qcn_compile.runtime.parsing.scanning import BLANKS, SPACES, Scanner, Tag, literal
from qcn_compile.runtime.parsing.tool_scanner import CALL_CLOSE, CALL_OPEN

REASONING_PARSERS: Mapping[str, tuple[str, ...]] = {"qwen3": ("qwen3-thinking", "deepseek-r1")}
"""Canonical names and their aliases."""

_OPEN = Tag([literal("<think>")])
_CLOSE = Tag([literal("</think>")])
_CALL = Tag([literal(CALL_OPEN)], [[SPACES, "<", BLANKS, *literal("function"), BLANKS, "="], [SPACES, r"\{"]])
_STRAY_CLOSE = Tag([[*literal(CALL_CLOSE), SPACES, *literal("</think>")]])
_PLAIN = re.compile(r"[^\n<]+")
_NEWLINES = re.compile(r"\n+")


def make_reasoning_parser(name: str, starts_inside: bool) -> ReasoningParser:
    """A parser for one message. `starts_inside`: the prompt ends with an open <think>. Raises UsageError."""
    for canonical, aliases in REASONING_PARSERS.items():
        if name == canonical or name in aliases:
            return ReasoningParser(starts_inside)
    known = "; ".join(f"{canonical} (also {', '.join(aliases)})" for canonical, aliases in REASONING_PARSERS.items())
    raise UsageError(f"unknown reasoning parser {name!r}; known: {known}")


class ReasoningParser(Scanner):
    """Incremental parser; its Content events carry the answer as written, tool calls included."""

    def __init__(self, starts_inside: bool) -> None:
        super().__init__()
        self._starts_inside = starts_inside
        self._state = self._start
        self._held: list[str] = []  # whitespace that is dropped if a tag follows
        self._begun = False  # reasoning text has come
        self._may_close_late = False  # a tool call ended the reasoning: its </think> may follow the call

    def _step(self) -> None:
        self._state()

    def _end(self) -> None:
        if self._state == self._start and not self._starts_inside:
            self._answer()

    def _start(self) -> None:
        """Before any text: an opening tag may come."""
        if spaces := self._take_spaces():
            self._held.append(spaces)
        elif self._text[self._position] == "<" and (tag := self._match(_OPEN)):
            self._position = tag.end()
            self._held.clear()
            self._state = self._inside
        elif self._starts_inside:
            self._held = ["".join(self._held).lstrip("\n")]
            self._state = self._inside
        else:
            self._answer()

    def _inside(self) -> None:
        if newlines := _NEWLINES.match(self._text, self._position):
            self._position = newlines.end()
            if self._begun:
                self._held.append(newlines[0])
        elif plain := _PLAIN.match(self._text, self._position):
            self._position = plain.end()
            self._think(plain[0])
        elif tag := self._match(_CLOSE):
            self._position = tag.end()
            self._held.clear()
            self._state = self._after
        elif self._match(_CALL):
            self._held.clear()
            self._may_close_late = True
            self._state = self._answer
        else:
            self._position += 1
            self._think("<")

    def _after(self) -> None:
        """Behind the closing tag: newlines, and the tag once more, are dropped."""
        if newlines := _NEWLINES.match(self._text, self._position):
            self._position = newlines.end()
        elif self._text[self._position] == "<" and (tag := self._match(_CLOSE)):
            self._position = tag.end()
        else:
            self._state = self._answer

    def _answer(self) -> None:
        self._state = self._answer
        held, self._held = "".join(self._held), []
        if not self._may_close_late:
            self._events.add(Content(held + self._text[self._position:]))
            self._position = len(self._text)
            return
        self._events.add(Content(self._take_until("<")))
        if self._position == len(self._text):
            return
        stop = self._position + 1
        if tag := self._match(_STRAY_CLOSE):
            self._events.add(Content(CALL_CLOSE))
            self._may_close_late = False
            stop = tag.end()
        else:
            self._events.add(Content("<"))
        self._position = stop

    def _think(self, text: str) -> None:
        self._events.add(Reasoning("".join(self._held) + text))
        self._held.clear()
        self._begun = True
