"""/v1/chat/completions, request and reply."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from qcn_compile.runtime.server.schema.common import (
    Body,
    Guided,
    JsonObject,
    MaxTokens,
    ResponseFormat,
    Sampling,
    StreamOptions,
    UsageReply,
)


class ContentPart(Body):
    """A part of a message; only parts of text can be read."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Body):
    name: str
    arguments: str | JsonObject | None = Field(default=None, description="a JSON object, written out or as it is")


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(Body):
    name: str
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: FunctionName


class ChatRequest(Sampling, Guided):
    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    chat_template_kwargs: JsonObject | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    separate_reasoning: bool | None = None
    modalities: list[str] | None = None
    functions: list[Any] | None = Field(default=None, description="not supported: use tools")
    function_call: Any | None = Field(default=None, description="not supported: use tool_choice")


class FunctionCallReply(BaseModel):
    name: str
    arguments: str


class ToolCallReply(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCallReply


class MessageReply(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallReply] | None = None


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class PlacedLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class LogprobsReply(BaseModel):
    content: list[PlacedLogprob]


class ChoiceReply(BaseModel):
    index: int
    message: MessageReply
    logprobs: LogprobsReply | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChoiceReply]
    usage: UsageReply
