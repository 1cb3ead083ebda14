"""From a checked job to deltas: the answers of one request, streamed or whole, parsed and counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from qcn_compile.runtime.output import Output
from qcn_compile.runtime.parsing.events import (
    Content,
    Event,
    EventList,
    Reasoning,
    ToolCallArguments,
    ToolCallFinished,
    ToolCallStarted,
)
from qcn_compile.runtime.request import FinishReason, SamplingParams
from qcn_compile.runtime.sampler import Constraint, Sample
from qcn_compile.runtime.server.bridge import Bridge, Ticket


class Parser(Protocol):
    """What turns text into events: `parsing.OutputParser`, or `PlainText`."""

    def feed(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


class PlainText:
    """No reasoning and no tools: all text is content."""

    def feed(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []


@dataclass(frozen=True)
class Job:
    """What to generate. `choices` answers for each prompt; `parser` and `constraint` make a fresh one for each."""

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    choices: int = 1
    parser: Callable[[], Parser] = PlainText
    constraint: Callable[[], Constraint] | None = None
    parallel_calls: bool = True


@dataclass(frozen=True)
class Delta:
    """What is new in one answer. The last one has a finish reason: stop, length or tool_calls."""

    index: int
    events: tuple[Event, ...]
    samples: tuple[Sample, ...]
    finish_reason: str | None = None
    matched_stop: str | None = None


@dataclass
class Call:
    """A whole tool call."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Answer:
    """A whole answer: its deltas added up."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    finish_reason: str = "stop"
    matched_stop: str | None = None

    def add(self, delta: Delta) -> None:
        """Take a delta in."""
        for event in delta.events:
            match event:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case ToolCallStarted(_, id, name):
                    self.calls.append(Call(id, name))
                case ToolCallArguments(index, text):
                    self.calls[index].arguments += text
                case ToolCallFinished():
                    pass
        self.samples.extend(delta.samples)
        if delta.finish_reason is not None:
            self.finish_reason, self.matched_stop = delta.finish_reason, delta.matched_stop


@dataclass
class Usage:
    """Tokens of one request, all its answers together."""

    prompt: int = 0
    completion: int = 0
    reasoning: int = 0
    cached: int = 0
    accepted: int = 0
    refused: int = 0


class _Stream:
    """One answer on its way: its ticket, its parser, and what was seen."""

    def __init__(self, index: int, ticket: Ticket, job: Job) -> None:
        self.index, self.ticket, self.job = index, ticket, job
        self.finished = False
        self._parser = job.parser()
        self._calls = 0
        self._thinking: bool | None = None  # None: neither reasoning nor anything else yet
        self._unsure = 0  # tokens that came while it was None

    def deltas(self, usage: Usage) -> Delta | None:
        """All that came since last time as one delta."""
        outputs = self.ticket.take()
        if not outputs:
            return None
        if len(outputs) == 1:  # as nearly always
            events, samples = self._read(outputs[0], usage), outputs[0].samples
        else:
            joined = EventList()
            for output in outputs:
                for event in self._read(output, usage):
                    joined.add(event)
            events, samples = joined.take(), tuple(sample for output in outputs for sample in output.samples)
        reason = outputs[-1].finish_reason
        if not samples and reason is None:
            return None
        kept = self._within_limit(events)
        for event in kept:
            self._calls += type(event) is ToolCallStarted
        cut = len(kept) < len(events)
        self.finished = cut or reason is not None
        name = self._reason(reason, cut) if self.finished else None
        return Delta(self.index, tuple(kept), samples, name, outputs[-1].matched_stop)

    def _read(self, output: Output, usage: Usage) -> list[Event]:
        """The events of one output, its tokens counted."""
        events = self._parser.feed(output.text)
        if output.finish_reason is not None:
            events = [*events, *self._parser.finish()]
        self._count(len(output.token_ids), events, usage)
        if output.timing is not None:
            usage.accepted += output.timing.accepted
            usage.refused += output.timing.drafted - output.timing.accepted
        if output.cached and self.index % self.job.choices == 0:  # prompt tokens are counted once, too
            usage.cached += output.cached
        return events

    def _count(self, tokens: int, events: Sequence[Event], usage: Usage) -> None:
        usage.completion += tokens
        if self._thinking is None and events:
            self._thinking = isinstance(events[0], Reasoning)
            usage.reasoning += self._unsure if self._thinking else 0
        if self._thinking is None:
            self._unsure += tokens
        elif self._thinking:
            usage.reasoning += tokens
            self._thinking = all(isinstance(event, Reasoning) for event in events)

    def _within_limit(self, events: list[Event]) -> list[Event]:
        """Everything up to where a second call starts that may not be."""
        if self.job.parallel_calls:
            return events
        for place, event in enumerate(events):
            if isinstance(event, ToolCallStarted) and event.index > 0:
                return events[:place]
        return events

    def _reason(self, reason: FinishReason | None, cut: bool) -> str:
        if reason is FinishReason.length and not cut:
            return "length"
        return "tool_calls" if self._calls else "stop"


class Generation:
    """A job on the engine. Close it in any case: that ends what still runs."""

    def __init__(self, bridge: Bridge, job: Job) -> None:
        self.usage = Usage(prompt=sum(len(prompt) for prompt in job.prompts))
        self._bridge, self._wake = bridge, asyncio.Event()
        self._streams: list[_Stream] = []
        wanted = [(prompt, _nth(job.params, choice)) for prompt in job.prompts for choice in range(job.choices)]
        bridge.check_open(len(wanted))
        constraints = [None if job.constraint is None else job.constraint() for _ in wanted]
        first: Ticket | None = None
        for place, ((prompt, params), constraint) in enumerate(zip(wanted, constraints, strict=True)):
            leads = place % job.choices == 0
            ticket = bridge.submit(prompt, params, constraint, self._wake, None if leads else first)
            first = ticket if leads else first
            self._streams.append(_Stream(len(self._streams), ticket, job))

    async def deltas(self) -> AsyncIterator[Delta]:
        """What is new, as it comes, until every answer has ended. Raises ApiError when one fails."""
        running = list(self._streams)
        while running:
            await self._wake.wait()
            self._wake.clear()
            for stream in running:
                delta = stream.deltas(self.usage)
                if stream.ticket.error is not None:
                    self._wake.set()  # raised by the next take
                if delta is not None:
                    yield delta
                if stream.finished:
                    self._bridge.abort(stream.ticket)
            running = [stream for stream in running if not stream.finished]

    async def answers(self) -> list[Answer]:
        """Every answer in whole."""
        whole = [Answer() for _ in self._streams]
        async for delta in self.deltas():
            whole[delta.index].add(delta)
        return whole

    def close(self) -> None:
        """End what still runs."""
        for stream in self._streams:
            self._bridge.abort(stream.ticket)


def _nth(params: SamplingParams, choice: int) -> SamplingParams:
    """The n-th answer's own seed, so that answers differ and each can be repeated."""
    if choice == 0 or params.seed is None:
        return params
    return replace(params, seed=(params.seed + choice) % 2**64)
