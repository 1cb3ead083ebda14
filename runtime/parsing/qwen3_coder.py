"""Qwen3-Coder's XML: <tool_call><function=NAME><parameter=KEY>raw value</parameter></function></tool_call>.

How broken or ambiguous output is read:

* A call begins where its header is complete and what follows can be its body; without <tool_call> only a known tool's
  name counts. Everything else is content. A lost `>` after a name is forgiven.
* `</parameter>` ends a value only if a parameter, the end of the function or of the call, or another call follows: a
  value may hold the tag itself. Without `</parameter>` a value ends at `</function>` or `</tool_call>` if nothing but
  another call follows, or at a line that opens another parameter the tool declares and has not got yet.
* A whole call inside a value is text of the value; then only tags that end the message can end the value.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from qcn_compile.runtime.parsing.arguments import ArgumentWriter
from qcn_compile.runtime.parsing.scanning import BLANKS, SPACES, TEXT_ENDS, Tag, Undecided, literal
from qcn_compile.runtime.parsing.schema import ToolSchemas
from qcn_compile.runtime.parsing.tool_scanner import CALL_CLOSE, CALL_OPEN, ToolScanner

_WORD = re.compile(r"[^\s<]+")
_FUNCTION_NAME = r"([^\s<>]{1,128})"
_PARAMETER_NAME = r"([^<>\n]{1,128})"
_CALL_OPEN = literal(CALL_OPEN)
_CALL_CLOSE = literal(CALL_CLOSE)
_FUNCTION_CLOSE = literal("</function>")
_PARAMETER_CLOSE = literal("</parameter>")
_FUNCTION_OPEN = ["<", BLANKS, *literal("function"), BLANKS, "=", BLANKS]
_PARAMETER_OPEN = ["<", BLANKS, *literal("parameter"), BLANKS, "="]
_BEFORE_FUNCTION: tuple[list[str], ...] = ([], [*_CALL_OPEN, SPACES], [*_CALL_OPEN, SPACES, *_CALL_OPEN, SPACES])

HEADER = Tag(
    heads=[[*before, *_FUNCTION_OPEN, _FUNCTION_NAME, BLANKS, ">"] for before in _BEFORE_FUNCTION],
    tails=[[SPACES, *body] for body in (_PARAMETER_OPEN, _FUNCTION_CLOSE, _CALL_CLOSE)],
)
BROKEN_HEADER = Tag([[*before, *_FUNCTION_OPEN, _FUNCTION_NAME, BLANKS, "\n", SPACES, *_PARAMETER_OPEN]
                     for before in _BEFORE_FUNCTION])
PARAMETER = Tag([[*_PARAMETER_OPEN, _PARAMETER_NAME, "[>\n]"]])
FUNCTION_END = Tag([_FUNCTION_CLOSE])
CALL_END = Tag([_CALL_CLOSE])

_ANOTHER_CALL = (_CALL_OPEN, _FUNCTION_OPEN, [TEXT_ENDS])
PARAMETER_END = Tag([_PARAMETER_CLOSE], [[SPACES, *after] for after in (
    _PARAMETER_OPEN, _FUNCTION_CLOSE, _CALL_CLOSE, _CALL_OPEN, _FUNCTION_OPEN)])
VALUE_ENDS = (
    PARAMETER_END,
    Tag([_FUNCTION_CLOSE], [[SPACES, *closing, *after] for closing in ([], [*_CALL_CLOSE, SPACES])
                            for after in _ANOTHER_CALL]),
    Tag([_CALL_CLOSE], [[SPACES, *after] for after in _ANOTHER_CALL]),
)
NEXT_PARAMETER = Tag([[*literal("<parameter="), _PARAMETER_NAME, ">", "\n"]])

NESTED_CALL = Tag([[*literal("<tool_call>\n<function="), _FUNCTION_NAME, ">", "\n"]])
_MESSAGE_ENDS = [*_CALL_CLOSE, SPACES, TEXT_ENDS]
ENDS_AFTER_NESTED = (
    Tag([_PARAMETER_CLOSE], [[SPACES, *_FUNCTION_CLOSE, SPACES, *_MESSAGE_ENDS]]),
    Tag([_FUNCTION_CLOSE], [[SPACES, *_MESSAGE_ENDS]]),
    Tag([_CALL_CLOSE], [[SPACES, TEXT_ENDS]]),
)


def _name(found: re.Match[str]) -> str:
    """The name in a tag, without the blanks and quotes that models put around it."""
    return found[found.lastindex or 0].strip().strip("\"'")


class Qwen3CoderParser(ToolScanner):
    """Incremental parser of one message."""

    def __init__(self, tools: ToolSchemas, new_id: Callable[[], str]) -> None:
        super().__init__(new_id)
        self._tools = tools
        self._state = self._content
        self._tool = ""
        self._arguments = ArgumentWriter(self._argue)
        self._value_begins = False  # the newline after <parameter=...> may follow
        self._value_empty = True
        self._nested = 0

    def _step(self) -> None:
        self._state()

    def _end(self) -> None:
        if self._state == self._value:
            self._arguments.close()
        if self._state != self._content:
            self._close_call(complete=False)
        super()._end()

    def _open_call(self) -> bool:
        header = self._header()
        if header is None:
            return False
        self._tool, self._position = header
        self._start_call(self._tool)
        self._arguments = ArgumentWriter(self._argue)
        self._state = self._body
        return True

    def _header(self) -> tuple[str, int] | None:
        """The function's name and where its body begins."""
        if found := self._match(HEADER):
            name = _name(found)
            wrapped = found[0].startswith(CALL_OPEN) or self._block_open or not self._tools
            return (name, found.end()) if name in self._tools or (name and wrapped) else None
        if found := self._match(BROKEN_HEADER):
            name = _name(found)
            return (name, found.end(found.lastindex or 0)) if name in self._tools else None
        return None

    def _body(self) -> None:
        """Between the parameters of a call."""
        if spaces := self._take_spaces():
            self._spaces.append(spaces)
        elif junk := _WORD.match(self._text, self._position):
            self._position = junk.end()
            self._say(junk[0])
        elif found := self._match(PARAMETER):
            self._open_parameter(found)
        elif found := self._match(FUNCTION_END):
            self._position = found.end()
            self._close_call(complete=True)
        elif self._match(CALL_END) or self._header():
            self._close_call(complete=True)
        elif self._final and any(tag.begins(self._text, self._position) for tag in (PARAMETER, FUNCTION_END, CALL_END)):
            self._position = len(self._text)
        else:
            self._position += 1
            self._say("<")

    def _close_call(self, complete: bool) -> None:
        self._arguments.finish()
        self._finish_call(complete)
        self._state = self._content

    def _open_parameter(self, found: re.Match[str]) -> None:
        name = _name(found)
        if not name:
            self._position = found.end()
            self._say(found[0])
            return
        self._position = found.end() - (found[0][-1] == "\n")
        self._spaces.clear()
        self._arguments.open(name, self._tools.types(self._tool, name))
        self._value_begins = self._value_empty = True
        self._nested = 0
        self._state = self._value

    def _value(self) -> None:
        """Inside a value. A newline is kept back until it is known not to belong to the closing tag."""
        text, start = self._text, self._position
        if self._value_begins:
            self._value_begins = False
            self._position += text[start] == "\n"
            return
        tag = text.find("<", start)
        stop = len(text) if tag < 0 else tag
        if stop > start and text[stop - 1] == "\n":
            stop -= 1
        if stop > start:
            self._write(stop)
        elif tag >= 0:
            self._value_tag(tag)
        elif self._final:
            self._position = len(text)
        else:
            raise Undecided

    def _value_tag(self, tag: int) -> None:
        """At a `<` in a value: its end, or part of it."""
        if self._value_ends(tag):
            closed = self._text.startswith("</parameter>", tag)
            self._position = tag + (len("</parameter>") if closed else 0)
            self._arguments.close()
            self._state = self._body
        elif found := self._match(NESTED_CALL, tag):
            self._nested += 1
            self._write(found.end() - 1)
        elif self._nested and self._match(CALL_END, tag):
            self._nested -= 1
            self._write(tag + len(CALL_CLOSE))
        else:
            self._write(tag + 1)

    def _value_ends(self, tag: int) -> bool:
        if self._nested:
            return any(self._match(end, tag) for end in ENDS_AFTER_NESTED)
        if any(self._match(end, tag) for end in VALUE_ENDS):
            return True
        if not self._value_empty and tag == self._position:
            return False  # not at the start of a line
        found = self._match(NEXT_PARAMETER, tag)
        return found is not None and self._expects(_name(found))

    def _expects(self, parameter: str) -> bool:
        return parameter not in self._arguments.names and self._tools.declares(self._tool, parameter)

    def _write(self, stop: int) -> None:
        """The value up to `stop`."""
        self._arguments.text(self._text[self._position:stop])
        self._position = stop
        self._value_empty = False
