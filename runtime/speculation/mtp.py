"""Drafts from the checkpoint's MTP head: one layer that guesses from a hidden state and the token after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from qcn_compile.runtime.batch import Capacity, Span
from qcn_compile.runtime.request import Request

_WAITING = 64  # hidden states that may wait for the next draft; then the head reads them alone


class DraftHead(Protocol):
    """The compiled head."""

    @property
    def draft_capacities(self) -> Sequence[Capacity]: ...

    def hidden(self) -> np.ndarray:
        """Hidden states of the last main step, [T, hidden] as the head reads them, valid until the next step of any
        kind."""
        ...

    def draft(self, spans: Sequence[Span], hidden: np.ndarray, rounds: int = 1) -> np.ndarray:
        """Likeliest tokens of the wanted rows, i32 [rounds, R]; each round goes on from the one before."""
        ...


@dataclass
class _Follower:
    """How far the head has read one request: `done` positions, and hidden states of those from there on."""

    done: int
    waiting: list[np.ndarray] = field(default_factory=list)

    @property
    def known(self) -> int:
        return self.done + sum(len(rows) for rows in self.waiting)

    def take(self, count: int) -> np.ndarray:
        """The oldest waiting states."""
        rows = np.concatenate(self.waiting)
        self.waiting = [rows[count:]] if count < len(rows) else []
        return rows[:count]


class MtpDrafter:
    """Position i of the head's KV cache holds (hidden state of token i, token i + 1), in the pages of the main model.

    What was drafted lies behind the last accepted token and is overwritten by what came true. A request that begins
    with cached pages finds the head's entries in them, too; the one at the boundary is that of whoever filled the page.
    """

    def __init__(self, head: DraftHead) -> None:
        self._head = head
        self._requests: dict[str, _Follower] = {}
        self._width = max(c.sequences for c in head.draft_capacities)
        self._tokens = max(c.tokens for c in head.draft_capacities)

    def computed(self, steps: Sequence[tuple[Request, Span]]) -> None:
        """Keep the hidden states of a main step: those whose next token is known by now."""
        hidden, start = self._head.hidden(), 0
        behind = []
        for request, span in steps:
            stop = start + len(span.tokens)
            if request.slot is not None:
                follower = self._requests.get(request.id)
                if follower is None or follower.known < span.context:  # new, or resumed further on
                    follower = self._requests[request.id] = _Follower(span.context)
                first = follower.known - span.context
                last = len(request.tokens) - 1 - span.context
                rows = hidden[start + first:min(stop, start + last)]
                if len(rows):
                    follower.waiting.append(rows.copy())
                if follower.known - follower.done >= min(_WAITING, self._tokens):
                    behind.append(request)
            start = stop
        for request in behind:
            self._catch_up(request)

    def draft(self, asks: Sequence[tuple[Request, int]]) -> list[Sequence[int]]:
        """For each (request, count) so many tokens; none when the head has nothing to start from."""
        found: list[list[int]] = [[] for _ in asks]
        ready = [i for i, (request, _) in enumerate(asks) if self._ready(request)]
        for group in self._groups(ready, asks):
            self._draft(group, asks, found)
        return list(found)

    def left(self, request: Request) -> None:
        """Forget what was read of a request: its pages are given back."""
        self._requests.pop(request.id, None)

    def _ready(self, request: Request) -> bool:
        follower = self._requests.get(request.id)
        return follower is not None and bool(follower.waiting) and follower.known == len(request.tokens) - 1

    def _groups(self, indices: Sequence[int], asks: Sequence[tuple[Request, int]]) -> Iterator[list[int]]:
        """Requests that one run of the head holds together: they want equally many tokens."""
        group: list[int] = []
        tokens = 0
        for i in sorted(indices, key=lambda i: asks[i][1]):
            follower = self._requests[asks[i][0].id]
            count = follower.known - follower.done
            other = group and asks[group[0]][1] != asks[i][1]
            if other or (group and (tokens + count > self._tokens or len(group) == self._width)):
                yield group
                group, tokens = [], 0
            group.append(i)
            tokens += count
        if group:
            yield group

    def _draft(self, group: list[int], asks: Sequence[tuple[Request, int]], found: list[list[int]]) -> None:
        """Rounds of one token for each request of a group; the first reads the waiting states, too."""
        read = [self._read(asks[i][0], self._requests[asks[i][0].id].known, 1) for i in group]
        tokens = self._head.draft([span for span, _ in read], np.concatenate([rows for _, rows in read]),
                                  asks[group[0]][1])
        for i, column in zip(group, tokens.T, strict=True):
            found[i] = column.tolist()

    def _catch_up(self, request: Request) -> None:
        """Read waiting states but the last, which the next draft starts from."""
        follower = self._requests[request.id]
        end = follower.known - 1
        while follower.done < end:
            span, rows = self._read(request, min(end, follower.done + self._tokens), 0)
            self._head.draft([span], rows)

    def _read(self, request: Request, stop: int, wanted: int) -> tuple[Span, np.ndarray]:
        """The span and states of positions up to `stop`, from then on done."""
        assert request.table is not None and request.slot is not None
        follower = self._requests[request.id]
        start, follower.done = follower.done, stop
        rows = follower.take(stop - start)
        return Span(request.tokens[start + 1:stop + 1], start, request.slot, request.table.pages, wanted), rows
