"""The verdict as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qcn_compile.planning.verdict import Verdict
from qcn_compile.targets.spec import Hardware

REJECTED = 6  # lines of rejected candidates; --json has all


def lines(verdict: Verdict) -> Iterator[str]:
    """A table for people."""
    data, chip = verdict.to_json(), verdict.ask.chip
    count = f"{data['gpus']} x " if data["gpus"] > 1 else ""
    head = "fits" if data["fits"] else f"does not fit: {data['problem']}"
    bandwidth = f", {chip.bandwidth.value:g} GB/s" if chip.bandwidth else ""
    yield f"{data['model']} on {count}{chip.name} ({data['memory']['available'] / 1e9:.1f} GB{bandwidth}): {head}"
    yield _row("quantisation", data["quant"], data["reasons"]["quant"])
    yield _row("layout", data["title"].partition(", ")[2], data["reasons"]["layout"])
    yield _row("context", f"{data['context_length']:,}", data["reasons"]["context_length"])
    kinds = {kind: size for kind, size in data["memory"].items() if kind != "available"}
    yield _row("GB a chip", "", ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in kinds.items()))
    if data["fits"]:
        yield _row("longest", f"{data['longest_context']:,}", "tokens of context for one request alone")
        yield _row("at once", str(data["concurrency_8k"]),
                   f"requests of 8,192 tokens; {data['concurrency']} of {data['context_length']:,}")
        yield from _speed(data["speed"], chip)
    if data["planned_only"]:
        yield _row("building", "no", "no kernels are written for this yet: planned only")
    for row in data["alternatives"]:
        yield _row("or", "", f"{row['title']}: {row['ms_per_step']} ms a step, {row['longest_context']:,} tokens"
                   + (" (no kernels yet)" if row["planned_only"] else ""))
    for row in data["rejected"][:REJECTED]:
        yield _row("not", "", f"{row['what']}: {row['reason']}")
    if len(data["rejected"]) > REJECTED:
        yield _row("", "", f"and {len(data['rejected']) - REJECTED} more, in --json")


def _speed(speed: dict[str, Any], chip: Hardware) -> Iterator[str]:
    if not speed:
        yield _row("ms a token", "?", f"bandwidth or FLOP/s of {chip.name} are not on file, so no time is predicted")
        return
    rates = ", ".join(f"{batch}: {rate:,.0f}" for batch, rate in speed["tokens_per_second"].items())
    first = ", ".join(f"{prompt} tokens: {ms:g} ms" for prompt, ms in speed["first_token_ms"].items())
    yield _row("ms a token", f"{speed['ms_per_token']:g}", f"predicted at {speed['fill']:,} tokens, bound by "
               f"{speed['bound']}; the hardware's limit is {speed['limit_ms']:g}")
    yield _row("tokens/s", "", f"predicted, by requests at once: {rates}")
    yield _row("first token", "", f"predicted, by length of the prompt: {first}")


def _row(name: str, value: str, text: str) -> str:
    return f"  {name:13} {value:>10}  {text}".rstrip() if value else f"  {name:13} {text}"
