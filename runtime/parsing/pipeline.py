"""Reasoning parser and tool call parser in a row, and the message that their events make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from qcn_compile.runtime.parsing.events import (
    Content,
    Event,
    Reasoning,
    ToolCallArguments,
    ToolCallFinished,
    ToolCallStarted,
)
from qcn_compile.runtime.parsing.scanning import Scanner


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is the text of a JSON object. `complete` is False where the model stopped inside the call."""

    id: str
    name: str
    arguments: str
    complete: bool = True


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """What the model said, by kind; None where it said nothing of the kind."""

    content: str | None
    reasoning: str | None
    tool_calls: list[ToolCall] = field(default_factory=list)


class OutputParser:
    """Parses one message. Either part may be left out; with neither, all text is content."""

    def __init__(self, reasoning: Scanner | None = None, tools: Scanner | None = None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    def feed(self, text: str) -> list[Event]:
        """Events that this text makes certain."""
        if self._reasoning is None:
            return self._feed_tools(text)
        return self._forward(self._reasoning.feed(text))

    def finish(self) -> list[Event]:
        """The rest, once the model has stopped."""
        events = self._forward(self._reasoning.finish()) if self._reasoning is not None else []
        return events + (self._tools.finish() if self._tools is not None else [])

    def _forward(self, events: Iterable[Event]) -> list[Event]:
        forwarded: list[Event] = []
        for event in events:
            forwarded.extend(self._feed_tools(event.text) if isinstance(event, Content) else [event])
        return forwarded

    def _feed_tools(self, text: str) -> list[Event]:
        if self._tools is not None:
            return self._tools.feed(text)
        return [Content(text)] if text else []


def collect(events: Iterable[Event]) -> ParsedMessage:
    """The whole message. A response that is not streamed is exactly this of the streamed one."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[_Call] = []
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case ToolCallStarted(_, id, name):
                calls.append(_Call(id, name))
            case ToolCallArguments(index, text):
                calls[index].arguments.append(text)
            case ToolCallFinished(index, complete):
                calls[index].complete = complete
    return ParsedMessage("".join(content) or None, "".join(reasoning) or None, [call.freeze() for call in calls])


@dataclass
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)
    complete: bool = False

    def freeze(self) -> ToolCall:
        return ToolCall(self.id, self.name, "".join(self.arguments), self.complete)
