"""What is counted while serving: Prometheus metrics, and the live numbers of the page at /."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from qcn_compile.runtime.output import Output
from qcn_compile.runtime.server.bridge import Ticket

_TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_WINDOW = 5.0  # seconds behind the rate on the page


class _Total(Collector):
    """A counter whose number somebody else keeps."""

    def __init__(self, name: str, text: str, read: Callable[[], float]) -> None:
        self._name, self._text, self._read = name, text, read

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self._name, self._text, value=self._read())


class _Histogram(Collector):
    """Counts by bucket, added up when they are read: an observation comes with every token."""

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        self._name, self._text, self._buckets = name, text, buckets
        self._counts, self._sum = [0] * (len(buckets) + 1), 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        names = [*(str(float(edge)) for edge in self._buckets), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = to = CollectorRegistry()
        self.requests = Counter("qcn_http_requests", "Answers by path and status", ["path", "status"], registry=to)
        self._ended = Counter("qcn_requests_finished", "Requests of the engine that ended", ["reason"], registry=to)
        self._ttft = _Histogram("qcn_time_to_first_token_seconds", "Arrival to first token", _TTFT)
        self._itl = _Histogram("qcn_inter_token_seconds", "Between two tokens of a request", _ITL)
        to.register(self._ttft)
        to.register(self._itl)
        self._finished = {reason: self._ended.labels(reason) for reason in ("stop", "length", "abort")}
        self._recent: deque[tuple[float, int]] = deque()
        self.totals = {"prompt_tokens": 0, "generated_tokens": 0, "cached_tokens": 0, "requests": 0}
        for key, name, text in (("prompt_tokens", "qcn_prompt_tokens", "Prompt tokens taken in"),
                                ("generated_tokens", "qcn_generation_tokens", "Tokens generated"),
                                ("cached_tokens", "qcn_cached_tokens", "Prompt tokens that were not computed again")):
            self.count(name, text, partial(self.totals.__getitem__, key))

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A number read when it is asked for."""
        Gauge(name, text, registry=self._registry).set_function(read)

    def count(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A total that is kept elsewhere, read when it is asked for."""
        self._registry.register(_Total(name, text, read))

    def observe(self, ticket: Ticket, output: Output, now: float) -> None:
        """One output of a request reached the event loop."""
        count = len(output.token_ids)
        if ticket.last_output is None:
            self._ttft.observe(now - ticket.arrived)
            self._begin(ticket)
        else:
            self._itl.observe(now - ticket.last_output)
        self.totals["generated_tokens"] += count
        self._recent.append((now, count))
        while self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()
        if output.finish_reason is not None:
            self._finished[output.finish_reason.value].inc()

    def _begin(self, ticket: Ticket) -> None:
        self.totals["prompt_tokens"] += len(ticket.prompt)
        self.totals["requests"] += 1

    def add_cached(self, count: int) -> None:
        """Prompt tokens that a cache saved."""
        if count:
            self.totals["cached_tokens"] += count

    def rate(self) -> float:
        """Tokens per second over the last seconds."""
        now = time.perf_counter()
        recent = [(at, count) for at, count in self._recent if at >= now - _WINDOW]
        if not recent:
            return 0.0
        return sum(count for _, count in recent) / max(now - recent[0][0], 0.5)

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return bytes(generate_latest(self._registry))
