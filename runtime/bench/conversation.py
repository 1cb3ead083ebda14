"""A conversation that grows as an agent's does, as bodies of /v1/chat/completions or /v1/completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TOOLS = [{"type": "function", "function": {
    "name": name, "description": text, "parameters": {"type": "object", "properties": properties,
                                                      "required": list(properties)}}}
    for name, text, properties in (
        ("read_file", "Read a file", {"path": {"type": "string"}}),
        ("run", "Run a command", {"command": {"type": "string"}}),
        ("edit_file", "Replace text in a file", {"path": {"type": "string"}, "old": {"type": "string"},
                                                 "new": {"type": "string"}}))]


@dataclass
class Reply:
    """What came back, as far as the next turn needs it."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, delta: dict[str, Any]) -> bool:
        """Take a delta in; whether it held anything."""
        content, reasoning = delta.get("content") or "", delta.get("reasoning_content") or ""
        calls = delta.get("tool_calls") or []
        self.content += content
        self.reasoning += reasoning
        for call in calls:
            self._add_call(call)
        return bool(content or reasoning or calls)

    def _add_call(self, call: dict[str, Any]) -> None:
        place, function = call.get("index", 0), call.get("function") or {}
        while len(self.calls) <= place:
            self.calls.append({"id": f"call_{len(self.calls)}", "type": "function",
                               "function": {"name": "", "arguments": ""}})
        held = self.calls[place]
        held["id"] = call.get("id") or held["id"]
        held["function"]["name"] += function.get("name") or ""
        held["function"]["arguments"] += function.get("arguments") or ""


class Chat:
    """Messages. After an answer with tool calls the next text comes as their results."""

    path = "/v1/chat/completions"

    def __init__(self, tools: bool) -> None:
        self._fields = {"tools": TOOLS} if tools else {}
        self._messages: list[dict[str, Any]] = []
        self._calls: list[str] = []

    def ask(self, text: str) -> dict[str, Any]:
        """The body's fields with this text as the newest message."""
        if self._calls:
            first, *others = self._calls
            self._messages.append({"role": "tool", "tool_call_id": first, "content": text})
            self._messages += [{"role": "tool", "tool_call_id": name, "content": "ok"} for name in others]
        else:
            self._messages.append({"role": "user", "content": text})
        return {"messages": self._messages, **self._fields}

    def answered(self, reply: Reply) -> None:
        """Keep the answer as the server gave it."""
        message: dict[str, Any] = {"role": "assistant", "content": reply.content}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.calls:
            message["tool_calls"] = reply.calls
        self._messages.append(message)
        self._calls = [call["id"] for call in reply.calls]

    @staticmethod
    def read(choice: dict[str, Any], reply: Reply) -> bool:
        return reply.add(choice.get("delta") or {})


class Plain:
    """One text that grows."""

    path = "/v1/completions"

    def __init__(self) -> None:
        self._text = ""

    def ask(self, text: str) -> dict[str, Any]:
        self._text += text
        return {"prompt": self._text}

    def answered(self, reply: Reply) -> None:
        self._text += reply.content + "\n"

    @staticmethod
    def read(choice: dict[str, Any], reply: Reply) -> bool:
        return reply.add({"content": choice.get("text")})
