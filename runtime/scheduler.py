"""Which tokens of which requests run in the next step: continuous batching with chunked prefill. No device here."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qcn_compile.errors import CapacityError
from qcn_compile.runtime.batch import Capacity
from qcn_compile.runtime.kv_cache import BlockTable, PageAllocator
from qcn_compile.runtime.prefix.cache import PrefixCache
from qcn_compile.runtime.request import FinishReason, Request
from qcn_compile.runtime.speculation.speculation import Speculation
from qcn_compile.runtime.state_slots import SlotAllocator


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of a request, from its first uncomputed one on. `samples`: its next token is chosen after.

    drafts: guesses of what follows, computed along; a token is chosen after each as well.
    """

    request: Request
    count: int
    samples: bool
    drafts: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Wanted rows of logits."""
        return int(self.samples) + len(self.drafts)


@dataclass(frozen=True)
class SchedulerLimits:
    """`prefill_chunk`: prompt tokens per step, of all requests together, so that decoding ones wait no longer."""

    max_running: int
    prefill_chunk: int
    page_size: int
    context_length: int


class Scheduler:
    """First come, first served, with two rules for fairness.

    Decoding requests go first, those served longest ago before others. A prompt in progress leaves up to half of the
    step's prompt tokens to those behind it, so that a short prompt need not wait for a long one. When KV pages run out,
    the request that came last is preempted: it gives everything back and is computed again later, output included,
    but for what the prefix cache kept.
    """

    def __init__(self, limits: SchedulerLimits, capacities: Sequence[Capacity], pages: PageAllocator,
                 slots: SlotAllocator, prefixes: PrefixCache | None = None,
                 speculation: Speculation | None = None) -> None:
        self.limits = limits
        self._capacities = tuple(capacities)
        self._pages, self._slots = pages, slots
        self._prefixes, self._speculation = prefixes, speculation
        widths = range(max(c.sequences for c in capacities) + 1)
        self._decode_width = max(n for n in widths if self.room(n) >= n)
        self._mixed_width = max(n for n in widths if self.room(n + 1) == self.room(1))
        self._step = self._served = 0
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    @property
    def unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def room(self, sequences: int) -> int:
        """Most tokens a plan holds together with this many sequences that each want a row of logits."""
        return max((c.tokens for c in self._capacities if c.holds(0, sequences, sequences)), default=0)

    def add(self, request: Request) -> None:
        """Queue a request. Raises CapacityError when it could not run even alone."""
        need = -(-len(request.prompt) // self.limits.page_size)
        if need > self._pages.total:
            raise CapacityError(f"request {request.id}: its prompt needs {need} KV pages, there are {self._pages.total}"
                                "; shorten it, or start with more KV memory")
        insort(self.waiting, request, key=lambda r: r.arrival)

    def schedule(self) -> list[Chunk]:
        """The next step, at most one chunk a request. Empty when nothing waits, or nothing can run."""
        self._step += 1
        prompts = self._prompts()
        chunks = self._decodes(self._width(bool(prompts)))
        self._prefills(chunks, prompts)
        if self._speculation is not None:
            chunks = self._with_drafts(chunks, self._speculation)
        for chunk in chunks:
            self._served += 1
            chunk.request.last_served = self._served
        return chunks

    def advance(self, chunk: Chunk, chosen: int = 0) -> None:
        """Record that a chunk was computed and, after it, `chosen` tokens were added: those of drafts only so far."""
        request = chunk.request
        if chunk.drafts and chosen <= len(chunk.drafts):
            request.lag = request.remaining - 1
            return
        if chunk.drafts and self._speculation is not None:
            self._speculation.accept(request)
        request.computed += chunk.count + len(chunk.drafts)
        request.lag = 0
        if self._prefixes is not None and not chunk.samples:
            self._prefixes.advanced(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Take a request out and give its pages and slot back."""
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self._leave(request, store=True)
        if self._speculation is not None:
            self._speculation.ended(request)
        request.finish_reason = reason

    def check_integrity(self, others: Iterable[tuple[int, Sequence[int]]] = ()) -> None:
        """Every page and slot has exactly its owners: running requests, and `others` as (slot, pages) pairs."""
        others = list(others)
        tables = [request.table.pages.tolist() for request in self.running if request.table is not None]
        slots = [request.slot for request in self.running if request.slot is not None]
        if len(tables) != len(self.running) or len(slots) != len(self.running):
            raise AssertionError("a running request lacks its pages or its slot")
        if any(r.table is not None or r.slot is not None or r.computed for r in self.waiting):
            raise AssertionError("a waiting request holds pages, a slot or computed tokens")
        if any(r.table is not None and r.table.missing(r.computed) for r in self.running):
            raise AssertionError("a running request has computed tokens without pages")
        if self._speculation is not None:
            self._speculation.check_integrity(self.running)
        written = [page for r in self.running if r.table is not None
                   for page in r.table.pages[r.computed // self.limits.page_size:].tolist()]
        held = Counter(page for table in tables for page in table)
        if any(held[page] > 1 for page in written):
            raise AssertionError("a page that a running request writes is another's, too")
        kept = []
        if self._prefixes is not None:
            self._prefixes.check_integrity()
            kept = self._prefixes.page_lists()
        self._pages.check_integrity([*tables, *kept, *(pages for _, pages in others)])
        self._slots.check_integrity([*slots, *(slot for slot, _ in others)])

    def _prompts(self) -> list[Request]:
        """Prompts in progress, then waiting requests that find a slot, the first of them also pages."""
        started = sorted((r for r in self.running if not r.decoding), key=lambda r: r.arrival)
        startable = max(0, min(self._slots.free, self.limits.max_running - len(self.running)))
        ready = [request for request in self.waiting if not self._follows(request)]
        if startable and ready and not self._fits(ready[0]):
            startable = 0
        return started + ready[:startable]

    def _follows(self, request: Request) -> bool:
        """Whether a request waits for another one's prompt, which the prefix cache will have."""
        first = request.after
        if self._prefixes is None or first is None or first.finished:
            return False
        return first.computed < len(first.prompt)

    def _width(self, prompts: bool) -> int:
        """How many decode. With prompts at hand only as many as leave them the largest plan, or every other step."""
        if not prompts:
            return self._decode_width
        return self._mixed_width or self._decode_width * (self._step % 2)

    def _decodes(self, width: int) -> list[Chunk]:
        chosen: list[Request] = []
        for request in sorted(self.running, key=lambda r: (r.last_served, r.arrival)):
            if request.decoding and not request.ending and request.slot is not None and len(chosen) < width:
                used = sum(r.remaining for r in chosen)
                if used + request.remaining > self.room(len(chosen) + 1):
                    continue
                self._make_room(request)
                chosen = [r for r in chosen if r.slot is not None]
                if request.slot is not None:
                    chosen.append(request)
        return [Chunk(request, request.remaining, True) for request in chosen]

    def _with_drafts(self, chunks: list[Chunk], speculation: Speculation) -> list[Chunk]:
        """Add drafts to decoding requests as far as a plan and the free pages hold them."""
        tokens, rows = sum(chunk.count for chunk in chunks), sum(chunk.rows for chunk in chunks)
        asks = {}
        for place, chunk in enumerate(chunks):
            request = chunk.request
            if chunk.samples and request.decoding and request.generated:
                room = self._draft_room(tokens, len(chunks), rows, speculation.count)
                count = speculation.wanted(request, room)
                if count and self._free_pages(request, len(request.tokens) + count):
                    asks[place] = (request, count)
                    tokens, rows = tokens + count, rows + count
        for place, drafts in zip(asks, speculation.draft(list(asks.values())), strict=True):
            chunks[place] = replace(chunks[place], drafts=drafts)
        return chunks

    def _free_pages(self, request: Request, tokens: int) -> bool:
        """Give a request room for so many tokens if pages are free."""
        assert request.table is not None
        if request.table.missing(tokens) > self._pages.free:
            return False
        request.table.grow(tokens)
        return True

    def _draft_room(self, tokens: int, sequences: int, rows: int, most: int) -> int:
        """How many drafts a plan still holds in a step."""
        return max((n for n in range(most + 1)
                    if any(c.holds(tokens + n, sequences, rows + n) for c in self._capacities)), default=0)

    def _make_room(self, request: Request) -> None:
        """Pages for the request's next token, preempting later arrivals, and at last itself."""
        assert request.table is not None
        while self._pages.free < request.table.missing(len(request.tokens)) > self._pages.available:
            victim = max(self.running, key=lambda r: r.arrival)
            self._preempt(victim)
            if victim is request:
                return
        request.table.grow(len(request.tokens))

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        request.computed = 0
        request.preemptions += 1
        insort(self.waiting, request, key=lambda r: r.arrival)

    def _leave(self, request: Request, store: bool = False) -> None:
        assert request.table is not None and request.slot is not None
        if self._prefixes is not None:
            self._prefixes.keep(request, store=store)
        if self._speculation is not None:
            self._speculation.left(request)
        request.table.release()
        self._slots.release(request.slot)
        request.table = request.slot = request.state = None
        self.running.remove(request)

    def _prefills(self, chunks: list[Chunk], prompts: list[Request]) -> None:
        """Fill the step up with prompt tokens."""
        left = self.limits.prefill_chunk
        behind = sum(request.remaining for request in prompts)
        for request in prompts:
            behind -= request.remaining
            used = sum(chunk.count for chunk in chunks)
            budget = min(left, self.room(len(chunks) + 1) - used)
            if budget <= 0 or not (request.slot is not None or self._admit(request)):
                return
            count = min(request.remaining, max(budget - behind, -(-budget // 2)))
            if self._prefixes is not None:
                count = self._prefixes.cut(request, count)
            chunks.append(Chunk(request, count, count == request.remaining))
            left -= count

    def _fits(self, request: Request) -> bool:
        """Whether there are pages for all its tokens, and a spare one for each running request."""
        need = -(-len(request.tokens) // self.limits.page_size) + len(self.running)
        if need <= self._pages.free:
            return True
        shared = 0 if self._prefixes is None else self._prefixes.busy_pages(request.tokens)
        return need - shared <= self._pages.available

    def _admit(self, request: Request) -> bool:
        """Start a waiting request, unless decoding ones took its pages meanwhile."""
        if not self._fits(request):
            return False
        request.table = BlockTable(self._pages, self.limits.page_size, self.limits.context_length)
        request.slot = request.state = self._slots.acquire()
        try:
            if self._prefixes is not None:
                self._prefixes.resume(request)
            request.table.grow(len(request.tokens))
        except CapacityError:  # the pages it was to share with others could not be
            request.table.release()
            self._slots.release(request.slot)
            request.table = request.slot = request.state = None
            request.computed = 0
            return False
        self.waiting.remove(request)
        self.running.append(request)
        return True
