"""Drafts for decoding requests, and their states before a step that may refuse some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qcn_compile.runtime.batch import Span
from qcn_compile.runtime.prefix.rows import Rows
from qcn_compile.runtime.request import Request
from qcn_compile.runtime.speculation.pace import Pace, StepTimes

_LONGEST_REPLAY = 8  # accepted tokens to compute again beside new drafts; more are first computed alone


class Drafter(Protocol):
    """Guesses what follows, for all decoding requests at once."""

    def computed(self, steps: Sequence[tuple[Request, Span]]) -> None:
        """These spans of the step that just ran were computed, and the tokens chosen after them added."""
        ...

    def draft(self, asks: Sequence[tuple[Request, int]]) -> list[Sequence[int]]:
        """At most so many tokens for each (request, count)."""
        ...

    def left(self, request: Request) -> None:
        """The request ended, or gave its pages back for a while."""
        ...


@dataclass
class _Drafting:
    """One request's pace, and the tokens its saved state stands at."""

    pace: Pace = field(default_factory=Pace)
    saved: int = -1


class Speculation:
    """Drafts at most `count` tokens a request and step.

    A step verifies drafts in one span. When all are accepted, caches stand right. Otherwise the state from before the
    step is copied back and the accepted tokens are computed again at the head of the next span (`Request.lag`); KV
    entries of refused ones are overwritten then. Slot i of a sequence has its saved state at `backup` + i.
    """

    def __init__(self, rows: Rows, backup: int, count: int, drafter: Drafter) -> None:
        self.count = count
        self._rows, self._backup, self._drafter = rows, backup, drafter
        self._requests: dict[str, _Drafting] = {}
        self.times = StepTimes()
        self.drafted = self.accepted = self.steps = self.tokens = 0

    def wanted(self, request: Request, room: int) -> int:
        """How many drafts a decoding request may have; `room` tokens and rows are left in the step."""
        drafting = self._requests.setdefault(request.id, _Drafting())
        count = min(self.count, room, request.max_tokens - request.generated - 1)
        return 0 if request.lag > _LONGEST_REPLAY or count < 1 or drafting.pace.pauses() else count

    def draft(self, asks: Sequence[tuple[Request, int]]) -> list[tuple[int, ...]]:
        """Drafts for each (request, count); the states of those that have some are saved."""
        found = [tuple(drafts) for drafts in self._drafter.draft(asks)] if asks else []
        for (request, _), drafts in zip(asks, found, strict=True):
            if drafts:
                self._save(request)
        return found

    def computed(self, steps: Sequence[tuple[Request, Span]]) -> None:
        """A step ran, and its tokens were chosen."""
        self._drafter.computed(steps)

    def _save(self, request: Request) -> None:
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
        self._drafter.left(request)
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
