"""Rounds of a draft head: each starts from the token and the hidden state that the one before it left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qcn_compile.runtime.batch import Span

Once = Callable[[Sequence[Span], np.ndarray], tuple[np.ndarray, np.ndarray]]


def following(spans: Sequence[Span], tokens: Sequence[int]) -> list[Span]:
    """The spans of the next round: one token each, after those of this round."""
    return [Span([int(token)], span.context + len(span.tokens), span.slot, span.pages, 1)
            for span, token in zip(spans, tokens, strict=True)]


def last_rows(spans: Sequence[Span]) -> np.ndarray:
    """Where the last token of each span is among the tokens of all."""
    return np.cumsum([len(span.tokens) for span in spans]) - 1


def in_turn(once: Once, spans: Sequence[Span], hidden: np.ndarray, rounds: int) -> np.ndarray:
    """Tokens of all rounds, i32 [rounds, wanted rows], by a head that runs one round: `once(spans, hidden)` gives its
    tokens and the hidden states after them. More rounds than one want a row of every span."""
    found = []
    for left in range(rounds, 0, -1):
        tokens, after = once(spans, hidden)
        found.append(np.array(tokens, np.int32))
        if left > 1:
            hidden, spans = after[last_rows(spans)], following(spans, found[-1].tolist())
    return np.stack(found)
