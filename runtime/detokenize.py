"""Tokens to text as they come: the pieces joined equal the whole text, however the tokens are chunked."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence


class StopMatcher:
    """Finds the first stop string to be completed, holding back text that may be the start of one.

    The first match to end wins, of those the longest; both do not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that may be shown now. Nothing more comes after a match."""
        if self.matched is not None:
            return ""
        self._held += text
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if ends:
            end, start, self.matched = min(ends)
            shown, self._held = self._held[:end if self._include else start], ""
            return shown
        keep = self._longest_start()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back and became no stop string."""
        shown, self._held = self._held, ""
        return shown

    def _longest_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max((len(stop) - 1 for stop in self._stops), default=0))
        for size in range(longest, 0, -1):
            end = self._held[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0


class Detokenizer:
    """One request's text. Bytes of a character split over tokens wait for its end; invalid ones become U+FFFD."""

    def __init__(self, token_bytes: Callable[[int], bytes], stops: Sequence[str] = (),
                 include_stop: bool = False) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(stops, include_stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed."""
        return self._matcher.matched is not None

    @property
    def matched(self) -> str | None:
        """The stop string that was completed."""
        return self._matcher.matched

    def push(self, tokens: Iterable[int]) -> str:
        """The text these tokens add, as far as it is certain."""
        return self._matcher.push(self._decoder.decode(b"".join(map(self._token_bytes, tokens))))

    def finish(self) -> str:
        """The rest: incomplete characters as U+FFFD, and text held back for stop strings."""
        return self._matcher.push(self._decoder.decode(b"", final=True)) + self._matcher.finish()
