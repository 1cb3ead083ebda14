"""A request: its prompt, how to sample, and where it stands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from qcn_compile.errors import UsageError
from qcn_compile.runtime.kv_cache import BlockTable
from qcn_compile.runtime.prefix.policy import Cuts

MAX_LOGPROBS = 20


class FinishReason(StrEnum):
    """Why a request ended."""

    stop = "stop"
    length = "length"
    abort = "abort"


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Raises UsageError that names the field, its value and its range.

    temperature 0 is greedy. top_k 0 means all tokens. Penalties as in Hugging Face (repetition: over prompt and
    output) and OpenAI (frequency, presence: over the output). `logprobs` n: report each token's log probability under
    the model's own distribution (before penalties and temperature), and the n most likely alternatives'.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, low, high in _RANGES:
            _check_number(name, getattr(self, name), low, high)
        for name, low, high in _INTEGERS:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not low <= value <= high):
                raise UsageError(f"{name}={value!r}: must be a whole number {_interval(low, high)}")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise UsageError(f"stop={self.stop!r}: every stop must be a non-empty string")
        for token, bias in self.logit_bias.items():
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise UsageError(f"logit_bias: {token!r} is no token id")
            _check_number(f"logit_bias[{token}]", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether the history of tokens changes the logits."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


_INF = math.inf
_RANGES = (("temperature", 0.0, 100.0), ("top_p", 1e-6, 1.0), ("min_p", 0.0, 1.0), ("repetition_penalty", 1e-3, 100.0),
           ("frequency_penalty", -2.0, 2.0), ("presence_penalty", -2.0, 2.0))
_INTEGERS = (("max_tokens", 1, _INF), ("top_k", 0, _INF), ("seed", 0, 2**64 - 1), ("logprobs", 0, MAX_LOGPROBS))


def _interval(low: float, high: float) -> str:
    return f">= {low:g}" if high == _INF else f"from {low:g} to {high:g}"


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UsageError(f"{name}={value!r}: must be a number {_interval(low, high)}")


@dataclass
class Request:
    """One sequence on its way: tokens = prompt then output; `computed` of them are in the caches.

    cached: prompt tokens that the prefix cache had when it first ran, None before. kept: boundary of its last snapshot.
    cuts: where its chunks end for snapshots. lag: accepted tokens to compute again after refused drafts.
    drafted, accepted: tokens guessed for it, and those that came true. after: another one with the same prompt, whose
    prompt this one waits for to find it cached.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    arrival: int
    tokens: list[int] = field(init=False)
    computed: int = 0
    cached: int | None = None
    kept: int = 0
    lag: int = 0
    drafted: int = 0
    accepted: int = 0
    after: Request | None = None
    cuts: Cuts = field(default_factory=Cuts)
    table: BlockTable | None = None
    slot: int | None = None
    state: int | None = None
    last_served: int = -1
    preemptions: int = 0
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt):]

    @property
    def remaining(self) -> int:
        """Tokens not yet in the caches: 1 and the lag while decoding, more while (re)computing the prompt."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        return self.remaining == 1 + self.lag

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def ending(self) -> bool:
        """Its last token is chosen, though perhaps not read."""
        return self.generated >= self.max_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
