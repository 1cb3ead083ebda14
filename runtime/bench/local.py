"""`qcn-bench kernels|prefill|decode|e2e BUILD`: speed on this machine against its limits, beside another build."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from qcn_compile import settings
from qcn_compile.artifact import read_manifest
from qcn_compile.errors import UsageError
from qcn_compile.runtime.bench.probe import roof
from qcn_compile.runtime.bench.sides import Side, base, commit

COMMANDS = {"kernels": "time of every op of a prompt and the steps after it", "prefill": "a prompt to its first token",
            "decode": "steps of one or several sequences", "e2e": "a process: start, load, prompt, tokens, exit"}
DEFAULTS = {"kernels": (64, 16), "prefill": (512, 1), "decode": (128, 64), "e2e": (0, 64)}  # context, tokens


def add_parsers(commands: Any) -> None:
    """The subcommands, into those of qcn-bench."""
    for name, text in COMMANDS.items():
        context, tokens = DEFAULTS[name]
        p = commands.add_parser(name, help=text, allow_abbrev=False, description=f"{text[0].upper()}{text[1:]}, beside "
                                "the limits measured in the same run.")
        p.add_argument("build", type=Path, metavar="BUILD", help="folder written by qcn-compile")
        other = p.add_mutually_exclusive_group()
        other.add_argument("--vs", type=Path, metavar="BUILD", help="another build, measured in turns")
        other.add_argument("--base", metavar="REV", help="the same build, made and run by another revision")
        p.add_argument("--model", metavar="DIR", help="checkpoint for --base; default: the bundled model")
        p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: QCN_THREADS, or all cores)")
        p.add_argument("--rounds", type=int, default=3, metavar="N", help="processes a build, in turns (default 3)")
        if name != "e2e":
            p.add_argument("--context", type=int, default=context, metavar="N",
                           help=f"prompt tokens (default {context})")
        if name != "prefill":
            p.add_argument("--tokens", type=int, default=tokens, metavar="N", help=f"new tokens (default {tokens})")
        if name == "decode":
            p.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (default 1)")
        if name == "kernels":
            p.add_argument("--chrome-trace", type=Path, metavar="FILE", help="also write BUILD's time line there")
        p.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for. Raises UsageError for values that cannot work, DeviceError when a side fails."""
    for name in ("threads", "rounds", "context", "tokens", "batch"):
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if arguments.command == "decode" and arguments.tokens < 4:
        raise UsageError(f"--tokens {arguments.tokens}: decode needs at least 4 to be timed")
    threads = arguments.threads or settings.threads()
    context, tokens = DEFAULTS[arguments.command]
    job = {"what": arguments.command, "threads": threads, "context": getattr(arguments, "context", context) or 1,
           "tokens": getattr(arguments, "tokens", tokens), "batch": getattr(arguments, "batch", 1), "rounds": 3}
    for build in filter(None, (arguments.build, arguments.vs)):
        read_manifest(build)
    gpu = read_manifest(arguments.build).target.get("kind") == "gpu"
    with ExitStack() as stack:
        sides = [Side(str(arguments.build), arguments.build)]
        if arguments.vs is not None:
            sides.append(Side(str(arguments.vs), arguments.vs))
        if arguments.base is not None:
            sides.append(stack.enter_context(base(arguments.base, arguments.build, arguments.model)))
        if (trace := getattr(arguments, "chrome_trace", None)) is not None:
            sides[0].measure({**job, "trace": str(trace)})
        probes = [] if gpu else [roof(threads)]
        samples = measured(sides, job, arguments.rounds)
        probes += [] if gpu else [roof(threads)]
        limits = {key: max(p[key] for p in probes) for key in ("read", "flops")} if probes else on_file(sides[0])
        rows = [result(side, job, rounds, limits) for side, rounds in zip(sides, samples, strict=True)]
    return {"what": arguments.command, "job": job, "machine": machine(threads), "limits": limits,
            "measured": bool(probes), "sides": rows}


def on_file(side: Side) -> dict[str, float]:
    """GB/s and GFLOP/s of a GPU as its data sheet has them; empty when the build names none."""
    return read_manifest(side.build).target.get("limits") or {}


def measured(sides: Sequence[Side], job: dict[str, Any], rounds: int) -> list[list[Any]]:
    """Samples of each side, taken in turns."""
    samples: list[list[Any]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, found in zip(sides, samples, strict=True):
            found.append(side.end_to_end(job) if job["what"] == "e2e" else side.measure(job))
    return samples


def machine(threads: int) -> dict[str, Any]:
    """Where and with what."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "threads": threads, "python": platform.python_version(),
            "date": datetime.date.today().isoformat(), "commit": commit(), "load": round(os.getloadavg()[0], 2)}


def result(side: Side, job: dict[str, Any], rounds: list[Any], limits: dict[str, float]) -> dict[str, Any]:
    """The median of a side's samples, with what the limits would allow: on a GPU those on file."""
    known = on_file(side) if read_manifest(side.build).target.get("kind") == "gpu" else limits
    if job["what"] == "e2e":
        return {"name": side.name, **{key: median(r[key] for r in rounds) for key in rounds[0]}}
    row, rounds = {"name": side.name, "device": rounds[0]["device"]}, [found["rows"] for found in rounds]
    if job["what"] == "kernels":
        full = {r["plan"]: filled(side.plan(r["plan"]), job["context"]) for found in rounds for r in found}
        return {**row, "kernels": [each(r, known if full[r["plan"]] else {}) for r in merged(rounds)]}
    return {**row, **speed(side, job, [row for found in rounds for row in found], known)}


def filled(plan: dict[str, int], context: int) -> bool:
    """Whether one sequence fills a plan, so that bytes and FLOPs counted at its capacity are those that it took."""
    return plan["sequences"] == 1 and (plan["tokens"] == 1 or context % plan["tokens"] == 0)


def speed(side: Side, job: dict[str, Any], samples: list[dict[str, Any]], limits: dict[str, float]) -> dict[str, Any]:
    """Prefill or decode. The compiler counts a plan's bytes at its capacity: a batch below it has no share of a limit,
    a prompt reads the weights once a chunk."""
    seconds, plan = median(r["seconds"] for r in samples), side.plan(samples[0]["plan"])
    events = [r["events_seconds"] for r in samples if r["events_seconds"]]
    row = {"plan": samples[0]["plan"],
           "tokens_per_second": median(r["tokens_per_second"] for r in samples),
           "spread": (max(r["seconds"] for r in samples) - min(r["seconds"] for r in samples)) / seconds}
    row |= {"events_seconds": median(events)} if events else {}
    if job["what"] == "prefill":
        chunks = job["context"] / plan["tokens"]
        if plan["sequences"] > 1:  # its bytes count caches of sequences that are not there: only FLOPs tell the share
            limits = {**limits, "read": math.inf} if limits else {}
        return against(row, seconds, math.ceil(chunks) * plan["bytes"], chunks * plan["flops"], limits)
    return against(row, seconds, plan["bytes"], plan["flops"], limits if job["batch"] == plan["tokens"] else {})


def merged(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of all rounds as one, each of its fastest round: what others on the machine took is not ours."""
    table: dict[Any, dict[str, Any]] = {}
    for row in (row for found in rounds for row in found):
        key = (row["plan"], row["op"], tuple(row["kernels"]))
        if key not in table or row["seconds"] / row["calls"] < table[key]["seconds"] / table[key]["calls"]:
            table[key] = row
    return sorted(table.values(), key=lambda row: (row["plan"], -row["seconds"]))


def each(row: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """A row of a profile, for one call."""
    seconds, moved, flops = (row[key] / row["calls"] for key in ("seconds", "bytes", "flops"))
    return against(row, seconds, moved, flops, limits)


def against(row: dict[str, Any], seconds: float, bytes_: float, flops: float,
            limits: dict[str, float]) -> dict[str, Any]:
    """A row with its rates, and the share of the limit that bounds it: least possible time over the time it took."""
    seconds = max(seconds, 1e-12)
    row = {**row, "seconds": seconds, "bytes": bytes_, "flops": flops, "gb_per_second": bytes_ / seconds / 1e9,
           "gflop_per_second": flops / seconds / 1e9}
    if limits:
        memory, compute = bytes_ / limits["read"] / 1e9, flops / limits["flops"] / 1e9
        row |= {"bound": "memory" if memory >= compute else "compute", "of_limit": max(memory, compute) / seconds}
    return row
