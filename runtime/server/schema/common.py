"""Fields that several APIs share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

JsonObject = dict[str, Any]
MaxTokens = Annotated[int, Field(ge=1)]


class Body(BaseModel):
    """A request: unknown fields are ignored, as clients send fields of other servers."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Sampling(Body):
    """How to choose tokens; what is left out is the model's own default."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, description="the k likeliest tokens; 0 or -1 is all")
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: int | None = Field(default=None, ge=1, le=128)


class StreamOptions(Body):
    include_usage: bool | None = None


class Guided(Body):
    """vLLM's and SGLang's names for grammars."""

    regex: str | None = None
    ebnf: str | None = Field(default=None, description="a grammar in Lark syntax")
    json_schema: str | JsonObject | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_json: str | JsonObject | None = None


class JsonSchema(Body):
    name: str = "schema"
    description: str | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    pattern: str | None = Field(default=None, description="with type regex")
    grammar: str | None = Field(default=None, description="with type grammar: Lark syntax")


class PromptDetails(BaseModel):
    cached_tokens: int = 0


class CompletionDetails(BaseModel):
    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class UsageReply(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorDetail
