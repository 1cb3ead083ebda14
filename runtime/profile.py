"""Where the time of the steps went, per plan, op and kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from qcn_compile.artifact import Plan
from qcn_compile.runtime.trace import Trace


@dataclass
class Row:
    """Ops of one plan that run the same kernels: calls, bytes, and the seconds of each kernel, over all steps."""

    plan: str
    op: str
    kernels: tuple[str, ...]
    kernel_seconds: np.ndarray
    calls: int = 0
    bytes: int = 0
    flops: int = 0

    @property
    def seconds(self) -> float:
        return float(self.kernel_seconds.sum())

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0


class Profile:
    """Sums of the seconds the host library measured for each launch."""

    def __init__(self, trace: Trace | None = None) -> None:
        self.trace = trace
        self._rows: dict[tuple[str, str, tuple[str, ...]], Row] = {}
        self._steps: dict[str, int] = {}

    def add(self, plan: Plan, seconds: np.ndarray, at: float = 0.0) -> None:
        """One step that began at `at`: seconds f64 [launches] of `plan`. An op's launches share its bytes."""
        if self.trace is not None:
            self.trace.add(plan, seconds, at)
        name = plan.name if plan.entry == "main" else f"{plan.entry} {plan.name}"
        self._steps[name] = self._steps.get(name, 0) + 1
        start = 0
        for op, group in groupby(plan.launches, key=lambda launch: launch.op):
            launches = list(group)
            kernels, kind = tuple(launch.kernel for launch in launches), op.split()[0]
            empty = Row(name, kind, kernels, np.zeros(len(kernels)))
            row = self._rows.setdefault((name, kind, kernels), empty)
            row.kernel_seconds += seconds[start:start + len(kernels)]
            row.calls += 1
            row.bytes += sum(launch.bytes for launch in launches)
            row.flops += sum(launch.flops for launch in launches)
            start += len(kernels)

    @property
    def steps(self) -> dict[str, int]:
        """Steps of each plan."""
        return dict(self._steps)

    def rows(self, plan: str) -> list[Row]:
        """The ops of a plan, slowest first."""
        return sorted((r for r in self._rows.values() if r.plan == plan), key=lambda row: -row.seconds)

    def lines(self) -> Iterator[str]:
        """The table as text, one block per plan. Bytes are the compiler's count for the bucket at capacity."""
        for plan, steps in self._steps.items():
            rows = self.rows(plan)
            total = sum(row.seconds for row in rows)
            yield f"plan {plan}: {steps} steps, {1e3 * total / steps:.3f} ms a step in kernels"
            yield f"  {'ms/step':>9} {'share':>6} {'calls':>6} {'MB':>9} {'GB/s':>7}  op: kernel"
            for row in rows:
                share = 100 * row.seconds / total if total else 0.0
                one = f": {row.kernels[0]}" if len(row.kernels) == 1 else ""
                yield (f"  {1e3 * row.seconds / steps:9.4f} {share:5.1f}% {row.calls // steps:6d} "
                       f"{row.bytes / steps / 1e6:9.3f} {row.gigabytes_per_second:7.2f}  {row.op}{one}")
                if not one:
                    for kernel, spent in zip(row.kernels, row.kernel_seconds.tolist(), strict=True):
                        yield f"  {1e3 * spent / steps:9.4f} {'':31}    {kernel}"
