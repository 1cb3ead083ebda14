"""Measured times: run decode steps of a build with the runtime's profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcn_compile.errors import UsageError


def measure(path: Path, tokens: int = 32) -> list[dict[str, Any]]:
    """Greedy decode after a short prompt; one row an op and plan, times in seconds over all calls."""
    from qcn_compile.runtime.loaded import load
    from qcn_compile.runtime.profile import Profile

    with load(path) as model:
        prompt: Any = list(range(1, 9))
        model.generate(prompt, max_tokens=4, temperature=0, ignore_eos=True).text()  # warm
        profile = model.executable.profile = Profile()
        model.generate(prompt, max_tokens=tokens, temperature=0, ignore_eos=True).text()
        plans = dict.fromkeys(plan for plan, _, _ in profile._rows)
        return [{"plan": f"main-{row.plan}", "op": row.op, "kernels": list(row.kernels), "seconds": row.seconds,
                 "kernel_seconds": row.kernel_seconds.tolist(), "calls": row.calls, "bytes": row.bytes}
                for plan in plans for row in profile.rows(plan)]


def read(file: Path) -> list[dict[str, Any]]:
    """What `qcn-inspect profile --json` printed. Raises UsageError for anything else."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise TypeError("expected a list of rows")
        return [{**row, "seconds": float(row["seconds"]), "calls": int(row["calls"]), "kernels": list(row["kernels"])}
                for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--profile {file}: not a profile ({error}); make one with qcn-inspect profile BUILD --json") \
            from None
