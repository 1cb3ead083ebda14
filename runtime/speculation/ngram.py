"""Drafts from the text itself: what followed the last time that the latest tokens occurred."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from qcn_compile.runtime.batch import Span
from qcn_compile.runtime.request import Request

LONGEST, SHORTEST = 8, 2  # tokens that must have occurred before, at most looked at and at least asked for


class NgramDrafter:
    """Looks a request's last tokens up in its own prompt and output. Reads only what was added since the last call."""

    def __init__(self) -> None:
        self._tokens = np.empty(1024, np.int32)
        self._count = 0

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow: after the longest match, of several the latest; none without one."""
        known = self._extend(tokens)
        if count < 1 or len(known) <= SHORTEST:
            return []
        places = np.flatnonzero(known[:-1] == known[-1])
        for back in range(1, min(LONGEST, len(known) - 1)):
            longer = places[(places >= back) & (known[places - back] == known[-1 - back])]
            if not len(longer):
                if back < SHORTEST:
                    return []
                break
            places = longer
        after = int(places[-1]) + 1
        found: list[int] = known[after:after + count].tolist()
        while len(found) < count:  # the match runs into what is being drafted: a repetition
            found.append(found[len(found) - (len(known) - after)])
        return found

    def _extend(self, tokens: Sequence[int]) -> np.ndarray:
        if len(tokens) > len(self._tokens):
            grown = np.empty(2 * len(tokens), np.int32)
            grown[:self._count] = self._tokens[:self._count]
            self._tokens = grown
        self._tokens[self._count:len(tokens)] = tokens[self._count:]
        self._count = len(tokens)
        return self._tokens[:self._count]


class Lookup(Protocol):
    """Guesses what follows one text that grows."""

    def draft(self, tokens: Sequence[int], count: int) -> list[int]: ...


class LookupDrafter:
    """One lookup a request."""

    def __init__(self, make: Callable[[], Lookup] = NgramDrafter) -> None:
        self._make = make
        self._requests: dict[str, Lookup] = {}

    def computed(self, steps: Sequence[tuple[Request, Span]]) -> None:
        """Tokens are all it looks at."""

    def draft(self, asks: Sequence[tuple[Request, int]]) -> list[Sequence[int]]:
        """At most so many tokens for each (request, count)."""
        return [self._of(request).draft(request.tokens, count) for request, count in asks]

    def left(self, request: Request) -> None:
        """Forget a text; it is read again if the request comes back."""
        self._requests.pop(request.id, None)

    def _of(self, request: Request) -> Lookup:
        if request.id not in self._requests:
            self._requests[request.id] = self._make()
        return self._requests[request.id]
