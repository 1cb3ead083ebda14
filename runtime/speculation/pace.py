"""Whether drafting pays: tokens gained against the time that verifying costs, both measured."""

from __future__ import annotations

from dataclasses import dataclass, field

_WEIGHT = 0.15  # of the newest value in a moving average
_PATIENCE, _RETRY = 4, 2  # draft steps of a request before it is judged, at first and after a pause
_PAUSE, _LONGEST_PAUSE = 32, 1024  # steps without drafts after they did not pay: doubled each time
_GUESS = 1.3  # a verifying step over a plain one, before both were measured


def blend(old: float | None, new: float) -> float:
    """Moving average."""
    return new if old is None else old + _WEIGHT * (new - old)


@dataclass
class StepTimes:
    """Seconds of decode steps by how many sequences they had, plain and with drafts or replays."""

    plain: dict[int, float] = field(default_factory=dict)
    drafted: dict[int, float] = field(default_factory=dict)

    def add(self, sequences: int, drafted: bool, seconds: float) -> None:
        times = self.drafted if drafted else self.plain
        times[sequences] = blend(times.get(sequences), seconds)

    def ratio(self, sequences: int) -> float:
        """What a step with drafts costs in plain steps."""
        plain, drafted = self.plain.get(sequences), self.drafted.get(sequences)
        return _GUESS if plain is None or drafted is None or not plain else max(1.0, drafted / plain)


@dataclass
class Pace:
    """One request's: tokens per step while it drafts, and a pause when that is less than plain steps would give."""

    gain: float | None = None
    steps: int = 0
    pause: int = 0
    length: int = _PAUSE

    def pauses(self) -> bool:
        """Whether to leave this step undrafted; counts it."""
        self.pause = max(0, self.pause - 1)
        return self.pause > 0

    def add(self, tokens: int, ratio: float) -> None:
        """A step with drafts or a replay gave so many tokens."""
        self.gain = blend(self.gain, float(tokens))
        self.steps += 1
        if self.steps < _PATIENCE:
            return
        if self.gain < ratio:
            self.pause, self.length = self.length, min(2 * self.length, _LONGEST_PAUSE)
            self.steps, self.gain = _PATIENCE - _RETRY, None
        else:
            self.length = _PAUSE
