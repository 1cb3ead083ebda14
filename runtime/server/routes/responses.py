"""/v1/responses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qcn_compile.runtime.parsing.events import Content, Event, Reasoning, ToolCallArguments, ToolCallStarted
from qcn_compile.runtime.server.chat_job import chat_job
from qcn_compile.runtime.server.endpoint import Endpoint, read
from qcn_compile.runtime.server.errors import ApiError
from qcn_compile.runtime.server.from_responses import chat_request
from qcn_compile.runtime.server.generation import Answer, Delta, Generation, Usage
from qcn_compile.runtime.server.replies import chat_logprobs, new_id, now
from qcn_compile.runtime.server.schema.responses import ResponsesReply, ResponsesRequest
from qcn_compile.runtime.server.service import Service
from qcn_compile.runtime.server.sse import EventStream, event, while_connected

JsonObject = dict[str, Any]
_REPEATED = {"instructions", "temperature", "top_p", "max_output_tokens", "top_logprobs", "reasoning", "tools",
             "tool_choice", "metadata"}


async def responses(service: Service, request: Request) -> Response:
    """Answer a conversation, in OpenAI's newer API."""
    body = await read(service, request, ResponsesRequest)
    reply = _reply(body, service.check_model(body.model))
    generation = service.generate(await chat_job(service, chat_request(body), "input"))
    if body.stream:
        return EventStream(_Items(service, body, reply).events(generation), generation.close)
    answer = (await while_connected(request, generation.answers(), generation.close))[0]
    service.metrics.add_cached(generation.usage.cached)
    logprobs = None if body.top_logprobs is None else chat_logprobs(service.tokenizer, answer.samples)
    return JSONResponse(_ended(reply, _output(answer, logprobs or []), answer.finish_reason, generation.usage))


def _reply(body: ResponsesRequest, model: str) -> JsonObject:
    """The response before anything was said."""
    given = body.model_dump(exclude_none=True, include=_REPEATED)
    defaults: JsonObject = {"instructions": None, "temperature": None, "top_p": None, "max_output_tokens": None,
                            "tools": [], "tool_choice": "auto", "metadata": {},
                            "reasoning": {"effort": None, "summary": None}}
    return {"id": new_id("resp_"), "object": "response", "created_at": now(), "status": "in_progress", "model": model,
            "output": [], "usage": None, "error": None, "incomplete_details": None, "previous_response_id": None,
            "parallel_tool_calls": body.parallel_tool_calls is not False, "store": False, "truncation": "disabled",
            "text": {"format": {"type": "text"}} if body.text is None else body.text.model_dump(
                by_alias=True, exclude_none=True), **defaults, **given}


def _ended(reply: JsonObject, output: list[JsonObject], finish_reason: str, usage: Usage) -> JsonObject:
    cut = finish_reason == "length"
    return {**reply, "status": "incomplete" if cut else "completed", "output": output,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {"input_tokens": usage.prompt, "output_tokens": usage.completion,
                      "total_tokens": usage.prompt + usage.completion,
                      "input_tokens_details": {"cached_tokens": usage.cached},
                      "output_tokens_details": {"reasoning_tokens": usage.reasoning}}}


def _output(answer: Answer, logprobs: list[JsonObject]) -> list[JsonObject]:
    items = []
    if answer.reasoning:
        items.append(_reasoning(new_id("rs_"), answer.reasoning))
    if answer.content or not answer.calls:
        items.append(_message(new_id("msg_"), answer.content, "completed", logprobs))
    items += [_call(new_id("fc_"), call.id, call.name, call.arguments, "completed") for call in answer.calls]
    return items


