"""The artifact as a thing: reproducible, readable, sealed, and quick to its first token."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qcn_compile import load
from qcn_compile.artifact import SCHEMA, read_manifest, read_plan
from qcn_compile.compile import compile as build


def test_two_builds_are_byte_for_byte_equal(builds: Callable[[str], Path], tmp_path: Path, nothing_shared: None
                                            ) -> None:
    first = builds("int4")
    build(None, "cpu", tmp_path / "elsewhere" / "again", dtype="bf16", quant="int4")
    again = tmp_path / "elsewhere" / "again"
    assert (first / "manifest.json").read_bytes() == (again / "manifest.json").read_bytes()
    names = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert not [n for n in names if (first / n).read_bytes() != (again / n).read_bytes()]


def test_a_folder_that_was_built_anew_is_loaded_anew(builds: Callable[[str], Path], tmp_path: Path) -> None:
    """dlopen would give the first build's kernels once more for the same path."""
    folder, tokens = tmp_path / "build", [5, 100, 7]
    for variant in ("int4", "bf16"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(builds(variant), folder)
        with load(folder) as here, load(builds(variant)) as there:
            assert np.array_equal(here.logits(tokens), there.logits(tokens))


def test_every_kernel_has_its_source_beside_it(builds: Callable[[str], Path]) -> None:
    folder = builds("int4")
    kernels = {launch.kernel for name in read_manifest(folder).plans for launch in read_plan(folder, name).launches}
    sources = {p.stem for p in (folder / "kernels" / "source").iterdir()}
    assert kernels <= sources
    assert (folder / "kernels" / "host.c").is_file()


def test_the_report_says_what_fused_and_what_did_not(builds: Callable[[str], Path]) -> None:
    report = json.loads((builds("int4") / "report.json").read_text())
    fired = {(e["pass"], e["rule"]) for e in report["events"] if not e["reason"]}
    assert {("fuse-deltanet", "delta_net"), ("fuse-moe", "shared expert is one more expert"),
            ("fuse-attention", "gated attention, q/k norm"), ("fuse-epilogue", "moe_add")} <= fired
    kept = [e for e in report["events"] if e["pass"] == "select-quantization" and e["reason"]]
    assert any("router" in e["reason"] for e in kept)
    assert not [e for e in report["events"] if e["pass"].startswith("fuse-") and e["reason"]]
    for plan in report["memory"].values():
        assert plan["workspace_bytes"] <= 1.25 * plan["lower_bound_bytes"] + 64 * plan["buffers"]


def test_a_layer_is_thirteen_launches_or_less(builds: Callable[[str], Path]) -> None:
    """8 layers in decode: six launches for a DeltaNet mixer with its norm, seven for the experts with theirs."""
    plan = read_plan(builds("bf16"), "plan/main-decode-1.json")
    assert len(plan.launches) <= 8 * 13 + 5


@pytest.mark.parametrize("damage", ["truncate", "edit", "remove", "schema", "foreign"])
def test_a_damaged_build_is_refused(builds: Callable[[str], Path], tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(builds("int4"), tmp_path / "build")
    kernels = folder / "kernels" / "libkernels.so"
    if damage == "truncate":
        kernels.write_bytes(kernels.read_bytes()[:-100])
    elif damage == "edit":
        data = bytearray(kernels.read_bytes())
        data[len(data) // 2] ^= 1
        kernels.write_bytes(data)
    elif damage == "remove":
        next((folder / "weights").iterdir()).unlink()
    elif damage == "schema":
        text = (folder / "manifest.json").read_text().replace(f'"schema": {SCHEMA}', '"schema": 99')
        (folder / "manifest.json").write_text(text)
    else:
        (folder / "manifest.json").write_text("[1, 2]")
    run = subprocess.run([sys.executable, "-m", "qcn_compile.runtime.cli", str(folder), "--prompt", "x"],
                         capture_output=True, text=True, check=False)
    assert run.returncode == 4, run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert "qcn-compile" in run.stderr or "copy the build again" in run.stderr
    assert not run.stdout


def test_prompt_longer_than_the_context(builds: Callable[[str], Path]) -> None:
    run = subprocess.run([sys.executable, "-m", "qcn_compile.runtime.cli", str(builds("int4")), "--prompt",
                          "x = 1\n" * 400, "--context-length", "128"], capture_output=True, text=True, check=False)
    assert run.returncode == 8
    assert "128" in run.stderr and len(run.stderr.strip().splitlines()) == 1


def test_first_token_and_lean_process(builds: Callable[[str], Path]) -> None:
    """What a served process loads, and that the first token comes at all; the times are printed, not judged."""
    code = ("import sys, time; t = time.perf_counter()\n"
            "from qcn_compile.runtime import cli\n"
            f"code = cli.main([{str(builds('int4'))!r}, '--prompt', 'def f(x):', '--max-tokens', '1', '--json'])\n"
            "heavy = [m for m in ('torch', 'triton', 'transformers', 'tvm', 'tvm_ffi', 'onnx', 'networkx')"
            " if m in sys.modules]\n"
            "print(heavy, code, round(time.perf_counter() - t, 3), file=sys.stderr)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(run.stderr)
    assert run.stderr.splitlines()[-1].startswith("[] 0 ")
    assert json.loads(run.stdout.splitlines()[-1])
