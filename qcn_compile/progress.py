"""How far a build is, and how long each of its stages took."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Report = Callable[[str, int, int], None]


class Clock:
    """Seconds per stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def progress_bars(stream: Any = None) -> Report:
    """A reporter that draws one tqdm bar per stage on a terminal and prints nothing elsewhere."""
    from tqdm import tqdm

    out = stream or sys.stderr
    bars: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if not out.isatty():
            return
        if stage not in bars:
            count = {"unit": "B", "unit_scale": True} if stage == "weights" else {}
            bars[stage] = tqdm(total=total, desc=stage, file=out, leave=True, **count)
        bars[stage].n = done
        bars[stage].refresh()
        if done >= total:
            bars.pop(stage).close()

    return report
