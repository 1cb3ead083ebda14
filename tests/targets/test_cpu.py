"""The target itself: processors, cache units, errors, and that importing it stays light."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness import Program

from qcn_compile.errors import LoweringError, UsageError
from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.types import DType, StateKind, StateType
from qcn_compile.targets.base import Bucket
from qcn_compile.targets.cpu import CpuTarget
from qcn_compile.targets.null import NullTarget
from qcn_compile.targets.spec import catalogue, hardware
from qcn_compile.targets.tvm import processor

BUCKET = Bucket("prefill-16", 16, 16, 16)


def test_every_figure_has_a_source() -> None:
    assert {"host", "x86-64-v3", "znver3"} <= set(catalogue())
    for chip in catalogue().values():
        for figure in (chip.cores, chip.bandwidth, chip.flops, chip.memory):
            assert figure is None or (figure.value > 0 and len(figure.source) > 10), chip.name


def test_unknown_hardware() -> None:
    with pytest.raises(UsageError, match=r"hardware 'z80' is unknown; known: .*x86-64-v3"):
        hardware("z80")
    with pytest.raises(UsageError, match=r"--mcpu z80: neither data/cpu.toml nor LLVM knows it; try .*znver3"):
        CpuTarget("z80")


def test_processors() -> None:
    assert CpuTarget("znver3").describe() == {"mcpu": "znver3", "features": "avx2"}
    assert CpuTarget("cascadelake").describe() == {"mcpu": "cascadelake", "features": "avx2 avx512 vnni"}
    assert CpuTarget("haswell").describe()["mcpu"] == "haswell"
    assert CpuTarget().describe()["mcpu"]


def test_a_host_that_hides_instructions_gets_a_level_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import tvm

    monkeypatch.setattr(tvm.target.codegen, "llvm_get_system_cpu", lambda: "znver4")
    host = hardware("host")
    full = replace(host, features=("avx2", "avx512", "vnni"))
    assert processor.llvm_name(full) == "znver4"
    assert processor.llvm_name(replace(full, features=("avx2", "avx512"))) == "x86-64-v4"
    assert processor.llvm_name(replace(full, features=("avx2",))) == "x86-64-v3"
    assert processor.llvm_name(replace(full, features=())) == "x86-64-v2"


def test_cache_units() -> None:
    target = CpuTarget(page_size=64)
    assert target.cache_unit(StateType(StateKind.kv, DType.f32, (2, 8)), 64) == ((2, 8, 64), 2 * 4 * 2 * 8 * 64)
    assert target.cache_unit(StateType(StateKind.conv, DType.f32, (10, 3)), 16) == ((3, 10), 120)
    assert target.cache_unit(StateType(StateKind.delta, DType.f32, (4, 5, 6)), 16) == ((4, 6, 5, 1), 480)
    assert target.cache_unit(StateType(StateKind.delta, DType.f32, (4, 5, 64)), 16) == ((4, 2, 5, 32), 5120)
    with pytest.raises(LoweringError, match="page size 8: this target was made for 64"):
        target.cache_unit(StateType(StateKind.kv, DType.f32, (2, 8)), 8)
    with pytest.raises(LoweringError, match="multiple of 32"):
        CpuTarget(page_size=20)


def _lowering_error(name: str, *types: str, **attrs: object) -> str:
    p = Program(f"bad {name}", BUCKET, registered=False)
    p.op(name, [p.input(f"x{i}", t) for i, t in enumerate(types)], **attrs)
    with pytest.raises(LoweringError) as caught:
        p.lower(CpuTarget("x86-64-v3"))
    return str(caught.value)


def test_errors_name_op_place_and_cure() -> None:
    assert _lowering_error("pow", "f32[T,4]", exponent=2.0).startswith(
        "pow at test.bad pow: the CPU target has no kernel for it; rewrite it into ops that have one: add,")
    assert "CPU kernels compute in f32; cast the graph to f32 first" in _lowering_error("exp", "bf16[T,4]")
    assert "operand 1 is no weight" in _lowering_error("linear", "f32[T,4]", "f32[8,4]")
    assert "only multiples of T, S and R" in _lowering_error("exp", "f32[T+1,4]")
    assert "join" in _lowering_error("concat", "f32[T,4,2]", "f32[T,4,2]", axis=2)
    assert "does not broadcast" in _lowering_error("add", "f32[T,4,2]", "f32[T,4,1]")


def test_unsupported_encoding_names_the_cure() -> None:
    p = Program("group 128", BUCKET, registered=False)
    p.op("linear", [p.input("x", "f32[T,256]"), p.weight("w", (16, 256), Encoding("int4", 128))])
    with pytest.raises(LoweringError, match="operand 1; group 128 is not supported on the CPU; use group 32"):
        p.lower(CpuTarget("x86-64-v3"))


def test_attention_without_append() -> None:
    p = Program("no append", BUCKET, registered=False)
    kv = p.state("kv", StateType(StateKind.kv, DType.f32, (2, 16)))
    p.op("paged_attention", [p.input("q", "f32[T,4,16]"), None, p.batch], scale=1.0, state=kv)
    with pytest.raises(LoweringError, match="its query does not come from rope_append; keep the pass fuse-attention"):
        p.lower(CpuTarget("x86-64-v3"))


def test_null_target_plans_and_builds_nothing(tmp_path: Path) -> None:
    target = NullTarget()
    p = Program("null", BUCKET, registered=False)
    p.op("linear", [p.input("x", "f32[T,32]"), p.weight("w", (16, 32))])
    calls = [call for _, call in p.lower(target)]  # type: ignore[arg-type]
    assert calls and target.emit([c.kernel for c in calls], tmp_path) == [] and not list(tmp_path.iterdir())
    assert target.packed_sizes("tiles", Encoding("int4"), (16, 32))["s"] == ("f16", 32)


def test_importing_and_lowering_needs_no_tvm() -> None:
    code = ("import sys; import qcn_compile.targets, qcn_compile.targets.null as n; n.NullTarget();"
            "sys.exit('tvm' in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
