"""What a run measured, as one JSON object and as a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from qcn_compile.runtime.bench.runner import Run, Sample

PERCENTILES = (50, 90, 99)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest-rank percentile of sorted values."""
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles and maximum; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return {"mean": sum(ordered) / len(ordered), **{f"p{p}": percentile(ordered, p) for p in PERCENTILES},
            "max": ordered[-1]}


def report(run: Run) -> dict[str, Any]:
    """Times in milliseconds, rates per second of the whole run."""
    done = [sample for sample in run.samples if sample.error is None]
    prompt = sum(sample.prompt_tokens or 0 for sample in done)
    output = sum(sample.completion_tokens for sample in done)
    wall = max(run.wall, 1e-9)
    return {
        "requests": {"completed": len(done), "failed": len(run.samples) - len(done),
                     "errors": dict(Counter(s.error for s in run.samples if s.error is not None)),
                     "not_sent": run.skipped, "most_sessions_at_once": run.most_at_once},
        "seconds": run.wall,
        "tokens": {"prompt": prompt, "output": output},
        "throughput": {"requests_per_s": len(done) / wall, "prompt_tokens_per_s": prompt / wall,
                       "output_tokens_per_s": output / wall},
        "ttft_ms": spread([1e3 * (s.first - s.sent) for s in done if s.first is not None]),
        "itl_ms": spread([1e3 * gap for s in done for gap in s.gaps]),
        "tpot_ms": spread([1e3 * (s.end - s.first) / (s.completion_tokens - 1) for s in done
                           if s.first is not None and s.completion_tokens > 1]),
        "e2e_ms": spread([1e3 * (s.end - s.sent) for s in done]),
        "prefix_cache": prefixes(done),
    }


def prefixes(done: Sequence[Sample]) -> dict[str, float] | None:
    """Share of prompt tokens that a cache held, computed tokens over new ones; None when the server says nothing."""
    told = [sample for sample in done if sample.cached_tokens is not None and sample.prompt_tokens]
    if not told:
        return None
    prompt = sum(sample.prompt_tokens or 0 for sample in told)
    cached = sum(sample.cached_tokens or 0 for sample in told)
    new = sum(sample.new_tokens for sample in told)
    return {"cached_tokens": cached, "hit_rate": cached / prompt, "computed_tokens": prompt - cached, "new_tokens": new,
            "computed_per_new": (prompt - cached) / max(1, new)}


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    requests, tokens, rates = result["requests"], result["tokens"], result["throughput"]
    lines = [f"requests    {requests['completed']} completed, {requests['failed']} failed, "
             f"{result['seconds']:.1f} s, up to {requests['most_sessions_at_once']} sessions at once"]
    lines += [f"  {count} x {error}" for error, count in requests["errors"].items()]
    lines += [f"  {count} not sent: {reason}" for reason, count in requests["not_sent"].items()]
    lines += [f"tokens      {tokens['prompt']} prompt, {tokens['output']} output",
              f"throughput  {rates['requests_per_s']:.2f} requests/s, {rates['prompt_tokens_per_s']:.1f} prompt tok/s, "
              f"{rates['output_tokens_per_s']:.1f} output tok/s",
              "            " + "".join(f"{name:>10}" for name in ("mean", "p50", "p90", "p99", "max"))]
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        values = result[name]
        cells = "".join(f"{value:10.1f}" for value in values.values()) if values else "         -"
        lines.append(f"{name.removesuffix('_ms').upper() + ' ms':12}{cells}")
    cache = result["prefix_cache"]
    if cache is None:
        lines.append("prefixes    the server does not report cached_tokens")
    else:
        computed, new = cache["computed_tokens"], cache["new_tokens"]
        lines.append(f"prefixes    {100 * cache['hit_rate']:.1f} % of the prompt tokens cached; {computed} computed / "
                     f"{new} new = {cache['computed_per_new']:.2f}")
    return "\n".join(lines)
