"""How a device chooses a request's tokens: what it is told for each wanted row, and what it keeps for each slot."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qcn_compile.runtime.batch import Span
from qcn_compile.runtime.request import Request
from qcn_compile.runtime.sampler import Constraint

PENDING = -1  # stands in a request's tokens for one that the device has chosen and the host has not read


@dataclass(frozen=True)
class Pick:
    """One wanted row whose token the device chooses. index: number of the token in its output.

    fresh: the slot is new to the request, so what it keeps there (tokens seen, biases) is written first.
    """

    request: Request
    index: int
    seed: int
    constraint: Constraint | None = None
    fresh: bool = False


class Launched(Protocol):
    """A step on its way."""

    def tokens(self) -> np.ndarray:
        """i32 [R], when the step has ended: the tokens chosen; -1 where the host chooses, or logits are no numbers."""
        ...

    def logits(self) -> np.ndarray:
        """f32 [R, vocab], when the step has ended; valid until the next one is launched."""
        ...


class Choosing(Protocol):
    """A runner that chooses tokens itself. In a span, token -1 - s stands for the one last chosen for slot s."""

    def launch(self, spans: Sequence[Span], picks: Sequence[Pick | None]) -> Launched:
        """Start a step; one pick a wanted row, None for a row whose logits the host wants."""
        ...


class Chooser:
    """One request's picks: its seed, and whether its slot knows it already."""

    def __init__(self, request: Request, constraint: Constraint | None = None) -> None:
        self.constraint = constraint
        self._request = request
        self._seed = secrets.randbits(64) if request.params.seed is None else request.params.seed
        self._place: tuple[int | None, int] | None = None

    def picks(self, count: int) -> list[Pick]:
        """Picks of the next `count` tokens."""
        request = self._request
        place = request.slot, request.preemptions
        fresh, self._place = place != self._place, place
        return [Pick(request, request.generated + i, self._seed, self.constraint, fresh and i == 0)
                for i in range(count)]
