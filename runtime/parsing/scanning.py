"""Text that comes in pieces, read so that no decision depends on where the pieces were cut.

A `Tag` answers "here", "not here" or raises `Undecided`. The first two answers never change when more text follows, so
a scanner that takes a step only on such an answer takes the same steps for every chunking.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from qcn_compile.runtime.parsing.events import Event, EventList

Atoms = Sequence[str]
"""A pattern as regular expressions of which each matches in one way only, the next one's first character ends it."""

SPACES = r"\s{0,256}"
BLANKS = r"[ \t]{0,8}"
TEXT_ENDS = r"(?!)"
"""As last atom of a tail: only the end of the text satisfies it."""

_SPACE_RUN = re.compile(r"\s*")


class Undecided(Exception):
    """The text so far fits both answers."""


def literal(text: str) -> list[str]:
    """Atoms of a fixed text."""
    return [re.escape(character) for character in text]


class Tag:
    """One of `heads`, then (looked at, not part of the match) one of `tails`.

    Where the text ends, a complete head is enough if the rest is the beginning of a tail.
    """

    def __init__(self, heads: Sequence[Atoms], tails: Sequence[Atoms] = ((),)) -> None:
        head = _either("".join(atoms) for atoms in heads)
        tail = _either("".join(atoms) for atoms in tails)
        begun_tail = _either(_begun(atoms, "") for atoms in tails)
        self._whole = re.compile(f"{head}(?={tail})")
        self._begun = re.compile(_either(_begun(atoms, begun_tail) for atoms in heads))
        self._at_end = re.compile(f"{head}(?={begun_tail})")

    def match(self, text: str, start: int, final: bool) -> re.Match[str] | None:
        """The match at `start`. `final` says that no text follows. Raises Undecided."""
        found = self._whole.match(text, start)
        if found is not None:
            return found
        if final:
            return self._at_end.match(text, start)
        if self._begun.match(text, start):
            raise Undecided
        return None

    def begins(self, text: str, start: int) -> bool:
        """Whether the text from `start` to its end is the beginning of this tag, or holds it."""
        return self._begun.match(text, start) is not None


def _either(patterns: Iterable[str]) -> str:
    return "(?:" + "|".join(patterns) + ")"


def _begun(atoms: Atoms, rest: str) -> str:
    """The atoms and `rest`, or as much of them as the text has before its end."""
    pattern = rest
    for atom in reversed(atoms):
        pattern = rf"(?:{atom}{pattern}|\Z)"
    return pattern


class Scanner(ABC):
    """A state machine over a growing text. Subclasses consume by moving `_position`."""

    def __init__(self) -> None:
        self._text = ""
        self._position = 0
        self._final = False
        self._events = EventList()

    def feed(self, text: str) -> list[Event]:
        """Events that this text makes certain."""
        self._text = self._text[self._position:] + text
        self._position = 0
        self._run()
        return self._events.take()

    def finish(self) -> list[Event]:
        """The rest, once the model has stopped."""
        self._final = True
        self._run()
        self._end()
        return self._events.take()

    @abstractmethod
    def _step(self) -> None:
        """Consume at least one character, or change state, or raise Undecided (never when `_final`)."""

    @abstractmethod
    def _end(self) -> None:
        """All text is consumed; close what is open."""

    def _run(self) -> None:
        try:
            while self._position < len(self._text):
                self._step()
        except Undecided:
            pass

    def _match(self, tag: Tag, start: int | None = None) -> re.Match[str] | None:
        return tag.match(self._text, self._position if start is None else start, self._final)

    def _take_spaces(self) -> str:
        """Consume whitespace."""
        found = _SPACE_RUN.match(self._text, self._position)
        assert found is not None
        self._position = found.end()
        return found[0]

    def _take_until(self, character: str) -> str:
        """Consume what precedes the next `character`, or all."""
        start = self._position
        stop = self._text.find(character, start)
        self._position = len(self._text) if stop < 0 else stop
        return self._text[start:self._position]
