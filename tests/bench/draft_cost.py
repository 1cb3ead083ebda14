"""What drafts cost on a CPU: python tests/bench/draft_cost.py BUILD THREADS, BUILD made with qcn-compile --mtp.

Steps of one to four tokens of a sequence and rounds of the draft head take turns; medians. k drafts pay from the rate r
on where (verify of k+1 tokens + k rounds of the head) / plain step = 1 + r + ... + r^k. Random tokens take experts of
their own, the worst case.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qcn_compile import load
from qcn_compile.runtime.batch import Span

CONTEXT, ROUNDS, MOST = 300, 30, 4


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def pays_from(cost: float, drafts: int) -> float:
    """The least rate at which that many drafts bring `cost` tokens a step; more than 1: none."""
    rates = np.linspace(0, 1, 1001)
    tokens = sum(rates ** n for n in range(drafts + 1))
    return float(rates[np.argmax(tokens >= cost)]) if tokens[-1] >= cost else float("inf")


def main() -> None:
    build, threads = Path(sys.argv[1]), int(sys.argv[2])
    with load(build, threads=threads, context_length=512, huge_pages=True, max_running_requests=1) as model:
        run, rng = model.executable, np.random.default_rng(0)
        pages = list(range(512 // model.memory.page_size))

        def tokens(count: int) -> list[int]:
            return [int(t) for t in rng.integers(1, model.manifest.vocab_size, count)]

        run.run([Span(tokens(CONTEXT), 0, 0, pages, 1)])
        times: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for count in range(1, MOST + 1):
                span = Span(tokens(count), CONTEXT, 0, pages, count)
                times.setdefault(f"{count}", []).append(timed(lambda span=span: run.run([span])))
            hidden, draft = run.hidden()[-1:].copy(), Span(tokens(1), CONTEXT, 0, pages, 1)
            times.setdefault("head", []).append(timed(lambda h=hidden, d=draft: run.draft([d], h)))
    ms = {name: 1e3 * float(np.median(found)) for name, found in times.items()}
    print(f"{threads} thread(s): " + ", ".join(f"{name} {value:.1f} ms" for name, value in ms.items()))
    for drafts in range(1, MOST):
        cost = (ms[str(drafts + 1)] + drafts * ms["head"]) / ms["1"]
        print(f"  {drafts} draft(s): {cost:.2f} plain steps; pay from a rate of {pays_from(cost, drafts):.2f} on")


if __name__ == "__main__":
    main()
