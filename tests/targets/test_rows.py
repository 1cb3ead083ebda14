"""Pointwise ops, norms, concatenation, gathers and look-ups against the op table."""

from __future__ import annotations

import numpy as np
import pytest
from harness import DECODE, Lab, Program, Ragged

from qcn_compile.ir.encoding import Encoding

UNARY = ("neg", "exp", "sigmoid", "silu", "softplus")
BINARY = ("add", "mul", "sub", "div", "silu_mul", "mul_sigmoid")
TOKENS = (1, 3, 5, 13)


def _programs() -> dict[str, Program]:
    made = {}
    for name in UNARY:
        p = made[name] = Program(name, DECODE)
        p.op(name, [p.input("x", "f32[T,33]", stride=40, scale=8.0)])
    for name in BINARY:
        p = made[name] = Program(name)
        p.op(name, [p.input("a", "f32[T,37]"), p.input("b", "f32[T,37]", stride=50)])
    p = made["add a row"] = Program("add a row")
    p.op("add", [p.input("a", "f32[T,37]"), p.weight("b", (37,))])
    p = made["mul by a column"] = Program("mul by a column")
    p.op("mul", [p.input("a", "f32[T,16]"), p.input("b", "f32[T,1]", stride=3)])
    p = made["sigmoid of a column"] = Program("sigmoid of a column", DECODE)
    p.op("mul_sigmoid", [p.input("a", "f32[T,7]"), p.input("b", "f32[T,1]")])
    p = made["a constant minus x"] = Program("a constant minus x")
    p.op("sub", [p.weight("one", (1,)), p.input("b", "f32[T,9]")])
    p = made["three axes"] = Program("three axes")
    p.op("mul", [p.input("a", "f32[T,3,5]", stride=31), p.input("b", "f32[T,3,5]")])
    p = made["rows in heads"] = Program("rows in heads")
    p.op("silu", [p.input("x", "f32[4*T,10]")])
    p = made["scalars"] = Program("scalars")
    p.op("mul_scalar", [p.op("add_scalar", [p.input("x", "f32[T,18]")], value=0.25)], value=-3.0)
    p = made["rms_norm"] = Program("rms_norm", DECODE)
    p.op("rms_norm", [p.input("x", "f32[T,100]", stride=128), p.weight("w", (100,))], eps=1e-6)
    p = made["rms_norm of heads"] = Program("rms_norm of heads")
    p.op("rms_norm", [p.input("x", "f32[T,3,20]", stride=77), p.weight("w", (20,))], eps=1e-5)
    p = made["add_rms_norm"] = Program("add_rms_norm")
    p.op("add_rms_norm", [p.input("x", "f32[T,40]", stride=41), p.input("r", "f32[T,40]"), p.weight("w", (40,))],
         eps=1e-6)
    p = made["gated_rms_norm"] = Program("gated_rms_norm")
    p.op("gated_rms_norm", [p.input("x", "f32[T,4,12]"), p.input("z", "f32[T,4,12]", stride=60), p.weight("w", (12,))],
         eps=1e-6)
    p = made["gated_rms_norm of rows"] = Program("gated_rms_norm of rows")
    p.op("gated_rms_norm", [p.input("x", "f32[4*T,12]"), p.input("z", "f32[4*T,12]"), p.weight("w", (12,))], eps=1e-6)
    p = made["concat"] = Program("concat")
    p.op("concat", [p.input("a", "f32[T,5]", stride=9), p.input("b", "f32[T,16]"), p.input("c", "f32[T,1]")], axis=1)
    p = made["gather_rows"] = Program("gather_rows")
    p.op("gather_rows", [p.input("x", "f32[T,19]", stride=23), p.input("rows", "i32[R]", ints=(0, "T"))])
    for form in ("f32", "bf16"):
        p = made[f"embedding {form}"] = Program(f"embedding {form}")
        p.op("embedding", [p.input("ids", "i32[T]", ints=(0, 50)), p.weight("table", (50, 21), Encoding(form))])
        p = made[f"part of an embedding {form}"] = Program(f"part of an embedding {form}")
        p.op("embedding", [p.input("ids", "i32[T]", ints=(0, 50)), p.weight("table", (19, 21), Encoding(form))],
             first=13)
    return made


CASES = _programs()
POSITIVE = Program("rsqrt")
POSITIVE.op("rsqrt", [POSITIVE.op("exp", [POSITIVE.input("x", "f32[T,33]")])])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_agrees_with_the_table(lab: Lab, name: str, tokens: int) -> None:
    program = CASES[name]
    if tokens > program.bucket.tokens:
        pytest.skip("more tokens than the bucket holds")
    lab.check(program, Ragged((tokens,), rows=min(tokens, 2)), threads=1 + tokens % 2, seed=tokens)


def test_rsqrt_of_positive_numbers(lab: Lab) -> None:
    lab.check(POSITIVE, Ragged((5,)))


def test_exp_reaches_zero_and_infinity(lab: Lab) -> None:
    done = lab.run(CASES["exp"], Ragged((8,)), seed=3)
    assert np.allclose(done.got[0], done.want[0], rtol=3e-7, atol=1e-44)
