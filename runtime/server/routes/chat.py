"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qcn_compile.runtime.parsing.events import Content, Event, Reasoning, ToolCallArguments, ToolCallStarted
from qcn_compile.runtime.server.chat_job import chat_job
from qcn_compile.runtime.server.endpoint import Endpoint, read
from qcn_compile.runtime.server.errors import ApiError
from qcn_compile.runtime.server.generation import Answer, Delta, Generation
from qcn_compile.runtime.server.replies import chat_logprobs, new_id, now, usage_reply
from qcn_compile.runtime.server.schema.chat import ChatReply, ChatRequest
from qcn_compile.runtime.server.service import Service
from qcn_compile.runtime.server.sse import DONE, EventStream, TextEvent, event, while_connected


async def chat_completions(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    body = await read(service, request, ChatRequest)
    model = service.check_model(body.model)
    generation = service.generate(await chat_job(service, body))
    if body.stream:
        return EventStream(_Chunks(service, body, model).events(generation), generation.close)
    answers = await while_connected(request, generation.answers(), generation.close)
    service.metrics.add_cached(generation.usage.cached)
    choices = [_choice(service, place, answer, bool(body.logprobs)) for place, answer in enumerate(answers)]
    return JSONResponse({"id": new_id("chatcmpl-"), "object": "chat.completion", "created": now(), "model": model,
                         "choices": choices, "usage": usage_reply(generation.usage)})


def _choice(service: Service, index: int, answer: Answer, logprobs: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.calls:
        message["content"] = answer.content or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls]
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    return {"index": index, "message": message, "finish_reason": answer.finish_reason,
            "logprobs": {"content": chat_logprobs(service.tokenizer, answer.samples)} if logprobs else None}


_TEXTS = {Content: "content", Reasoning: "reasoning_content"}


class _Chunks:
    """The events of one streamed chat."""

    def __init__(self, service: Service, body: ChatRequest, model: str) -> None:
        self._service, self._body = service, body
        self._head = {"id": new_id("chatcmpl-"), "object": "chat.completion.chunk", "created": now(), "model": model}
        self._with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._choices = range(body.n or 1)
        self._plain = {(index, kind): TextEvent(self._data([_delta_choice(index, {name: TextEvent.TEXT}, None, None)]))
                       for index in self._choices for kind, name in _TEXTS.items()}

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        for index in self._choices:
            yield self._chunk([_delta_choice(index, {"role": "assistant", "content": ""}, None, None)])
        try:
            async for delta in generation.deltas():
                if (plain := self._plain_chunk(delta)) is not None:
                    yield plain
                    continue
                for choice in self._delta(delta):  # one a chunk: clients read the first choice alone
                    yield self._chunk([choice])
        except ApiError as error:
            yield event(error.openai())
            yield DONE
            return
        self._service.metrics.add_cached(generation.usage.cached)
        if self._with_usage:
            yield event({**self._head, "choices": [], "usage": usage_reply(generation.usage)})
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        return event(self._data(choices))

    def _data(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "choices": choices, **({"usage": None} if self._with_usage else {})}

    def _plain_chunk(self, delta: Delta) -> bytes | None:
        """The chunk of a delta that is one piece of text, as nearly all are; None for others."""
        if len(delta.events) != 1 or delta.finish_reason is not None or self._body.logprobs:
            return None
        item = delta.events[0]
        made = self._plain.get((delta.index, type(item)))
        return None if made is None else made(item.text)  # type: ignore[union-attr]

    def _delta(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """One choice for each kind of text in turn, the finish reason in the last."""
        pieces = list(delta_fields(delta.events))
        logprobs = None
        if self._body.logprobs and delta.samples:
            logprobs = {"content": chat_logprobs(self._service.tokenizer, delta.samples)}
        if not pieces and (delta.finish_reason is not None or logprobs is not None):
            pieces = [{}]
        for place, fields in enumerate(pieces):
            last = place == len(pieces) - 1
            yield _delta_choice(delta.index, fields, logprobs if place == 0 else None,
                                delta.finish_reason if last else None)


def _delta_choice(index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def delta_fields(events: Iterable[Event]) -> Iterable[dict[str, Any]]:
    """Each event as the fields of a delta."""
    for item in events:
        match item:
            case Content(text):
                yield {"content": text}
            case Reasoning(text):
                yield {"reasoning_content": text}
            case ToolCallStarted(index, id, name):
                function = {"name": name, "arguments": ""}
                yield {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
            case ToolCallArguments(index, text):
                yield {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


ENDPOINTS = (Endpoint("POST", "/v1/chat/completions", chat_completions, "Answer a conversation", ChatRequest, ChatReply,
                      streams=True),)
