"""A run as a Chrome trace: every step and every kernel of it on a time line, for chrome://tracing or ui.perfetto.dev.

The format is trace-event JSON ("Trace Event Format", Google): complete events (`ph` X) with start and length in
microseconds. Times are what the profile measured: timers of the host library on a CPU, events on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qcn_compile.artifact import Plan
from qcn_compile.errors import UsageError

STEPS, KERNELS = 1, 2  # rows (thread ids) of the time line


class Trace:
    """Collects steps; give it to a `Profile`, which feeds it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._steps: list[tuple[Plan, np.ndarray, float]] = []

    def add(self, plan: Plan, seconds: np.ndarray, at: float) -> None:
        """One step that began at `at` (seconds of any clock): seconds f64 [launches], one launch after the other."""
        self._steps.append((plan, seconds.copy(), at))

    def events(self) -> Iterator[dict[str, Any]]:
        """The trace events, the time line starting at 0."""
        yield _named("process_name", 0, self.name)
        yield _named("thread_name", STEPS, "steps")
        yield _named("thread_name", KERNELS, "kernels")
        first = self._steps[0][2] if self._steps else 0.0
        for index, (plan, seconds, at) in enumerate(self._steps):
            start = 1e6 * (at - first)
            yield _complete(f"{plan.entry} {plan.name}", "step", STEPS, start, 1e6 * float(seconds.sum()),
                            {"step": index, "launches": len(plan.launches)})
            starts = start + 1e6 * np.concatenate([[0.0], np.cumsum(seconds)[:-1]])
            for launch, begun, spent in zip(plan.launches, starts.tolist(), seconds.tolist(), strict=True):
                rate = {"GB/s": round(launch.bytes / spent / 1e9, 3)} if launch.bytes and spent else {}
                yield _complete(launch.kernel, launch.op.partition(" ")[0], KERNELS, begun, 1e6 * spent,
                                {"op": launch.op, "location": launch.location, "bytes": launch.bytes,
                                 "flops": launch.flops, **rate})

    def write(self, file: Path) -> None:
        """Write the trace as JSON. Raises UsageError naming the file."""
        try:
            file.write_text(json.dumps({"traceEvents": list(self.events()), "displayTimeUnit": "ns"}), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write the trace {file}: {error.strerror}; name another file") from None


def _named(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}


def _complete(name: str, kind: str, thread: int, start: float, length: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "cat": kind, "ph": "X", "pid": 1, "tid": thread, "ts": start, "dur": length, "args": args}
