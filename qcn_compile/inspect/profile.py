"""Measured times: run a prompt and decode steps of a build with the runtime's profile, beside the machine's limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcn_compile.errors import UsageError


@dataclass(frozen=True)
class Measured:
    """Rows of a profile, and GB/s read and GFLOP/s of the machine at the time; None where they were not measured."""

    rows: Sequence[dict[str, Any]] = ()
    limits: dict[str, float] | None = field(default=None)

    def kernel_seconds(self) -> dict[tuple[str, str], float]:
        """Seconds of a launch by plan and kernel."""
        spent: dict[tuple[str, str], list[float]] = {}
        for row in self.rows:
            for kernel, seconds in zip(row["kernels"], row["kernel_seconds"], strict=True):
                total = spent.setdefault((row["plan"], kernel), [0.0, 0.0])
                total[0] += seconds
                total[1] += row["calls"]
        return {key: seconds / calls for key, (seconds, calls) in spent.items()}

    def op_seconds(self, plan: str) -> dict[tuple[str, ...], float]:
        """Seconds of a call by the kernels an op runs."""
        return {tuple(row["kernels"]): row["seconds"] / row["calls"] for row in self.rows if row["plan"] == plan}


def measure(path: Path, tokens: int = 32, prompt: int = 256) -> dict[str, Any]:
    """A prompt and greedy steps after it; one row an op and plan, times in seconds over all calls, bytes as counted."""
    from qcn_compile.runtime.bench.probe import roof
    from qcn_compile.runtime.loaded import load
    from qcn_compile.runtime.profile import Profile

    with load(path) as model:
        length = min(prompt, model.memory.context_length - tokens)
        ids: Any = [1 + i % (model.manifest.vocab_size - 1) for i in range(max(length, 1))]
        model.generate(ids, max_tokens=4, temperature=0, ignore_eos=True).text()  # warm
        profile = model.executable.profile = Profile()
        model.generate(ids, max_tokens=tokens, temperature=0, ignore_eos=True).text()
        rows = [{"plan": f"main-{row.plan}", "op": row.op, "kernels": list(row.kernels), "seconds": row.seconds,
                 "kernel_seconds": row.kernel_seconds.tolist(), "calls": row.calls, "bytes": row.bytes,
                 "flops": row.flops} for plan in profile.steps for row in profile.rows(plan)]
        cpu = model.manifest.target.get("kind") == "cpu"
        threads = getattr(model._device, "threads", 1)
    return {"limits": roof(threads) if cpu else None, "rows": rows}


def read(file: Path) -> Measured:
    """What `qcn-inspect profile --json` printed. Raises UsageError for anything else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        rows = [{**row, "seconds": float(row["seconds"]), "calls": int(row["calls"]), "kernels": list(row["kernels"]),
                 "kernel_seconds": [float(s) for s in row["kernel_seconds"]]} for row in data["rows"]]
        limits = data["limits"] and {key: float(data["limits"][key]) for key in ("read", "flops")}
        return Measured(rows, limits)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--profile {file}: not a profile ({error}); make one with qcn-inspect profile BUILD --json") \
            from None