def _reasoning(id: str, text: str) -> JsonObject:
    return {"id": id, "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def _part(text: str, logprobs: list[JsonObject]) -> JsonObject:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _message(id: str, text: str | None, status: str, logprobs: list[JsonObject]) -> JsonObject:
    return {"id": id, "type": "message", "role": "assistant", "status": status,
            "content": [] if text is None else [_part(text, logprobs)]}


def _call(id: str, call_id: str, name: str, arguments: str, status: str) -> JsonObject:
    return {"id": id, "type": "function_call", "call_id": call_id, "name": name, "arguments": arguments,
            "status": status}


class _Items:
    """The events of one streamed response: one item open at a time, each event numbered."""

    def __init__(self, service: Service, body: ResponsesRequest, reply: JsonObject) -> None:
        self._service, self._body, self._reply = service, body, reply
        self._number = 0
        self._done: list[JsonObject] = []
        self._kind: type[Event] | None = None
        self._item: JsonObject = {}
        self._text = ""
        self._logprobs: list[JsonObject] = []

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        yield self._event("response.created", response=self._reply)
        yield self._event("response.in_progress", response=self._reply)
        reason = "stop"
        try:
            async for delta in generation.deltas():
                for chunk in self._delta(delta):
                    yield chunk
                reason = delta.finish_reason or reason
        except ApiError as error:
            failed = {**self._reply, "status": "failed", "output": self._done,
                      "error": {"code": "server_error", "message": error.message}}
            yield self._event("response.failed", response=failed)
            return
        if not self._done and self._kind is None:
            for chunk in self._begin(Content, _message(new_id("msg_"), None, "in_progress", [])):
                yield chunk
        for chunk in self._end():
            yield chunk
        whole = _ended(self._reply, self._done, reason, generation.usage)
        self._service.metrics.add_cached(generation.usage.cached)
        yield self._event("response.incomplete" if reason == "length" else "response.completed", response=whole)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event(data, kind)

    def _delta(self, delta: Delta) -> Iterator[bytes]:
        fresh = [] if self._body.top_logprobs is None else chat_logprobs(self._service.tokenizer, delta.samples)
        for item in delta.events:
            match item:
                case Content(text):
                    if self._kind is not Content:
                        yield from self._begin(Content, _message(new_id("msg_"), None, "in_progress", []))
                    self._logprobs += fresh
                    yield self._add("response.output_text.delta", text, content_index=0, logprobs=fresh)
                    fresh = []
                case Reasoning(text):
                    if self._kind is not Reasoning:
                        yield from self._begin(Reasoning, {"id": new_id("rs_"), "type": "reasoning", "summary": [],
                                                           "content": []})
                    yield self._add("response.reasoning_text.delta", text, content_index=0)
                case ToolCallStarted(_, id, name):
                    yield from self._begin(ToolCallStarted, _call(new_id("fc_"), id, name, "", "in_progress"))
                case ToolCallArguments(_, text):
                    yield self._add("response.function_call_arguments.delta", text)

    def _add(self, kind: str, text: str, **fields: Any) -> bytes:
        self._text += text
        return self._event(kind, item_id=self._item["id"], output_index=len(self._done), delta=text, **fields)

    def _begin(self, kind: type[Event], item: JsonObject) -> Iterator[bytes]:
        yield from self._end()
        self._kind, self._item, self._text, self._logprobs = kind, item, "", []
        yield self._event("response.output_item.added", output_index=len(self._done), item=item)
        if kind is Content:
            yield self._event("response.content_part.added", item_id=item["id"], output_index=len(self._done),
                              content_index=0, part=_part("", []))

    def _end(self) -> Iterator[bytes]:
        """Close the item that is open."""
        if self._kind is None:
            return
        place, id, text = {"output_index": len(self._done)}, self._item["id"], self._text
        if self._kind is Content:
            done = _message(id, text, "completed", self._logprobs)
            yield self._event("response.output_text.done", item_id=id, **place, content_index=0, text=text,
                              logprobs=self._logprobs)
            yield self._event("response.content_part.done", item_id=id, **place, content_index=0,
                              part=_part(text, self._logprobs))
        elif self._kind is Reasoning:
            done = _reasoning(id, text)
            yield self._event("response.reasoning_text.done", item_id=id, **place, content_index=0, text=text)
        else:
            done = {**self._item, "arguments": text, "status": "completed"}
            yield self._event("response.function_call_arguments.done", item_id=id, **place, name=done["name"],
                              arguments=text)
        yield self._event("response.output_item.done", **place, item=done)
        self._done.append(done)
        self._kind = None


ENDPOINTS = (Endpoint("POST", "/v1/responses", responses, "Answer a conversation (Responses API)", ResponsesRequest,
                      ResponsesReply, streams=True),)
