"""One build in a process of its own: python measure.py BUILD '{"what": ...}' prints what it took as JSON.

It is run by path under the package of another revision too (`--base`), so it uses only what every revision has: `load`,
`generate`, `pump`, `executable.profile`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def tokens_of(count: int, vocabulary: int) -> list[int]:
    """The same prompt everywhere."""
    return [(7919 * i + 13) % (vocabulary - 1) + 1 for i in range(count)]


def opened(build: Path, job: dict[str, Any], sequences: int = 1) -> Any:
    """The build, loaded for the sizes of a job."""
    from qcn_compile.runtime.loaded import load

    manifest = json.loads((build / "manifest.json").read_text(encoding="utf-8"))
    threads = None if manifest["target"]["kind"] == "gpu" else job["threads"]
    context = min(job["context"] + job["tokens"] + 64, manifest["context_length"])
    return load(build, threads=threads, context_length=context, max_running_requests=sequences)


def decode(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step of `batch` sequences with `context` tokens each, sampled, so that routing varies."""
    prompt, batch = tokens_of(job["context"], model.manifest.vocab_size), job["batch"]
    streams = [model.generate(prompt, max_tokens=job["tokens"], temperature=1.0, seed=i, ignore_eos=True)
               for i in range(batch)]
    while not all(stream.pending for stream in streams):
        model.pump()
    for stream in streams:
        stream.pending.clear()
    steps, start = 0, time.perf_counter()
    while steps < job["tokens"] - 2:
        model.pump()
        steps += 1
    seconds = time.perf_counter() - start
    made = sum(len(output.token_ids) for stream in streams for output in stream.pending)
    for stream in streams:
        stream.close()
    return {"seconds": seconds / steps, "tokens_per_second": made / seconds, "plan": plan_of(model, batch, batch)}


def prefill(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds from a prompt of `context` tokens to its first token."""
    stream = model.generate(tokens_of(job["context"], model.manifest.vocab_size), max_tokens=1, temperature=0,
                            ignore_eos=True)
    start = time.perf_counter()
    list(stream)
    seconds = time.perf_counter() - start
    largest = max(c.tokens for c in model.executable.capacities)
    return {"seconds": seconds, "tokens_per_second": job["context"] / seconds,
            "plan": plan_of(model, min(job["context"], largest), 1)}


def plan_of(model: Any, tokens: int, sequences: int) -> str:
    """Name of the plan that such a step takes."""
    return str(model.executable.select(tokens, sequences, sequences).name)


def kernels(model: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Time of every op's kernels in a prompt of `context` tokens and `tokens` steps after it."""
    from qcn_compile.runtime.profile import Profile

    prompt = tokens_of(job["context"], model.manifest.vocab_size)
    model.generate(prompt, max_tokens=4, temperature=0, ignore_eos=True).text()  # warm
    profile = Profile()
    if job.get("trace"):
        from qcn_compile.runtime.trace import Trace

        profile.trace = Trace(job["build"])
    model.executable.profile = profile
    model.generate(prompt, max_tokens=job["tokens"], temperature=1.0, seed=0, ignore_eos=True).text()
    model.executable.profile = None
    if profile.trace is not None:
        profile.trace.write(Path(job["trace"]))
    plans = dict.fromkeys(plan for plan, _, _ in profile._rows)
    return [{"plan": plan, "op": row.op, "kernels": list(row.kernels), "calls": row.calls, "seconds": row.seconds,
             "bytes": row.bytes, "flops": getattr(row, "flops", 0)} for plan in plans for row in profile.rows(plan)]


def by_events(model: Any, plan: str, repeat: int = 30) -> float | None:
    """On a GPU: median seconds of one plan's graph between two events, inputs as the last step left them."""
    executable = model.executable
    if not hasattr(executable, "replay"):
        return None
    device, found = executable._device, executable.plan(plan)
    device.activate()
    first, last = device.event(), device.event()
    seconds = []
    for _ in range(repeat):
        device.record(first)
        executable.replay(found)
        device.record(last)
        device.synchronize()
        seconds.append(device.seconds(first, last))
    return sorted(seconds)[repeat // 2]


def main() -> None:
    """Run the job of the command line."""
    build, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    job["build"] = str(build)
    with opened(build, job, job.get("batch", 1)) as model:
        if job["what"] == "kernels":
            result: Any = kernels(model, job)
        else:
            work = {"decode": decode, "prefill": prefill}[job["what"]]
            work(model, {**job, "tokens": 8, "context": min(job["context"], 64)})  # warm
            result = [work(model, job) for _ in range(job["rounds"])]
            for row in result:
                row["events_seconds"] = by_events(model, row["plan"])
        device = str(model._device)
    print(json.dumps({"device": device, "rows": result}))


if __name__ == "__main__":
    main()
