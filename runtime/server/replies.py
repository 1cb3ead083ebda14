"""Pieces of replies that several APIs share."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from qcn_compile.runtime.sampler import Sample
from qcn_compile.runtime.server.generation import Usage
from qcn_compile.runtime.tokenizer import Tokenizer


def new_id(prefix: str) -> str:
    """An id of an answer."""
    return prefix + os.urandom(12).hex()


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def usage_reply(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {"prompt_tokens": usage.prompt, "completion_tokens": usage.completion,
            "total_tokens": usage.prompt + usage.completion,
            "prompt_tokens_details": {"cached_tokens": usage.cached},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning,
                                          "accepted_prediction_tokens": usage.accepted,
                                          "rejected_prediction_tokens": usage.refused}}


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, list[int]]:
    """A token as text and as bytes; special tokens by their names."""
    spelled = tokenizer.token_bytes(token)
    if not spelled:
        spelled = (tokenizer.backend.id_to_token(token) or "").encode()
    return spelled.decode("utf-8", "replace"), list(spelled)


def chat_logprobs(tokenizer: Tokenizer, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """OpenAI's logprobs of a chat."""
    return [{**_logprob(tokenizer, sample.token, sample.logprob or 0.0),
             "top_logprobs": [_logprob(tokenizer, token, value) for token, value in sample.top_logprobs]}
            for sample in samples]


def _logprob(tokenizer: Tokenizer, token: int, value: float) -> dict[str, Any]:
    text, spelled = token_text(tokenizer, token)
    return {"token": text, "logprob": max(value, -9999.0), "bytes": spelled}
