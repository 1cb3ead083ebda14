"""What to send: sessions of turns, made up or read from a trace, and the texts they are made of."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path

from qcn_compile.errors import UsageError

BLOCK = 512  # tokens behind one hash id of a trace
WORDS = ("def", "return", "self", "value", "for", "in", "range", "if", "else", "None", "import", "class", "print",
         "len", "data", "list", "name", "index", "result", "item", "key", "while", "True", "not", "and", "path", "file",
         "open", "read", "write", "line", "text", "count", "total", "sum", "max", "min", "append", "add", "get", "set",
         "new")


@dataclass(frozen=True)
class Turn:
    """Tokens that are new in a prompt, tokens to answer, seconds to wait first; ids of blocks that others may share."""

    new: int
    output: int
    delay: float = 0.0
    blocks: tuple[int, ...] = ()
    block: int = BLOCK


@dataclass(frozen=True)
class Session:
    """Turns of one conversation, each with the history of those before. `start`: seconds after the first."""

    name: str
    turns: tuple[Turn, ...]
    start: float = 0.0


class Texts:
    """Words of a made-up program, as many as give a number of tokens."""

    def __init__(self, tokens_per_word: float, seed: int) -> None:
        self._rate, self._seed = tokens_per_word, seed

    def make(self, key: str, tokens: int) -> str:
        """About `tokens` tokens; the same key gives the same text."""
        rng = random.Random(f"{self._seed}/{key}")
        return " ".join(rng.choices(WORDS, k=max(1, round(tokens / self._rate))))

    def of(self, turn: Turn, key: str) -> str:
        """A turn's text: blocks with equal ids are equal."""
        if not turn.blocks:
            return self.make(key, turn.new)
        left, parts = turn.new, []
        for block in turn.blocks:
            if left > 0:
                parts.append(self._block(block, min(left, turn.block)))
                left -= turn.block
        return " ".join(parts)

    @lru_cache(maxsize=4096)  # noqa: B019  # one object for each run
    def _block(self, block: int, tokens: int) -> str:
        return self.make(f"block {block}", tokens)


def sample_text() -> str:
    """Text to measure tokens per word with."""
    return " ".join(random.Random(0).choices(WORDS, k=1000))


def synthetic(new: int, output: int, turns: int, later: int, spread: float, seed: int) -> Iterator[Session]:
    """Endless sessions: `new` tokens at first, `later` in every further turn, lengths within ± `spread` of that."""
    rng = random.Random(seed)

    def about(mean: int) -> int:
        return max(1, round(mean * rng.uniform(1 - spread, 1 + spread)))

    number = 0
    while True:
        rest = [Turn(about(later), about(output)) for _ in range(turns - 1)]
        yield Session(f"s{number}", (Turn(about(new), about(output)), *rest))
        number += 1


def poisson(sessions: Iterator[Session], rate: float, seed: int) -> Iterator[Session]:
    """The same sessions, begun at random times, `rate` a second."""
    rng, at = random.Random(seed), 0.0
    for session in sessions:
        yield replace(session, start=at)
        at += rng.expovariate(rate)


def read_trace(path: Path, limit: int, time_scale: float, token_scale: float) -> list[Session]:
    """The first `limit` sessions of a trace: Azure's CSV, Mooncake's JSON lines, or aiperf's sessions of turns.

    Raises UsageError for a file that is none of them.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline()
            file.seek(0)
            read = _azure if first.startswith("TIMESTAMP,") else _json_lines
            sessions = list(islice(read(file), limit))
    except OSError as error:
        raise UsageError(f"--trace {path}: {error.strerror or error}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"--trace {path}: neither CSV with TIMESTAMP,ContextTokens,GeneratedTokens nor JSON lines "
                         f"with input_length and output_length ({error!r})") from None
    if not sessions:
        raise UsageError(f"--trace {path}: holds no requests")
    begin = min(session.start for session in sessions)
    scaled = [_scaled(s, begin, time_scale, token_scale) for s in sessions]
    return sorted(scaled, key=lambda session: session.start)


def _azure(file: Iterator[str]) -> Iterator[Session]:
    for number, row in enumerate(csv.DictReader(file)):
        at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
        yield Session(f"r{number}", (Turn(int(row["ContextTokens"]), int(row["GeneratedTokens"])),), at)


def _json_lines(file: Iterator[str]) -> Iterator[Session]:
    """Rows with a session_id that follow each other are turns of one session."""
    session: list[dict[str, object]] = []
    for number, line in enumerate(file):
        if not line.strip():
            continue
        row = json.loads(line)
        row.setdefault("session_id", f"r{number}")
        if session and session[0]["session_id"] != row["session_id"]:
            yield _session(session)
            session = []
        session.append(row)
    if session:
        yield _session(session)


def _session(rows: Sequence[dict[str, object]]) -> Session:
    turns = []
    for place, row in enumerate(rows):
        blocks = row.get("hash_ids", []) if place == 0 else []  # later turns share their session's history alone
        turns.append(Turn(_number(row["input_length"]), _number(row["output_length"]),
                          float(str(row.get("delay", 0))) / 1e3, tuple(blocks)))  # type: ignore[arg-type]
    return Session(str(rows[0]["session_id"]), tuple(turns), float(str(rows[0].get("timestamp", 0))) / 1e3)


def _number(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no number of tokens")
    return value


def _scaled(session: Session, begin: float, time_scale: float, token_scale: float) -> Session:
    def tokens(count: int) -> int:
        return max(1, round(count * token_scale))

    turns = tuple(Turn(tokens(t.new), tokens(t.output), t.delay * time_scale, t.blocks, tokens(t.block))
                  for t in session.turns)
    return Session(session.name, turns, (session.start - begin) * time_scale)
