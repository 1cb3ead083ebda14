"""Chrome traces: valid trace-event JSON whose kernels lie in their steps, as the profile has them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from qcn_compile.errors import UsageError
from qcn_compile.runtime import cli
from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.profile import Profile
from qcn_compile.runtime.trace import KERNELS, STEPS, Trace


def check(data: dict, steps: int) -> list[dict]:
    """The rules of the format that viewers rely on; returns the complete events."""
    assert set(data) == {"traceEvents", "displayTimeUnit"} and data["displayTimeUnit"] in ("ms", "ns")
    for event in data["traceEvents"]:
        assert event["ph"] in ("X", "M") and isinstance(event["name"], str)
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and isinstance(event["args"], dict)
    whole = [event for event in data["traceEvents"] if event["ph"] == "X"]
    assert all(isinstance(e[key], float) and e[key] >= 0 for e in whole for key in ("ts", "dur"))
    rows = {tid: [e for e in whole if e["tid"] == tid] for tid in (STEPS, KERNELS)}
    assert len(rows[STEPS]) == steps
    for events in rows.values():  # on a row, one after the other
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in pairwise(events))
    at = iter(rows[KERNELS])
    for step in rows[STEPS]:
        inside = [next(at) for _ in range(step["args"]["launches"])]
        assert inside[0]["ts"] == step["ts"]
        assert sum(e["dur"] for e in inside) == pytest.approx(step["dur"])
        assert inside[-1]["ts"] + inside[-1]["dur"] == pytest.approx(step["ts"] + step["dur"])
    assert next(at, None) is None
    return whole


def test_a_trace_is_what_the_profile_measured(toy_build: Path, tmp_path: Path) -> None:
    with load(toy_build, threads=1) as model:
        profile = model.executable.profile = Profile(Trace("toy"))
        for _ in model.generate([1, 2, 3], max_tokens=5, temperature=0, ignore_eos=True):
            pass
        profile.trace.write(tmp_path / "trace.json")
    data = json.loads((tmp_path / "trace.json").read_text())
    whole = check(data, 5)
    names = [e["args"]["name"] for e in data["traceEvents"] if e["ph"] == "M"]
    assert names == ["toy", "steps", "kernels"]
    total = sum(row.seconds for plan in profile.steps for row in profile.rows(plan))
    assert sum(e["dur"] for e in whole if e["tid"] == KERNELS) == pytest.approx(1e6 * total)
    first = next(e for e in whole if e["tid"] == KERNELS)
    assert first["name"] == "toy_embed" and first["cat"] == "embed"
    assert first["args"]["location"] == "toy:toy_embed"
    assert first["args"]["GB/s"] == pytest.approx(first["args"]["bytes"] / first["dur"] / 1e3, abs=1e-3)


def test_qcn_run_writes_one(toy_build: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.json"
    flags = [str(toy_build), "--prompt", "abc", "--max-tokens", "3", "--temperature", "0", "--threads", "1"]
    assert cli.main([*flags, "--chrome-trace", str(file)]) == 0
    assert "ms a step in kernels" not in capfd.readouterr().err  # that is --profile
    check(json.loads(file.read_text()), 3)
    assert cli.main([*flags, "--chrome-trace", str(tmp_path / "no" / "t.json")]) == 2
    assert "cannot write the trace" in capfd.readouterr().err


def test_an_empty_trace_opens_too(tmp_path: Path) -> None:
    Trace("x").write(tmp_path / "t.json")
    check(json.loads((tmp_path / "t.json").read_text()), 0)
    with pytest.raises(UsageError, match="name another file"):
        Trace("x").write(tmp_path / "no" / "t.json")
