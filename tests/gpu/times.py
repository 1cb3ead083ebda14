"""Time of every kernel of some plans of a build, launch after launch without gaps, and of the whole plan's graph.

    python tests/gpu/times.py BUILD [decode-8 prefill-1024 prefill-1024+32 ...] [--context 1000]

With "+32" the prompt is that much shorter, and 32 sequences decode in the same step.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np

from qcn_compile import load
from qcn_compile.runtime.batch import Span

SLAB = 1 << 30


def spans(model: Any, plan: Any, context: int, beside: int) -> list[Span]:
    """A step that fills a plan: one token of each of many sequences, or one prompt, `beside` it others that decode."""
    rng, memory, first = np.random.default_rng(0), model.memory, 0
    decode = plan.name.startswith("decode")
    sizes = [(1, context)] * plan.tokens if decode else [(1, context)] * beside + [(plan.tokens - beside, 0)]
    found = []
    for s, (each, before) in enumerate(sizes):
        pages = -(-(before + each) // memory.page_size)
        places = ((np.arange(pages) + first) % memory.pages).astype(np.int32)
        found.append(Span(rng.integers(0, 150000, each).tolist(), before, s % memory.slots, places, 1))
        first += pages
    return found


def graph_seconds(model: Any, plan: Any, times: int = 9) -> float:
    device, found = model._device, []
    first, last = device.event(), device.event()
    for _ in range(times):
        device.record(first)
        model.executable.replay(plan)
        device.record(last)
        device.synchronize()
        found.append(device.seconds(first, last))
    return float(np.median(found))


def launch_seconds(model: Any, plan: Any, slab: int, times: int = 3) -> np.ndarray:
    """Of each launch. Copies keep the device busy until the host is ahead."""
    device, found = model._device, []
    launches = model.executable._launches[plan.key]
    events = [device.event() for _ in range(len(launches) + 1)]
    for _ in range(times):
        for _ in range(40):
            device.driver("cuMemcpyDtoDAsync", slab + SLAB // 2, slab, SLAB // 2, device.stream)
        device.record(events[0])
        for launch, event in zip(launches, events[1:], strict=True):
            launch()
            device.record(event)
        device.synchronize()
        found.append([device.seconds(a, b) for a, b in pairwise(events)])
    return np.median(np.array(found), 0)


def table(plan: Any, seconds: np.ndarray, most: int) -> None:
    """Kernels, slowest first."""
    rows: dict[tuple[str, str], list[float]] = defaultdict(list)
    for launch, took in zip(plan.launches, seconds, strict=True):
        rows[launch.op.split()[0], launch.kernel].append(took)
    total = seconds.sum()
    for (op, kernel), took in sorted(rows.items(), key=lambda row: -sum(row[1]))[:most]:
        each, share = 1e6 * np.mean(took), 100 * sum(took) / total
        print(f"  {share:5.1f} % {each:9.2f} us x {len(took):3d}  {op}: {kernel[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build")
    parser.add_argument("plans", nargs="+")
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=14)
    args = parser.parse_args()
    with load(args.build, context_length=args.length, max_running_requests=args.sequences) as model:
        print(model.describe(), flush=True)
        slab = model._device.allocate(SLAB) if model._device.free_bytes() > 2 * SLAB else model.executable._base
        for name in args.plans:
            try:
                plan = model.executable.plan(name.split("+")[0])
                logits = model.executable.run(spans(model, plan, args.context, int((name + "+0").split("+")[1])))
                finite, whole = bool(np.isfinite(logits).all()), graph_seconds(model, plan)
                print(f"{name}: {1e3 * whole:.3f} ms, {plan.tokens / whole:.0f} tokens/s, {len(plan.launches)} "
                      f"launches, logits finite {finite}", flush=True)
                if args.rows:
                    table(plan, launch_seconds(model, plan, slab), args.rows)
            except Exception as problem:
                print(f"{name} FAILED {type(problem).__name__}: {str(problem)[-300:]}", flush=True)
                break


if __name__ == "__main__":
    main()
