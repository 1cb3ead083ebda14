"""The small endpoints: models, tokens, health and state."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from qcn_compile.runtime.server.schema.chat import Message, Tool
from qcn_compile.runtime.server.schema.common import Body, JsonObject


class TokenizeRequest(Body):
    """A text in `prompt` (or `text`), or `messages` as in a chat."""

    model: str | None = None
    prompt: str | None = None
    text: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: JsonObject | None = None


class TokenizeReply(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]


class DetokenizeReply(BaseModel):
    prompt: str
    text: str


class ModelReply(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qcn-compile"
    max_model_len: int


class ModelsReply(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelReply]


class HealthReply(BaseModel):
    status: Literal["ok", "draining", "failed"]


class StateReply(BaseModel):
    """Live numbers for the page at /; rates are over the last seconds."""

    model: str
    status: str
    uptime: float
    running: int
    queued: int
    slots: int
    kv_pages_used: int
    kv_pages: int
    context_length: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    tokens_per_second: float
    requests: int
