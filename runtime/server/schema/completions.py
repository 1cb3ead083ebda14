"""/v1/completions, request and reply."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from qcn_compile.runtime.server.schema.common import (
    Guided,
    MaxTokens,
    ResponseFormat,
    Sampling,
    StreamOptions,
    UsageReply,
)


class CompletionRequest(Sampling, Guided):
    model: str | None = None
    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    max_tokens: MaxTokens | None = Field(default=None, description="default 16")
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageReply
