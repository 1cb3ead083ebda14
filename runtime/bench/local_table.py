"""What `qcn-bench kernels|prefill|decode|e2e` measured, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def table(data: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    m, limits, card = data["machine"], data["limits"], data["sides"][0].get("device", "")
    yield (f"{data['what']} on {m['cpu']}, {m['threads']} of {m['cores']} cores, load {m['load']}, "
           f"Python {m['python']}, {m['date']}" + (f", commit {m['commit']}" if m["commit"] else ""))
    if data["measured"]:
        yield f"limits measured now: read {limits['read']:.1f} GB/s, products {limits['flops']:.0f} GFLOP/s (fp32)"
    else:
        yield f"on {card or 'a GPU'}; " + (f"limits on file: {limits['read']:.0f} GB/s, {limits['flops']:.0f} GFLOP/s "
                                            "(bf16)" if limits else "no limits on file")
    yield from {"kernels": _kernels, "e2e": _end_to_end}.get(data["what"], _speed)(data["sides"])


def _ratio(first: float, other: float) -> str:
    return f"{other / first:6.2f} x" if first else "-"


def _speed(sides: list[dict[str, Any]]) -> Iterator[str]:
    yield (f"  {'ms':>10} {'tok/s':>10} {'GB/s':>8} {'GFLOP/s':>9} {'of limit':>9} {'bound':>8} {'spread':>7}"
           "  plan, build")
    for row in sides:
        share = f"{row['of_limit']:9.1%} {row['bound']:>8}" if "bound" in row else f"{'-':>9} {'-':>8}"
        yield (f"  {1e3 * row['seconds']:10.3f} {row['tokens_per_second']:10.1f} {row['gb_per_second']:8.2f} "
               f"{row['gflop_per_second']:9.2f} {share} {row['spread']:7.1%}  {row['plan']}, {row['name']}")
        if "events_seconds" in row:
            yield f"  {1e3 * row['events_seconds']:10.3f} by events, the graph alone"
    if len(sides) > 1:
        yield f"  {sides[0]['name']} is {_ratio(sides[0]['seconds'], sides[1]['seconds']).strip()} as fast"


def _end_to_end(sides: list[dict[str, Any]]) -> Iterator[str]:
    yield f"  {'process s':>10} {'load ms':>9} {'TTFT ms':>9} {'tok/s':>9} {'peak MB':>9}  build"
    for row in sides:
        yield (f"  {row['seconds']:10.3f} {row['load_ms']:9.1f} {row['ttft_ms']:9.2f} {row['tokens_per_second']:9.1f} "
               f"{row['peak_rss'] / 1e6:9.1f}  {row['name']}")
    if len(sides) > 1:
        yield f"  {sides[0]['name']} is {_ratio(sides[0]['seconds'], sides[1]['seconds']).strip()} as fast"


def _kernels(sides: list[dict[str, Any]]) -> Iterator[str]:
    others = {(row["plan"], row["op"]): row for side in sides[1:] for row in side["kernels"]}
    yield (f"  {'us':>10} {'calls':>6} {'GB/s':>8} {'GFLOP/s':>9} {'of limit':>9} {'bound':>8}"
           + (f" {'the other':>10}" if others else "") + "  plan op: kernel")
    for row in sides[0]["kernels"]:
        share = f"{row['of_limit']:9.1%} {row['bound']:>8}" if "bound" in row else f"{'-':>9} {'-':>8}"
        found = others.get((row["plan"], row["op"]))
        beside = f" {_ratio(row['seconds'], found['seconds']) if found else '-':>10}" if others else ""
        more = f" and {len(row['kernels']) - 1} more" if len(row["kernels"]) > 1 else ""
        yield (f"  {1e6 * row['seconds']:10.2f} {row['calls']:6} {row['gb_per_second']:8.2f} "
               f"{row['gflop_per_second']:9.2f} {share}{beside}  {row['plan']} {row['op']}: {row['kernels'][0]}{more}")
    yield "  GB/s and GFLOP/s are those of a full plan; the share of the limit is told where the run fills it"
    if others:
        yield f"  the other: time of {sides[1]['name']} over that of {sides[0]['name']}"
