"""One ragged step: spans of tokens of several sequences, and the input arrays the kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcn_compile.runtime.device import allocate


@dataclass(frozen=True)
class Capacity:
    """What one plan holds: tokens, sequences, and rows of logits."""

    tokens: int
    sequences: int
    rows: int

    def holds(self, tokens: int, sequences: int, rows: int) -> bool:
        return tokens <= self.tokens and sequences <= self.sequences and rows <= self.rows


@dataclass(frozen=True)
class Span:
    """The tokens of one sequence in a step: `context` came before, the logits of the last `wanted` are returned.

    pages: i32 [pages of the sequence], enough for context + tokens. The state is read from `slot` and written to
    `into`, where that is given, else back.
    """

    tokens: Sequence[int]
    context: int
    slot: int
    pages: np.ndarray
    wanted: int
    into: int | None = None

    @property
    def target(self) -> int:
        """The slot that the state is written to."""
        return self.slot if self.into is None else self.into


def demand(spans: Sequence[Span]) -> tuple[int, int, int]:
    """Tokens, sequences and rows of logits of a step."""
    return sum(len(s.tokens) for s in spans), len(spans), sum(s.wanted for s in spans)


class InputArrays:
    """The arrays of `artifact.INPUTS`, allocated once at the largest capacity and rewritten each step."""

    def __init__(self, capacities: Sequence[Capacity], table_width: int) -> None:
        self._width = table_width
        sizes = self.sizes(capacities, table_width)
        self.arrays = {name: allocate(4 * size).view(np.int32) for name, size in sizes.items()}

    @staticmethod
    def sizes(capacities: Sequence[Capacity], table_width: int) -> dict[str, int]:
        """Array -> its numbers."""
        tokens = max(c.tokens for c in capacities)
        sequences = max(c.sequences for c in capacities)
        return {"counts": 4, "tokens": tokens, "positions": tokens, "token_seq": tokens, "cu_seqlens": sequences + 1,
                 "context_lens": sequences, "slots": sequences, "into": sequences,
                 "block_table": sequences * table_width,
                 "rows": max(c.rows for c in capacities)}

    def fill(self, spans: Sequence[Span]) -> int:
        """Write a step that is known to fit. Returns R, the number of wanted rows."""
        arrays, width = self.arrays, self._width
        start = rows = 0
        for index, span in enumerate(spans):
            count = len(span.tokens)
            stop, row = start + count, rows + span.wanted
            arrays["tokens"][start:stop] = span.tokens
            arrays["positions"][start:stop] = np.arange(span.context, span.context + count)
            arrays["token_seq"][start:stop] = index
            arrays["cu_seqlens"][index] = start
            arrays["context_lens"][index] = span.context
            arrays["slots"][index] = span.slot
            arrays["into"][index] = span.target
            arrays["block_table"][index * width:index * width + len(span.pages)] = span.pages
            arrays["rows"][rows:row] = np.arange(stop - span.wanted, stop)
            start, rows = stop, row
        arrays["cu_seqlens"][len(spans)] = start
        arrays["counts"][:] = (start, len(spans), rows, width)
        return rows
