"""The loop's owner: requests in, steps over the executable, pieces of text out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Protocol

import numpy as np

from qcn_compile.errors import CapacityError, UsageError
from qcn_compile.runtime.batch import Capacity, Span
from qcn_compile.runtime.choice import PENDING, Chooser, Pick
from qcn_compile.runtime.detokenize import Detokenizer
from qcn_compile.runtime.flight import Flight, Ready
from qcn_compile.runtime.kv_cache import PageAllocator
from qcn_compile.runtime.output import Live, Output, sample_row
from qcn_compile.runtime.prefix.cache import PrefixCache
from qcn_compile.runtime.request import FinishReason, Request, SamplingParams
from qcn_compile.runtime.sampler import Constraint, Sample, Sampler
from qcn_compile.runtime.scheduler import Chunk, Scheduler, SchedulerLimits
from qcn_compile.runtime.speculation.speculation import Speculation
from qcn_compile.runtime.state_slots import SlotAllocator


class Runner(Protocol):
    """What computes a step: the executable, or a stand-in in tests. One that is `Choosing` chooses tokens itself."""

    @property
    def capacities(self) -> Sequence[Capacity]: ...

    def run(self, spans: Sequence[Span]) -> np.ndarray:
        """Logits of the wanted rows, f32 [R, vocab], valid until the next call."""
        ...


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the model and its caches, and the tokens that end a text. `prefill_chunk` None: the largest plan's."""

    vocab_size: int
    page_size: int
    context_length: int
    pages: int
    slots: int
    eos_token_ids: frozenset[int] = frozenset()
    prefill_chunk: int | None = None


