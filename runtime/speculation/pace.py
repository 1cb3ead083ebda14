"""Whether drafting pays: tokens gained against the time that verifying costs, both measured."""

from __future__ import annotations

from dataclasses import dataclass, field

_WEIGHT = 0.15  # of the newest value in a moving average of seconds
_LUCK = 0.05  # the same of tokens a step, which vary by chance: less, or good drafts would pause now and then
_PATIENCE, _RETRY = 4, 2  # draft steps of a request before it is judged, at first and after a pause
_PAUSE, _LONGEST_PAUSE = 32, 1024  # steps without drafts after they did not pay: doubled each time
_GUESS = 1.3  # a verifying step over a plain one, before both were measured
_FIRST, _AGAIN = 8, 128  # steps with drafts after which a plain one is measured: contexts grow, machines change


def blend(old: float | None, new: float) -> float:
    """Moving average."""
    return new if old is None else old + _WEIGHT * (new - old)


@dataclass
class StepTimes:
    """Seconds of decode steps by how many sequences they had, plain and with drafts or replays."""

    plain: dict[int, float] = field(default_factory=dict)
    drafted: dict[int, float] = field(default_factory=dict)
    since: int = 0  # steps with drafts since the last plain one

    @property
    def plain_due(self) -> bool:
        """Whether the next step should have no drafts, so that its time is known."""
        return self.since >= (_AGAIN if self.plain else _FIRST)

    def add(self, sequences: int, drafted: bool, seconds: float) -> None:
        times = self.drafted if drafted else self.plain
        times[sequences] = blend(times.get(sequences), seconds)
        self.since = self.since + 1 if drafted else 0

    def ratio(self, sequences: int) -> float:
        """What a step with drafts costs in plain steps, of the nearest number of sequences that both were measured
        with."""
        both = sorted(self.plain.keys() & self.drafted.keys(), key=lambda count: abs(count - sequences))
        return max(1.0, self.drafted[both[0]] / self.plain[both[0]]) if both and self.plain[both[0]] else _GUESS


@dataclass
class Pace:
    """One request's: tokens per step while it drafts, and a pause when that is less than plain steps would give."""

    gain: float = 0.0
    seen: int = 0  # steps that `gain` is made of, the newest ones weighing most
    steps: int = 0
    pause: int = 0
    length: int = _PAUSE

    def pauses(self) -> bool:
        """Whether to leave this step undrafted; counts it."""
        self.pause = max(0, self.pause - 1)
        return self.pause > 0

    def add(self, tokens: int, ratio: float) -> None:
        """A step with drafts or a replay gave so many tokens."""
        self.seen += 1
        self.gain += max(_LUCK, 1 / self.seen) * (tokens - self.gain)
        self.steps += 1
        if self.steps < _PATIENCE:
            return
        if self.gain < ratio:
            self.pause, self.length = self.length, min(2 * self.length, _LONGEST_PAUSE)
            self.steps, self.seen, self.gain = _PATIENCE - _RETRY, 0, 0.0
        else:
            self.length = _PAUSE
