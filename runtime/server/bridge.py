"""The seam between asyncio and the engine's thread: requests go down, batches of outputs come up."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from qcn_compile.errors import QcnError
from qcn_compile.runtime.output import Output
from qcn_compile.runtime.request import FinishReason, SamplingParams
from qcn_compile.runtime.sampler import Constraint
from qcn_compile.runtime.server.doorbell import Doorbell
from qcn_compile.runtime.server.errors import ApiError, from_runtime, overloaded


class EngineLike(Protocol):
    """What the bridge needs of an engine."""

    @property
    def unfinished(self) -> int: ...

    def add_request(self, prompt: Sequence[int], params: SamplingParams, request_id: str | None = None,
                    constraint: Constraint | None = None, after: str | None = None) -> str: ...

    def abort(self, request_id: str) -> Output | None: ...

    def step(self, launching: Callable[[], None] = ...) -> list[Output]: ...


@dataclass(eq=False)
class Ticket:
    """One request on its way through the engine. `wake` is set when outputs came or it failed."""

    id: str
    prompt: Sequence[int]
    params: SamplingParams
    constraint: Constraint | None
    wake: asyncio.Event
    after: str | None = None
    outputs: list[Output] = field(default_factory=list)
    error: ApiError | None = None
    done: bool = False
    arrived: float = field(default_factory=time.perf_counter)
    last_output: float | None = None
    timer: asyncio.TimerHandle | None = None

    def take(self) -> list[Output]:
        """Everything that came since last time. Raises the request's error when there is nothing left before it."""
        if self.error is not None and not self.outputs:
            raise self.error
        taken, self.outputs = self.outputs, []
        return taken


_PAUSE = 0.001  # seconds between announcements: tokens that come faster than that share one
Observer = Callable[[Ticket, Output, float], None]
Command = Callable[[], None]


class Bridge:
    """Owns the engine's thread. All methods but `_turn` and what it calls run on the event loop."""

    def __init__(self, engine: EngineLike, slots: int, max_queued: int, timeout: float | None,
                 observe: Observer | None = None) -> None:
        self._engine, self._timeout, self._observe = engine, timeout, observe
        self._limit = slots + max_queued
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._tickets: dict[str, Ticket] = {}
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bell: Doorbell | None = None
        self._announced = 0.0
        self._idle = asyncio.Event()
        self._idle.set()
        self.failure: BaseException | None = None
        self.draining = False
        self.on_failure: Callable[[], None] = lambda: None

    @property
    def live(self) -> int:
        """Requests that wait or run."""
        return len(self._tickets)

    def start(self) -> None:
        """Start the thread; outputs come to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._bell = Doorbell(self._loop)
        self._thread.start()

    def check_open(self, count: int = 1) -> None:
        """Raise the 503 that `count` new requests would get now."""
        if self.failure is not None:
            raise from_runtime(self.failure)
        if self.draining:
            raise overloaded("the server is shutting down; try another one, or later", 5)
        if self.live + count > self._limit:
            raise overloaded(f"{self.live} requests run or wait and {self._limit} may; try again later", 1)

    def submit(self, prompt: Sequence[int], params: SamplingParams, constraint: Constraint | None,
               wake: asyncio.Event, after: Ticket | None = None) -> Ticket:
        """Queue a request that was checked before; `after` has the same prompt and computes it for both.

        Raises ApiError 503 when too many wait.
        """
        self.check_open()
        first = None if after is None else after.id
        ticket = Ticket(f"r{next(self._numbers)}", prompt, params, constraint, wake, first)
        self._tickets[ticket.id] = ticket
        self._idle.clear()
        if self._timeout is not None and self._loop is not None:
            ticket.timer = self._loop.call_later(self._timeout, self._expire, ticket)
        self._commands.put(lambda: self._add(ticket))
        return ticket

    def abort(self, ticket: Ticket) -> None:
        """End a request within one step, silently."""
        if not ticket.done:
            self._close(ticket)
            self._commands.put(lambda: self._abort(ticket.id))

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, let the others end for `timeout` seconds, fail the rest."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            for ticket in list(self._tickets.values()):
                self._end(ticket, ApiError(503, "the server shut down before the answer was complete", code="shutdown"))

    def fail(self, error: BaseException) -> None:
        """Refuse everything from now on, from any thread: something the engine needs is gone."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._fail, error)

    def stop(self, timeout: float = 10.0) -> bool:
        """End the thread after its current step. Whether it ended in time."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)
        ended = not self._thread.is_alive()
        if ended and self._bell is not None:
            self._bell.close()
        return ended

    def _expire(self, ticket: Ticket) -> None:
        self._end(ticket, ApiError(504, f"the request took longer than {self._timeout:g} s (--request-timeout)",
                                   code="request_timeout"))

    def _end(self, ticket: Ticket, error: ApiError) -> None:
        self.abort(ticket)
        ticket.error = error
        ticket.wake.set()

    def _close(self, ticket: Ticket) -> None:
        ticket.done = True
        self._tickets.pop(ticket.id, None)
        if ticket.timer is not None:
            ticket.timer.cancel()
        if not self._tickets:
            self._idle.set()

    def _deliver(self, outputs: list[Output]) -> None:
        now = time.perf_counter()
        for output in outputs:
            ticket = self._tickets.get(output.request_id)
            if ticket is not None:
                self._hand_over(ticket, output, now)

    def _hand_over(self, ticket: Ticket, output: Output, now: float) -> None:
        if output.finish_reason is FinishReason.abort:
            ticket.error = ApiError(500, "the engine ended this request", code="aborted")
        else:
            ticket.outputs.append(output)
            if self._observe is not None:
                self._observe(ticket, output, now)
            ticket.last_output = now
        if output.finish_reason is not None:
            self._close(ticket)
        ticket.wake.set()

    def _refuse(self, ticket: Ticket, error: BaseException) -> None:
        if not ticket.done:
            self._close(ticket)
            ticket.error = from_runtime(error)
            ticket.wake.set()

    def _fail(self, error: BaseException) -> None:
        if self.failure is not None:
            return
        self.failure = error
        for ticket in list(self._tickets.values()):
            self._refuse(ticket, error)
        self.on_failure()

    # the engine's thread from here on

    def _ring(self) -> None:
        assert self._bell is not None
        self._bell.ring()

    def _announce(self) -> None:
        """The device is about to work."""
        now = time.perf_counter()
        if now - self._announced >= _PAUSE:
            self._announced = now
            self._ring()

    def _call(self, function: Callable[..., None], *arguments: object, ring: bool = True) -> None:
        assert self._bell is not None
        self._bell.post(partial(function, *arguments))
        if ring:
            self._bell.ring()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            self._call(self._fail, error)

    def _turn(self) -> bool:
        """Every waiting command, then one step. False at the end.

        A step's outputs are announced when the device works on the next one: the event loop's thread then finds this
        one outside the interpreter.
        """
        wait = not self._engine.unfinished
        while wait or not self._commands.empty():
            self._ring()
            command = self._commands.get()
            if command is None:
                return False
            command()
            wait = False
        if self._engine.unfinished and (outputs := self._engine.step(self._announce)):
            self._call(self._deliver, outputs, ring=False)
        return True

    def _add(self, ticket: Ticket) -> None:
        if ticket.done:  # the client left while it waited for this thread
            return
        try:
            self._engine.add_request(ticket.prompt, ticket.params, ticket.id, ticket.constraint,
                                     ticket.after)
        except QcnError as error:
            self._call(self._refuse, ticket, error)

    def _abort(self, request_id: str) -> None:
        self._engine.abort(request_id)