class Engine:
    """Continuous batching over one runner. Not thread-safe: one thread adds, steps and aborts.

    Where the device chooses tokens, a step is launched before the tokens of the one before are read: its requests go on
    with a token that only the device knows, PENDING here. One that turns out to have ended was computed once too often,
    which nothing sees. Grammars and logprobs need the host in between, and drafts too: then each step is read at once.
    """

    def __init__(self, runner: Runner, token_bytes: Callable[[int], bytes], config: EngineConfig,
                 prefixes: Callable[[PageAllocator], PrefixCache] | None = None,
                 speculation: Speculation | None = None) -> None:
        self.config = config
        self.pages = PageAllocator(config.pages)
        self.slots = SlotAllocator(config.slots)
        self.prefixes = None if prefixes is None else prefixes(self.pages)
        self._runner, self._token_bytes = runner, token_bytes
        chunk = max(c.tokens for c in runner.capacities) if config.prefill_chunk is None else config.prefill_chunk
        limits = SchedulerLimits(config.slots, chunk, config.page_size, config.context_length)
        self.speculation = speculation
        self._scheduler = Scheduler(limits, runner.capacities, self.pages, self.slots, self.prefixes, speculation)
        self._live: dict[str, Live] = {}
        self._flight: Flight | None = None
        self._arrivals = 0

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._live)

    def add_request(self, prompt: Sequence[int], params: SamplingParams, request_id: str | None = None,
                    constraint: Constraint | None = None, after: str | None = None) -> str:
        """Queue token ids; returns the request's id. `max_tokens` is clipped to what the context leaves.

        `after`: the id of a request with the same prompt; this one starts when that prompt is computed and cached.
        `constraint` bounds each next token; it must allow an end token where the output may end.
        Raises UsageError for an empty prompt, unknown token ids or an id in use, CapacityError for a prompt longer
        than the context.
        """
        prompt = check_tokens(prompt, self.config.vocab_size)
        name = f"request-{self._arrivals}" if request_id is None else request_id
        if name in self._live:
            raise UsageError(f"request id {name!r} is in use; give another")
        room = self.config.context_length - len(prompt)
        if room < 1:
            raise CapacityError(f"the prompt has {len(prompt)} tokens, the context holds {self.config.context_length} "
                                "with at least one new token; shorten the prompt, or use a larger --context-length")
        request = Request(name, prompt, params, min(room, params.max_tokens or room), self._arrivals)
        first = None if after is None else self._live.get(after)
        request.after = None if first is None else first.request
        self._scheduler.add(request)
        self._arrivals += 1
        sampler = Sampler(params, prompt, self.config.vocab_size, constraint)
        chooser = Chooser(request, constraint) if self._on_device(params, constraint) else None
        reader = Detokenizer(self._token_bytes, params.stop, params.include_stop)
        self._live[name] = Live(request, sampler, reader, chooser)
        return name

    def _on_device(self, params: SamplingParams, constraint: Constraint | None) -> bool:
        """Whether the device chooses a request's tokens: not when log probabilities are asked for, nor when drafts
        would change what the tokens after them depend on."""
        changing = self.speculation is not None and (params.penalised or constraint is not None)
        return hasattr(self._runner, "launch") and params.logprobs is None and not changing

    def abort(self, request_id: str) -> Output | None:
        """End a request now; its last output, or None when it is not there (any more)."""
        live = self._live.get(request_id)
        return None if live is None else self._finish(live, FinishReason.abort, "", ())

    def abort_all(self) -> None:
        """End every request."""
        for request_id in list(self._live):
            self.abort(request_id)

    def runs(self, request_id: str) -> bool:
        """Whether a request waits or runs."""
        return request_id in self._live

    def step(self, launching: Callable[[], None] | None = None) -> list[Output]:
        """Run or launch a step and return what is new. Raises CapacityError when requests wait and none can run.

        `launching` is called before the device begins: the time to see to what earlier steps returned.
        """
        started = time.perf_counter()
        if self.speculation is not None and launching is not None:  # drafting takes a while
            launching()
        chunks = self._scheduler.schedule()
        if launching is not None:
            launching()
        before, self._flight = self._flight, self._launch(chunks, started) if chunks else None
        outputs = [] if before is None else self._land(before)
        if self._flight is not None and not self._flight.ahead:
            flight, self._flight = self._flight, None
            outputs += self._land(flight)
        if not chunks and before is None and self.unfinished:
            raise CapacityError("no request can run: its KV pages or state slots are held by sequences of step(); "
                                "release those first")
        return outputs

    def _launch(self, chunks: list[Chunk], started: float) -> Flight:
        decoding = all(chunk.request.decoding for chunk in chunks)
        drafted = any(chunk.drafts or chunk.request.lag for chunk in chunks)
        spans = [self._span(chunk) for chunk in chunks]
        picks = [pick for chunk in chunks if chunk.samples for pick in self._picks(chunk)]
        launch = getattr(self._runner, "launch", None)
        launched = Ready(self._runner.run(spans)) if launch is None else launch(spans, picks)
        ahead = launch is not None and self.speculation is None and all(p and p.constraint is None for p in picks)
        flight = Flight(chunks, spans, launched, picks, started, decoding, drafted, ahead)
        for chunk in chunks:
            if ahead or not chunk.samples:
                self._scheduler.advance(chunk, int(chunk.samples))
            if ahead and chunk.samples:
                flight.places[chunk.request.id] = len(chunk.request.tokens)
                chunk.request.tokens.append(PENDING)
        return flight

    def _picks(self, chunk: Chunk) -> list[Pick | None]:
        """One pick for each wanted row of a chunk; None where the host chooses."""
        chooser = self._live[chunk.request.id].chooser
        return [None] * chunk.rows if chooser is None else [*chooser.picks(chunk.rows)]

    def _land(self, flight: Flight) -> list[Output]:
        """Read a step's results."""
        tokens = flight.launched.tokens()
        logits = flight.launched.logits() if None in flight.picks else None
        outputs, row = [], 0
        for chunk in flight.chunks:
            if chunk.samples:
                rows = range(row, row + chunk.rows)
                row += chunk.rows
                if not chunk.request.finished:
                    outputs.append(self._append(flight, chunk, rows, tokens, logits))
        if self.speculation is not None:
            self.speculation.computed([(c.request, span) for c, span in zip(flight.chunks, flight.spans, strict=True)])
        if self.speculation is not None and flight.decoding:
            self.speculation.times.add(len(flight.chunks), flight.drafted, time.perf_counter() - flight.started)
        return outputs

    def check_integrity(self, others: Sequence[tuple[int, Sequence[int]]] = ()) -> None:
        """No page or slot leaked, nothing held twice; `others`: (slot, pages) held outside the engine."""
        self._scheduler.check_integrity(others)
        if self._scheduler.unfinished != len(self._live):
            raise AssertionError("the engine and its scheduler count different requests")

    def _span(self, chunk: Chunk) -> Span:
        request = chunk.request
        assert request.table is not None and request.slot is not None and request.state is not None
        tokens = [*request.tokens[request.computed:request.computed + chunk.count], *chunk.drafts]
        if tokens[-1] == PENDING:
            tokens[-1] = -1 - request.slot
        into = self.speculation.other(request) if chunk.drafts and self.speculation is not None else None
        return Span(tokens, request.computed, request.state, request.table.pages, chunk.rows, into)

    def _append(self, flight: Flight, chunk: Chunk, rows: range, tokens: np.ndarray,
                logits: np.ndarray | None) -> Output:
        """A request's next tokens, one after each row while they are those drafted; see whether it ends.

        That is rejection sampling for drafts without a distribution of their own: a draft is taken with the
        probability that it has, another token with its own.
        """
        request = chunk.request
        live = self._live[request.id]
        replayed, samples, text, reason = request.lag, [], "", None
        for row, draft in zip(rows, (*chunk.drafts, None), strict=True):
            sample = sample_row(live, flight.picks[row], int(tokens[row]), logits, row)
            if live.first is None:
                live.first = time.perf_counter()
            samples.append(sample)
            if flight.ahead:
                request.tokens[flight.places[request.id]] = sample.token
                generated = flight.places[request.id] + 1 - len(request.prompt)
            else:
                request.tokens.append(sample.token)
                generated = request.generated
            piece, reason = self._read(live, sample.token, generated)
            text += piece
            if reason is not None or sample.token != draft:
                break
        if not flight.ahead:
            self._scheduler.advance(chunk, len(samples))
        if self.speculation is not None:
            self.speculation.verified(request, len(chunk.drafts), len(samples), replayed, len(flight.chunks))
        if reason is not None:
            return self._finish(live, reason, text, tuple(samples))
        return Output(request.id, text, tuple(s.token for s in samples), None, tuple(samples), cached=live.cached())

    def _read(self, live: Live, token: int, generated: int) -> tuple[str, FinishReason | None]:
        """The text that a new token adds, and why the request ends with it, if it does."""
        request, params = live.request, live.request.params
        ends = params.stop_token_ids if params.ignore_eos else {*params.stop_token_ids, *self.config.eos_token_ids}
        if token in ends:
            return "", FinishReason.stop
        text = live.detokenizer.push((token,))
        if live.detokenizer.stopped:
            return text, FinishReason.stop
        return text, FinishReason.length if generated >= request.max_tokens else None

    def _finish(self, live: Live, reason: FinishReason, text: str, samples: tuple[Sample, ...]) -> Output:
        text += live.detokenizer.finish()
        if live.detokenizer.stopped:
            reason = FinishReason.stop
        if live.request.tokens[-1] == PENDING:  # of a step that is still on its way
            live.request.tokens.pop()
        self._scheduler.finish(live.request, reason)
        del self._live[live.request.id]
        return Output(live.request.id, text, tuple(s.token for s in samples), reason, samples, live.timing(),
                      live.detokenizer.matched, live.cached())


def check_tokens(tokens: Sequence[int], vocab_size: int) -> list[int]:
    """The tokens as a list of plain ints. Raises UsageError when empty, or naming the first that is no token id."""
    try:
        ids = [index(token) for token in tokens]
    except TypeError:
        raise UsageError(f"token ids must be whole numbers, not {tokens!r:.80}") from None
    if not ids:
        raise UsageError("the prompt is empty: give at least one token")
    for place, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise UsageError(f"token {token} at position {place} is outside the vocabulary of {vocab_size}")
    return ids
