"""A request under way, what turns its logits into text, and what it gives."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from qcn_compile.errors import DeviceError
from qcn_compile.runtime.choice import Chooser, Pick
from qcn_compile.runtime.detokenize import Detokenizer
from qcn_compile.runtime.request import FinishReason, Request
from qcn_compile.runtime.sampler import NO_NUMBERS, Sample, Sampler


@dataclass(frozen=True)
class Timing:
    """Seconds of one request: from arrival to its first token, and from there to its last one.

    cached_tokens: prompt tokens that the prefix cache had. drafted, accepted: new tokens guessed, and those of them
    that came true.
    """

    prompt_tokens: int
    new_tokens: int
    first_token: float
    decode: float
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second until the first token."""
        return self.prompt_tokens / self.first_token if self.first_token else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first one; 0 when there was no second."""
        return (self.new_tokens - 1) / self.decode if self.new_tokens > 1 and self.decode else 0.0


@dataclass(frozen=True)
class Output:
    """What one step added to the request request_id: text, token_ids, and with logprobs their samples.

    The last one has a finish_reason, timing, and matched_stop, the stop string or token that ended it.
    cached: on the first one, the prompt tokens that the prefix cache had.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    samples: tuple[Sample, ...] = ()
    timing: Timing | None = None
    matched_stop: str | None = None
    cached: int = 0


@dataclass
class Live:
    """A request with what turns its logits into text."""

    request: Request
    sampler: Sampler
    detokenizer: Detokenizer
    chooser: Chooser | None = None
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    reported: bool = False

    def timing(self) -> Timing:
        now = time.perf_counter()
        first = now if self.first is None else self.first
        return Timing(len(self.request.prompt), self.request.generated, first - self.started, now - first,
                      self.request.cached or 0, self.request.drafted, self.request.accepted)

    def cached(self) -> int:
        """Cached prompt tokens to report with the next output: once."""
        first, self.reported = not self.reported, True
        return (self.request.cached or 0) if first else 0


def sample_row(live: Live, pick: Pick | None, token: int, logits: np.ndarray | None, row: int) -> Sample:
    """The token of one row, from the device or chosen here."""
    if pick is None:
        assert logits is not None
        return live.sampler.sample(logits[row])
    if token < 0:
        raise DeviceError(NO_NUMBERS)
    if pick.constraint is not None:
        pick.constraint.accept(token)
    return Sample(token)
