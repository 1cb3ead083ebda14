"""/v1/responses, request and reply."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from qcn_compile.runtime.server.schema.common import Body, JsonObject, MaxTokens


class InputPart(Body):
    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(Body):
    """An item of any type; which fields count depends on the type. Without one it is a message."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None
    id: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class ResponsesTool(Body):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class ResponsesToolChoice(Body):
    type: str
    name: str | None = None


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(Body):
    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(Body):
    model: str | None = None
    input: str | list[InputItem]
    instructions: str | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    stream: bool | None = None
    store: bool | None = Field(default=None, description="answers are never stored")
    metadata: dict[str, str] | None = None
    previous_response_id: str | None = Field(default=None, description="not supported: send the whole conversation")
    conversation: Any | None = Field(default=None, description="not supported: send the whole conversation")
    background: bool | None = Field(default=None, description="not supported")
    truncation: Literal["auto", "disabled"] | None = None


class ResponsesReply(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
