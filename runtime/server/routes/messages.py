"""Anthropic's /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qcn_compile.runtime.parsing.events import Content, Event, Reasoning, ToolCallArguments, ToolCallStarted
from qcn_compile.runtime.server.chat_job import chat_job, chat_prompt
from qcn_compile.runtime.server.endpoint import Endpoint, read
from qcn_compile.runtime.server.errors import ApiError
from qcn_compile.runtime.server.from_anthropic import chat_request
from qcn_compile.runtime.server.generation import Answer, Generation, Usage
from qcn_compile.runtime.server.replies import new_id
from qcn_compile.runtime.server.schema.messages import CountReply, CountRequest, MessagesReply, MessagesRequest
from qcn_compile.runtime.server.service import Service
from qcn_compile.runtime.server.sse import EventStream, event, while_connected


async def messages(service: Service, request: Request) -> Response:
    """Answer a conversation, as Anthropic's API does."""
    body = await read(service, request, MessagesRequest)
    model = service.check_model(body.model)
    generation = service.generate(await chat_job(service, chat_request(body)))
    if body.stream:
        return EventStream(_Blocks(service, model).events(generation), generation.close)
    answer = (await while_connected(request, generation.answers(), generation.close))[0]
    service.metrics.add_cached(generation.usage.cached)
    reply = _message(model, _content(answer), generation.usage)
    return JSONResponse({**reply, **_stop(answer.finish_reason, answer.matched_stop)})


async def count_tokens(service: Service, request: Request) -> Response:
    """How many tokens a conversation has."""
    body = await read(service, request, CountRequest)
    service.check_model(body.model)
    chat = chat_request(body)
    text = await chat_prompt(service, chat, None if chat.tool_choice == "none" else chat.tools)
    return JSONResponse({"input_tokens": len(await service.encode(text))})


def _message(model: str, content: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    return {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model, "content": content,
            "stop_reason": None, "stop_sequence": None, "usage": _usage(usage)}


def _usage(usage: Usage) -> dict[str, int]:
    return {"input_tokens": usage.prompt - usage.cached, "output_tokens": usage.completion,
            "cache_read_input_tokens": usage.cached, "cache_creation_input_tokens": 0}


def _stop(finish_reason: str, matched: str | None) -> dict[str, str | None]:
    names = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
    return {"stop_reason": "stop_sequence" if matched is not None else names[finish_reason], "stop_sequence": matched}


def _content(answer: Answer) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.content or not answer.calls:
        blocks.append({"type": "text", "text": answer.content})
    for call in answer.calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)})
    return blocks


def _input(arguments: str) -> Any:
    """A call's arguments as an object; a call cut off by max_tokens may hold none."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return {}


class _Blocks:
    """The events of one streamed answer: one block open at a time."""

    def __init__(self, service: Service, model: str) -> None:
        self._service, self._model = service, model
        self._index = -1
        self._open: type[Event] | None = None

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        start = _message(self._model, [], generation.usage)
        yield event({"type": "message_start", "message": start}, "message_start")
        yield event({"type": "ping"}, "ping")
        reason, matched = "stop", None
        try:
            async for delta in generation.deltas():
                for item in delta.events:
                    for chunk in self._event(item):
                        yield chunk
                reason, matched = delta.finish_reason or reason, delta.matched_stop
        except ApiError as error:
            yield event(error.anthropic(), "error")
            return
        for chunk in self._last(reason, matched, generation.usage):
            yield chunk

    def _last(self, reason: str, matched: str | None, usage: Usage) -> list[bytes]:
        self._service.metrics.add_cached(usage.cached)
        chunks = [] if self._index >= 0 else self._begin(Content, {"type": "text", "text": ""})
        chunks += self._end()
        delta = {"type": "message_delta", "delta": _stop(reason, matched), "usage": _usage(usage)}
        return [*chunks, event(delta, "message_delta"), event({"type": "message_stop"}, "message_stop")]

    def _event(self, item: Event) -> list[bytes]:
        match item:
            case Content(text):
                return self._text(Content, {"type": "text", "text": ""}, {"type": "text_delta", "text": text})
            case Reasoning(text):
                return self._text(Reasoning, {"type": "thinking", "thinking": "", "signature": ""},
                                  {"type": "thinking_delta", "thinking": text})
            case ToolCallStarted(_, id, name):
                block: dict[str, Any] = {"type": "tool_use", "id": id, "name": name, "input": {}}
                return self._end() + self._begin(ToolCallStarted, block)
            case ToolCallArguments(_, text):
                return [self._delta({"type": "input_json_delta", "partial_json": text})]
        return []

    def _text(self, kind: type[Event], block: dict[str, Any], delta: dict[str, Any]) -> list[bytes]:
        chunks = [] if self._open is kind else self._end() + self._begin(kind, block)
        return [*chunks, self._delta(delta)]

    def _begin(self, kind: type[Event], block: dict[str, Any]) -> list[bytes]:
        self._index += 1
        self._open = kind
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return [event(start, "content_block_start")]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return event({"type": "content_block_delta", "index": self._index, "delta": delta}, "content_block_delta")

    def _end(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open = None
        return [event({"type": "content_block_stop", "index": self._index}, "content_block_stop")]


ENDPOINTS = (
    Endpoint("POST", "/v1/messages", messages, "Answer a conversation (Anthropic)", MessagesRequest, MessagesReply,
             streams=True),
    Endpoint("POST", "/v1/messages/count_tokens", count_tokens, "Count the tokens of a conversation (Anthropic)",
             CountRequest, CountReply),
)
