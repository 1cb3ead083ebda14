"""At which boundaries of a prompt states are kept, where its chunks end for that, and what an entry is worth."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cuts:
    """Boundaries of one prompt. A chunk must end at each of `must`, and rather ends at one of `may` than elsewhere."""

    must: tuple[int, ...] = ()
    may: tuple[int, ...] = ()


@dataclass(frozen=True)
class SnapshotPolicy:
    """Message starts are marked by `openers` (<|im_start|>), or message ends by `closers` (<|im_end|>).

    A prompt is cut where its first message ends (system prompt and tools: shared by sessions), where its last one
    starts (what a template may render differently next time begins there), and where it left a cached path (another
    request may leave it there too). `message_gap` and `chunk_gap` bound how densely states are kept, in tokens.
    """

    page_size: int
    openers: frozenset[int] = frozenset()
    closers: frozenset[int] = frozenset()
    message_gap: int = 64
    chunk_gap: int = 256

    def plan(self, tokens: Sequence[int], start: int, branch: int) -> Cuts:
        """Cuts for the tokens from `start` on, which has a state. `branch`: the tree knows the tokens up to there."""
        messages = self._messages(tokens)
        last = len(tokens) - 1
        if messages:
            wanted = {messages[0], messages[-1], branch}
        else:
            wanted = {last // self.page_size * self.page_size, branch}
        must: list[int] = []
        for cut in sorted(wanted):
            if cut <= last and cut - (must[-1] if must else start) >= self.message_gap:
                must.append(cut)
        return Cuts(tuple(must), tuple(messages))

    def cut(self, cuts: Cuts, start: int, count: int, total: int) -> int:
        """How many of the `count` tokens that could run from `start` on are to run, of a prompt of `total`."""
        end = start + count
        for cut in cuts.must:
            if start < cut < end:
                return cut - start
        if end >= total:
            return count
        half = start + count // 2
        place = bisect_right(cuts.may, end)
        if place and cuts.may[place - 1] > half:
            return cuts.may[place - 1] - start
        aligned = end // self.page_size * self.page_size
        return aligned - start if aligned > half else count

    def keeps(self, cuts: Cuts, boundary: int, kept: int) -> bool:
        """Whether a chunk's end is worth a state, the last one kept being at `kept`."""
        return boundary in cuts.must or boundary - kept >= self.chunk_gap

    def _messages(self, tokens: Sequence[int]) -> list[int]:
        """Boundaries between messages, the very start left out."""
        array = np.asarray(tokens, np.int32)
        marks = self.openers or self.closers
        places = np.flatnonzero(np.isin(array, list(marks))) + (0 if self.openers else 1)
        return [int(place) for place in places if 0 < place < len(tokens)]


LIKELY, UNLIKELY = 1.0, 0.1  # that a request resumes at a boundary: where others ended or hit; where a chunk ended


def score(credit: float, chance: float, saved: int, nbytes: int) -> float:
    """What keeping an entry is worth (GreedyDual): tokens saved per byte, on top of the level at its last use."""
    return credit + chance * saved / max(nbytes, 1)
