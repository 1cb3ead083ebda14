"""What a parser says while the model writes: pieces of content, of reasoning and of tool calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the thinking before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """A call whose name is known. `index` counts the calls of one message from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next piece of a call's arguments; all pieces joined are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallFinished:
    """No more arguments. `complete` is False where the model stopped, or broke the syntax, inside the call."""

    index: int
    complete: bool


Event = Content | Reasoning | ToolCallStarted | ToolCallArguments | ToolCallFinished


class EventList:
    """Events of one feed, neighbours of one kind joined."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._texts: list[str] = []
        self._open: Content | Reasoning | ToolCallArguments | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, ToolCallStarted | ToolCallFinished):
            self._close()
            self._events.append(event)
            return
        if not event.text:
            return
        if self._open is None or type(event) is not type(self._open):
            self._close()
            self._open = event
        self._texts.append(event.text)

    def take(self) -> list[Event]:
        """The events since the last take."""
        self._close()
        events, self._events = self._events, []
        return events

    def _close(self) -> None:
        if self._open is None:
            return
        text = "".join(self._texts)
        if isinstance(self._open, ToolCallArguments):
            self._events.append(ToolCallArguments(self._open.index, text))
        else:
            self._events.append(type(self._open)(text))
        self._texts, self._open = [], None
