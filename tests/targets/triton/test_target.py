"""The target itself: cache units, errors, specialised ops, and that importing and lowering need no Triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness_gpu import BF16, DECODE_1, DECODE_8, Case

from qcn_compile.errors import LoweringError, UsageError
from qcn_compile.ir.types import DType, StateKind, StateType
from qcn_compile.targets.base import Encoding
from qcn_compile.targets.registry import GPUS, load_target
from qcn_compile.targets.triton.target import GpuTarget

TARGET = GpuTarget("h100")


def test_targets_by_name() -> None:
    for name in GPUS:
        target = load_target(name)
        assert (target.name, target.kind, target.dtype) == (name, "gpu", "bf16")
    assert GpuTarget("h200").describe() == {"arch": 90, "shared": 232448,
                                            "limits": {"read": 4800.0, "flops": 989000.0}}
    with pytest.raises(UsageError, match="--target h300: unknown; choose cpu, null"):
        load_target("h300")


def test_which_cards_multiply_e4m3() -> None:
    """AMD's numbers of architectures are larger, and the e4m3 of gfx942 is another one."""
    assert [name for name in GPUS if load_target(name).narrow] == ["h100", "h200", "b200"]
    assert not GpuTarget("mi300x").narrow and not GpuTarget("mi355x").narrow


def test_cache_units() -> None:
    assert TARGET.cache_unit(StateType(StateKind.kv, DType.bf16, (2, 8)), 32) == ((2, 32, 8), 2 * 2 * 2 * 8 * 32)
    assert TARGET.cache_unit(StateType(StateKind.conv, DType.bf16, (10, 3)), 32) == ((16, 10), 320)
    assert TARGET.cache_unit(StateType(StateKind.delta, DType.f32, (4, 5, 6)), 32) == ((4, 5, 6), 480)
    with pytest.raises(LoweringError, match="a convolution over 6 tokens"):
        TARGET.cache_unit(StateType(StateKind.conv, DType.bf16, (10, 5)), 32)


def _error(name: str, *operands: object, **attrs: object) -> str:
    case = Case(f"bad {name}")
    case.op(name, [case.input(f"x{i}", o) if isinstance(o, str) else o for i, o in enumerate(operands)], **attrs)
    with pytest.raises(LoweringError) as caught:
        case.lower(TARGET)
    return str(caught.value)


def test_errors_name_op_place_and_cure() -> None:
    assert _error("pow", "bf16[T,4]", exponent=2.0).startswith(
        "pow at test.bad pow: the GPU targets have no kernel for it; rewrite it into ops that have one: add,")
    assert "GPU kernels take bf16; trace the model in bf16" in _error("linear", "f32[T,4]", "bf16[8,4]")
    assert "operand 1 is no weight" in _error("linear", "bf16[T,4]", "bf16[8,4]")
    assert "only multiples of T, S and R" in _error("exp", "bf16[T+1,4]")
    assert "does not broadcast" in _error("add", "bf16[T,4,2]", "bf16[T,4,1]")
    case = Case("int4")
    case.op("linear", [case.input("x", "bf16[T,64]"), case.weight("w", (8, 64), Encoding("int4"))])
    with pytest.raises(LoweringError, match="stored in int4; GPU kernels read bf16 and fp8"):
        case.lower(TARGET)


def _layer() -> Case:
    case = Case("layer", DECODE_1)
    normed = case.op("rms_norm", [case.input("x", "bf16[T,64]"), case.weight("n", (64,))], eps=1e-6)
    logits = case.op("linear", [normed, case.weight("router", (9, 64), BF16)])
    ids, weights = case.op("moe_route", [logits], top_k=2, normalize=True, shared=False)
    case.op("moe_experts", [normed, ids, weights, case.weight("up", (9, 32, 64), BF16),
                            case.weight("down", (9, 64, 16), BF16)], activation="silu")
    return case


def test_norms_become_prologues_with_one_token_only() -> None:
    case = _layer()
    names = [op.name for op in TARGET.specialise(case.ops, [], DECODE_1)]
    assert names == ["norm_linear", "moe_route", "moe_experts"]
    assert [op.name for op in TARGET.specialise(case.ops, [], DECODE_8)] == [op.name for op in case.ops]
    wanted = case.ops[0].result  # an output of the graph stays a value of its own
    assert TARGET.specialise(case.ops, [wanted], DECODE_1)[0].name == "rms_norm"


def test_a_fused_norm_keeps_its_value_for_others() -> None:
    case = _layer()
    fused = TARGET.specialise(case.ops, [], DECODE_1)[0]
    assert fused.attrs["keep"] is True and fused.results[1] is case.ops[0].result


def test_importing_and_lowering_needs_no_triton() -> None:
    code = ("import sys; from qcn_compile.targets.triton.target import GpuTarget; GpuTarget('h100');"
            "sys.exit('triton' in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
