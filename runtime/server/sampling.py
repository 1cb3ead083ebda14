"""A request's sampling fields, checked against the limits and the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcn_compile.errors import UsageError
from qcn_compile.runtime.request import SamplingParams
from qcn_compile.runtime.server.config import Limits
from qcn_compile.runtime.server.errors import bad_request
from qcn_compile.runtime.server.schema.common import Sampling

_SAME = ("temperature", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "ignore_eos")


def sampling_params(body: Sampling, defaults: Mapping[str, Any], vocab_size: int, limits: Limits,
                    max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """How to sample: the request's fields over the model's own defaults."""
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if body.top_p is not None:
        given["top_p"] = max(body.top_p, 1e-6)
    if body.top_k is not None:
        given["top_k"] = max(body.top_k, 0)
    if body.seed is not None:
        given["seed"] = body.seed % 2**64
    if body.n is not None and body.n > limits.choices:
        raise bad_request(f"n: at most {limits.choices}", "n")
    try:
        return SamplingParams(**{**defaults, **given}, max_tokens=max_tokens, logprobs=logprobs,
                              stop=stops(body.stop, limits, "stop"), include_stop=bool(body.include_stop_str_in_output),
                              stop_token_ids=_token_ids(body.stop_token_ids, vocab_size, limits),
                              logit_bias=_bias(body.logit_bias, vocab_size, limits))
    except UsageError as error:
        raise bad_request(str(error)) from None


def stops(given: str | list[str] | None, limits: Limits, param: str) -> tuple[str, ...]:
    """Stop strings; empty ones and too many are refused."""
    texts = [given] if isinstance(given, str) else given or []
    if len(texts) > limits.stops:
        raise bad_request(f"{param}: {len(texts)} stop strings, at most {limits.stops}", param)
    for place, text in enumerate(texts):
        if not 0 < len(text) <= limits.stop_characters:
            where = param if isinstance(given, str) else f"{param}[{place}]"
            raise bad_request(f"{where}: must have 1 to {limits.stop_characters} characters", where)
    return tuple(texts)


def _token_ids(given: list[int] | None, vocab_size: int, limits: Limits) -> tuple[int, ...]:
    ids = given or []
    if len(ids) > limits.stops:
        raise bad_request(f"stop_token_ids: {len(ids)} tokens, at most {limits.stops}", "stop_token_ids")
    for place, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise bad_request(f"stop_token_ids[{place}]: no token of this model", f"stop_token_ids[{place}]")
    return tuple(ids)


def _bias(given: Mapping[str, float] | None, vocab_size: int, limits: Limits) -> dict[int, float]:
    if given and len(given) > limits.logit_bias:
        raise bad_request(f"logit_bias: {len(given)} tokens, at most {limits.logit_bias}", "logit_bias")
    bias = {}
    for key, value in (given or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocab_size):
            raise bad_request(f"logit_bias: {key[:40]!r} is no token id of this model", "logit_bias")
        bias[int(key)] = value
    return bias
