"""Sends sessions at their times, at most so many at once, and keeps what was measured."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from qcn_compile.runtime.bench.client import HttpError, Server
from qcn_compile.runtime.bench.conversation import Chat, Plain, Reply
from qcn_compile.runtime.bench.workload import Session, Texts, Turn

_MARGIN = 64  # tokens of the context left alone: templates and the estimate of a text's tokens


@dataclass(frozen=True)
class Options:
    """How to send. `duration`: seconds after which nothing new begins; `timeout`: seconds a request may take."""

    model: str | None = None
    api: str = "chat"
    concurrency: int | None = None
    duration: float = 300.0
    timeout: float = 120.0
    ignore_eos: bool = True
    tools: bool = False
    temperature: float | None = None
    context_length: int | None = None


@dataclass
class Sample:
    """One request, in seconds and tokens. `new`: prompt tokens that were not sent before."""

    session: str
    turn: int
    sent: float = 0.0
    first: float | None = None
    end: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    new_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    error: str | None = None


@dataclass
class Run:
    """All samples, the seconds they took, and turns that were not sent, by reason."""

    samples: list[Sample] = field(default_factory=list)
    wall: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)
    most_at_once: int = 0

    def skip(self, reason: str, count: int = 1) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + count


class Runner:
    """One run against one server."""

    def __init__(self, server: Server, options: Options, texts: Texts,
                 progress: Callable[[Run], None] | None = None) -> None:
        self._server, self._options, self._texts = server, options, texts
        self._progress = progress
        self._known: set[tuple[int, ...]] = set()
        self._live = 0
        self.run = Run()

    async def go(self, sessions: Iterable[Session]) -> Run:
        """Send everything; returns when the last answer came or ran out of time."""
        options, started = self._options, time.perf_counter()
        room = asyncio.Semaphore(options.concurrency) if options.concurrency else None
        end = started + options.duration
        tasks: set[asyncio.Task[None]] = set()
        for session in sessions:
            await asyncio.sleep(min(started + session.start, end) - time.perf_counter())
            late = room is not None and not await _acquire(room, end)
            if late or time.perf_counter() >= end:
                self.run.skip("no time left", len(session.turns))
                continue
            task = asyncio.create_task(self._session(session, end, room))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        self.run.wall = time.perf_counter() - started
        return self.run

    async def _session(self, session: Session, end: float, room: asyncio.Semaphore | None) -> None:
        self._live += 1
        self.run.most_at_once = max(self.run.most_at_once, self._live)
        try:
            await self._turns(session, end)
        finally:
            self._live -= 1
            if room is not None:
                room.release()

    async def _turns(self, session: Session, end: float) -> None:
        talk: Chat | Plain = Chat(self._options.tools) if self._options.api == "chat" else Plain()
        length = 0
        for place, turn in enumerate(session.turns):
            left = len(session.turns) - place
            if place:
                await asyncio.sleep(max(0.0, min(turn.delay, end - time.perf_counter())))
            if time.perf_counter() >= end:
                return self.run.skip("no time left", left)
            context = self._options.context_length
            if context is not None and length + turn.new + turn.output + _MARGIN > context:
                return self.run.skip("longer than the context", left)
            sample = Sample(session.name, place)
            shared = self._shared(turn)
            await self._turn(talk, turn, sample)
            self._count(sample, length, shared)
            if sample.error is not None:
                return self.run.skip("after a failed turn", left - 1) if left > 1 else None
            length = (sample.prompt_tokens or length + turn.new) + sample.completion_tokens
        return None

    async def _turn(self, talk: Chat | Plain, turn: Turn, sample: Sample) -> None:
        body = talk.ask(self._texts.of(turn, f"{sample.session} {sample.turn}")) | {
            "max_tokens": turn.output, "stream": True, "stream_options": {"include_usage": True}}
        if self._options.ignore_eos:
            body["ignore_eos"] = True
        for name in ("model", "temperature"):
            if (value := getattr(self._options, name)) is not None:
                body[name] = value
        reply = Reply()
        sample.sent = time.perf_counter()
        try:
            async with asyncio.timeout(self._options.timeout):
                await self._stream(talk, body, reply, sample)
        except TimeoutError:
            sample.error = "timeout"
        except HttpError as error:
            sample.error = error.kind
        except (OSError, ValueError) as error:
            sample.error = type(error).__name__
        sample.end = time.perf_counter()
        talk.answered(reply)

    async def _stream(self, talk: Chat | Plain, body: dict[str, Any], reply: Reply, sample: Sample) -> None:
        async with self._server.request("POST", talk.path, body) as answer:
            await answer.check()
            last = None
            async with aclosing(answer.events()) as events:  # type: ignore[type-var]
                async for event in events:
                    if "error" in event:
                        raise HttpError("error event", str(event["error"]))
                    if event.get("usage"):
                        _usage(event["usage"], sample)
                    held = [talk.read(choice, reply) for choice in event.get("choices") or ()]
                    if not any(held):
                        continue
                    now = time.perf_counter()
                    if last is None:
                        sample.first = now
                    else:
                        sample.gaps.append(now - last)
                    last = now

    def _count(self, sample: Sample, before: int, shared: int) -> None:
        """Keep a sample; new in its prompt is all but its own history, blocks that others sent, and what was cached."""
        if sample.prompt_tokens is not None:
            sample.new_tokens = max(0, sample.prompt_tokens - max(before + shared, sample.cached_tokens or 0))
        self.run.samples.append(sample)
        if self._progress is not None:
            self._progress(self.run)

    def _shared(self, turn: Turn) -> int:
        """Tokens of the leading blocks that were sent before in this run."""
        known = 0
        for key in itertools.accumulate(((block,) for block in turn.blocks), _chain):
            if key in self._known:
                known += 1
            self._known.add(key)
        return min(known * turn.block, turn.new)


def _chain(before: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """A name for a block after others."""
    return (hash(before), *block)


async def _acquire(room: asyncio.Semaphore, end: float) -> bool:
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(0.0, end - time.perf_counter())):
            return await room.acquire()
    except TimeoutError:
        return False


def _usage(usage: dict[str, Any], sample: Sample) -> None:
    sample.prompt_tokens = usage.get("prompt_tokens")
    sample.completion_tokens = usage.get("completion_tokens") or 0
    details = usage.get("prompt_tokens_details")
    if details and details.get("cached_tokens") is not None:
        sample.cached_tokens = details["cached_tokens"]
