"""Where the time of the steps went, per plan and kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qcn_compile.artifact import Plan


@dataclass
class Row:
    """One kernel of one plan: launches, seconds and bytes over all steps."""

    plan: str
    kernel: str
    launches: int = 0
    seconds: float = 0.0
    bytes: int = 0

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0


class Profile:
    """Sums of the seconds the host library measured for each launch."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], Row] = {}
        self._steps: dict[str, int] = {}

    def add(self, plan: Plan, seconds: np.ndarray) -> None:
        """One step: seconds f64 [launches] of `plan`."""
        self._steps[plan.name] = self._steps.get(plan.name, 0) + 1
        for launch, spent in zip(plan.launches, seconds.tolist(), strict=True):
            row = self._rows.setdefault((plan.name, launch.kernel), Row(plan.name, launch.kernel))
            row.launches += 1
            row.seconds += spent
            row.bytes += launch.bytes

    def rows(self, plan: str) -> list[Row]:
        """The kernels of a plan, slowest first."""
        return sorted((r for r in self._rows.values() if r.plan == plan), key=lambda row: -row.seconds)

    def lines(self) -> Iterator[str]:
        """The table as text, one block per plan. Bytes are the compiler's count for the bucket at capacity."""
        for plan, steps in self._steps.items():
            rows = self.rows(plan)
            total = sum(row.seconds for row in rows)
            yield f"plan {plan}: {steps} steps, {1e3 * total / steps:.3f} ms a step in kernels"
            yield f"  {'ms/step':>9} {'share':>6} {'calls':>6} {'MB':>9} {'GB/s':>7}  kernel"
            for row in rows:
                share = 100 * row.seconds / total if total else 0.0
                yield (f"  {1e3 * row.seconds / steps:9.4f} {share:5.1f}% {row.launches // steps:6d} "
                       f"{row.bytes / steps / 1e6:9.3f} {row.gigabytes_per_second:7.2f}  {row.kernel}")
