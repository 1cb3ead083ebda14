"""qcn-bench on a build: every command as table and JSON, beside itself and beside a revision; what cannot work."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import qcn_compile as qcn
from qcn_compile.errors import UsageError
from qcn_compile.runtime.bench import local, sides
from qcn_compile.runtime.bench.cli import main
from qcn_compile.runtime.bench.local_table import table
from qcn_compile.runtime.bench.probe import roof
from tests.sharing import one_trace

FAST = ["--rounds", "1", "--threads", "1"]
SIZES = {"kernels": ["--context", "9", "--tokens", "4"], "prefill": ["--context", "9"],
         "decode": ["--context", "5", "--tokens", "6"], "e2e": ["--tokens", "4"]}
LIMITS = {"read": 10.0, "flops": 100.0}


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes run once, in a test of their own."""
    monkeypatch.setattr(local, "roof", lambda threads: LIMITS)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with one_trace():
        return qcn.compile(None, "cpu", tmp_path_factory.mktemp("bench") / "build", quant="int4").path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["prefill", "decode", "e2e"])
def test_beside_itself(build: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(run(capsys, command, str(build), "--vs", str(build), *FAST, *SIZES[command], "--json"))
    one, two = data["sides"]
    assert one["seconds"] > 0 and two["seconds"] > 0  # one round each beside other work: their ratio means nothing
    assert data["machine"]["threads"] == 1 and data["limits"] == LIMITS
    if command == "e2e":
        assert one["tokens"] == 4 and 1e3 * one["seconds"] > one["load_ms"] > 0
        return
    assert one["plan"] == {"prefill": "prefill-64", "decode": "decode-1"}[command]
    read = one["bytes"] / 10e9 if command == "decode" else 0  # prefill: room for several sequences
    bound = max(read, one["flops"] / 100e9)
    assert one["of_limit"] == pytest.approx(bound / one["seconds"])
    text = "\n".join(table(data))
    assert f"limits measured now: read {LIMITS['read']}" in text and " x as fast" in text


def test_kernels_and_their_time_line(build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    words = ["kernels", str(build), *FAST, *SIZES["kernels"], "--json", "--chrome-trace", str(trace)]
    data = json.loads(run(capsys, *words))
    rows = data["sides"][0]["kernels"]
    assert {row["plan"] for row in rows} == {"prefill-64", "decode-1"}
    assert {row["op"] for row in rows} >= {"moe_add", "delta_net", "paged_attention", "linear"}
    assert all(row["seconds"] > 0 for row in rows)
    decode, prefill = ([r for r in rows if r["plan"] == plan] for plan in ("decode-1", "prefill-64"))
    assert all(row["bound"] in ("memory", "compute") for row in decode)
    assert not any("bound" in row for row in prefill)  # 9 tokens of 64
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert names >= {name for row in rows for name in row["kernels"]}
    assert "moe_add: moe_sort" in "\n".join(table(data))


def test_batches_take_the_plan_of_their_size(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(run(capsys, "decode", str(build), *FAST, *SIZES["decode"], "--batch", "3", "--json"))
    assert data["sides"][0]["plan"] == "decode-8"
    assert "of_limit" not in data["sides"][0]  # bytes are counted for 8
    assert " - " in list(table(data))[-1]
    assert data["sides"][0]["tokens_per_second"] == pytest.approx(3 / data["sides"][0]["seconds"], rel=0.5)


def test_limits_are_measured() -> None:
    found = roof(1)
    assert 0.2 < found["read"] < 2000 and 1 < found["flops"] < 1e6


def test_base_makes_the_same_build_with_another_revision(build: Path, tmp_path: Path) -> None:
    assert sides.build_flags(build, None) == [
        "--target", "cpu", "--quant", "int4", "--dtype", "bf16", "--context-length", "32768", "--activations", "int8"]
    with pytest.raises(UsageError, match=r"--base no-such: .*name a commit, branch or tag"), \
            sides.base("no-such", build, None):
        pass
    manifest = json.loads((build / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "model": {"name": "big"}}))
    with pytest.raises(UsageError, match="is of big; name its checkpoint with --model"):
        sides.build_flags(tmp_path, None)


@pytest.mark.slow
def test_base_head(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["git", "-C", str(sides.ROOT), "worktree", "list"]
    before = subprocess.run(words, capture_output=True, text=True, check=True)
    data = json.loads(run(capsys, "decode", str(build), "--base", "HEAD", *FAST, *SIZES["decode"], "--json"))
    after = subprocess.run(words, capture_output=True, text=True, check=True)
    assert [side["plan"] for side in data["sides"]] == ["decode-1", "decode-1"]
    assert data["sides"][1]["name"].startswith("HEAD (")
    assert before.stdout == after.stdout


@pytest.mark.parametrize(("words", "message"), [
    (["decode", "BUILD", "--tokens", "2"], "decode needs at least 4"),
    (["decode", "BUILD", "--rounds", "0"], "--rounds 0: must be at least 1"),
    (["prefill", "BUILD", "--context", "40000", "--rounds", "1"], "could not be measured"),
    (["e2e", "nowhere"], "nowhere"), (["decode", "BUILD", "--vs", "x", "--base", "y"], "not allowed with"),
])
def test_what_cannot_work(build: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(build) if word == "BUILD" else word for word in words]) != 0
    assert message in capsys.readouterr().err
