"""A step between its launch and the reading of its results."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcn_compile.runtime.batch import Span
from qcn_compile.runtime.choice import Launched, Pick
from qcn_compile.runtime.scheduler import Chunk


@dataclass
class Flight:
    """A step whose results are not read yet. ahead: the next one may be launched before; its chunks are advanced.

    places: of each sampling chunk, where in its request's tokens the new one stands.
    """

    chunks: list[Chunk]
    spans: list[Span]
    launched: Launched
    picks: list[Pick | None]
    started: float
    decoding: bool
    drafted: bool
    ahead: bool
    places: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    """The step of a runner that has no choice of its own: done at once."""

    rows: np.ndarray

    def tokens(self) -> np.ndarray:
        return np.full(len(self.rows), -1, np.int32)

    def logits(self) -> np.ndarray:
        return self.rows
