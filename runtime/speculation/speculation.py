"""Drafts for decoding requests, and their states before a step that may refuse some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qcn_compile.runtime.prefix.rows import Rows
from qcn_compile.runtime.request import Request
from qcn_compile.runtime.speculation.ngram import NgramDrafter
from qcn_compile.runtime.speculation.pace import Pace, StepTimes

_LONGEST_REPLAY = 8  # accepted tokens to compute again beside new drafts; more are first computed alone


class Drafter(Protocol):
    """Guesses what follows."""

    def draft(self, tokens: Sequence[int], count: int) -> list[int]: ...


@dataclass
class _Drafting:
    """One request's drafter, pace, and the tokens its saved state stands at."""

    drafter: Drafter
    pace: Pace = field(default_factory=Pace)
    saved: int = -1


class Speculation:
    """Drafts at most `count` tokens a request and step.

    A step verifies drafts in one span. When all are accepted, caches stand right. Otherwise the state from before the
    step is copied back and the accepted tokens are computed again at the head of the next span (`Request.lag`); KV
    entries of refused ones are overwritten then. Slot i of a sequence has its saved state at `backup` + i.
    """

    def __init__(self, rows: Rows, backup: int, count: int, drafter: Callable[[], Drafter] = NgramDrafter) -> None:
        self.count = count
        self._rows, self._backup, self._drafter = rows, backup, drafter
        self._requests: dict[str, _Drafting] = {}
        self.times = StepTimes()
        self.drafted = self.accepted = self.steps = self.tokens = 0

    def draft(self, request: Request, room: int) -> tuple[int, ...]:
        """Drafts for a request that decodes, with its state saved; `room` tokens and rows are left in the step."""
        drafting = self._requests.get(request.id)
        if drafting is None:
            drafting = self._requests[request.id] = _Drafting(self._drafter())
        count = min(self.count, room, request.max_tokens - request.generated - 1)
        if request.lag > _LONGEST_REPLAY or count < 1 or drafting.pace.pauses():
            return ()
        return tuple(drafting.drafter.draft(request.tokens, count))

    def save(self, request: Request) -> None:
        """Remember the state before drafts are computed."""
        drafting = self._requests[request.id]
        assert request.slot is not None
        if drafting.saved != request.computed:
            self._rows.copy_state(request.slot, self._backup + request.slot)
            drafting.saved = request.computed

    def restore(self, request: Request) -> None:
        """Go back to the remembered state."""
        assert request.slot is not None and self._requests[request.id].saved == request.computed
        self._rows.copy_state(self._backup + request.slot, request.slot)

    def verified(self, request: Request, drafts: int, taken: int, replayed: int, sequences: int) -> None:
        """Count a step that gave a request `taken` tokens, `drafts` of them at most guessed, `replayed` old ones."""
        request.drafted += drafts
        request.accepted += min(drafts, taken - 1)
        if drafts or replayed:
            self.drafted += drafts
            self.accepted += min(drafts, taken - 1)
            self.steps += 1
            self.tokens += taken
            self._requests[request.id].pace.add(taken, self.times.ratio(sequences))

    def left(self, request: Request) -> None:
        """The request gave its slot back."""
        request.lag = 0
        if request.id in self._requests:
            self._requests[request.id].saved = -1

    def ended(self, request: Request) -> None:
        """Forget a request."""
        self._requests.pop(request.id, None)

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Only live requests are remembered, and a lagging one has its saved state."""
        for request in running:
            if request.lag and self._requests[request.id].saved != request.computed:
                raise AssertionError(f"{request.id} lags without a saved state")

    def __str__(self) -> str:
        share = self.accepted / self.drafted if self.drafted else 0.0
        pace = self.tokens / self.steps if self.steps else 0.0
        return (f"speculation: {self.accepted} of {self.drafted} drafts accepted ({share:.0%}), "
                f"{pace:.2f} tokens a step in {self.steps} steps with drafts")
