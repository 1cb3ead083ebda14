"""Drafts for decoding requests, and where their states stand when some are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qcn_compile.runtime.batch import Span
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
    """What is remembered of one request."""

    pace: Pace = field(default_factory=Pace)


class Speculation:
    """Drafts at most `count` tokens a request and step.

    A step verifies drafts in one span that reads the state from one slot and writes it to another. When all are
    accepted, the sequence goes on from the other. Otherwise it stays where it is, and the accepted tokens are computed
    again at the head of the next span (`Request.lag`); KV entries of refused ones are overwritten then. No state is
    copied for it.
    Slot i has its other one at `slots` + i.
    """

    def __init__(self, slots: int, count: int, drafter: Drafter) -> None:
        self.count = count
        self._slots, self._drafter = slots, drafter
        self._requests: dict[str, _Drafting] = {}
        self.times = StepTimes()
        self.drafted = self.accepted = self.steps = self.tokens = 0

    def wanted(self, request: Request, room: int) -> int:
        """How many drafts a decoding request may have; `room` tokens and rows are left in the step."""
        drafting = self._requests.setdefault(request.id, _Drafting())
        count = min(self.count, room, request.max_tokens - request.generated - 1)
        if request.lag > _LONGEST_REPLAY or count < 1 or self.times.plain_due:
            return 0
        return 0 if drafting.pace.pauses() else count

    def draft(self, asks: Sequence[tuple[Request, int]]) -> list[tuple[int, ...]]:
        """Drafts for each (request, count)."""
        return [tuple(drafts) for drafts in self._drafter.draft(asks)] if asks else []

    def computed(self, steps: Sequence[tuple[Request, Span]]) -> None:
        """A step ran, and its tokens were chosen."""
        self._drafter.computed(steps)

    def other(self, request: Request) -> int:
        """The slot that a step with drafts writes a request's state to."""
        assert request.slot is not None and request.state is not None
        return 2 * request.slot + self._slots - request.state

    def accept(self, request: Request) -> None:
        """All drafts of a step came true: go on from the state that it wrote."""
        request.state = self.other(request)

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

    def ended(self, request: Request) -> None:
        """Forget a request."""
        self._requests.pop(request.id, None)

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Every state is in one of its sequence's two slots."""
        for request in running:
            if request.slot is None or request.state not in (request.slot, request.slot + self._slots):
                raise AssertionError(f"{request.id} has slot {request.slot}, but its state in {request.state}")

    def __str__(self) -> str:
        share = self.accepted / self.drafted if self.drafted else 0.0
        pace = self.tokens / self.steps if self.steps else 0.0
        return (f"speculation: {self.accepted} of {self.drafted} drafts accepted ({share:.0%}), "
                f"{pace:.2f} tokens a step in {self.steps} steps with drafts")
