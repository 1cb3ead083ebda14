"""Matrix products in every weight format against the op table on the encoded weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import DECODE, PREFILL, Lab, Program, Ragged, Trial, assert_close
from tvm.tirx.script.builder import ir as T

from qcn_compile.ir.encoding import Encoding, encode_activations
from qcn_compile.ir.optable import TABLE
from qcn_compile.targets.base import Bucket
from qcn_compile.targets.cpu import CpuTarget
from qcn_compile.targets.tvm.kernels import integer
from qcn_compile.targets.tvm.kernels.core import Machine, i32, lanes_of, vector

ENCODINGS = [Encoding("f32"), Encoding("bf16"), Encoding("int8"), Encoding("int4"),
             Encoding("int8", 32, "int8"), Encoding("int4", 32, "int8")]
SHAPES = [(17, 33), (40, 100), (1, 7), (64, 96)]


def through_int8(name: str):  # type: ignore[no-untyped-def]
    """The reference of `name` with x replaced by its int8 round trip."""
    def run(x: torch.Tensor, *rest: torch.Tensor, **attrs: object) -> torch.Tensor:
        return TABLE[name].reference(torch.from_numpy(encode_activations(x.numpy())), *rest, **attrs)

    return run


def _programs(bucket: Bucket) -> dict[tuple[str, str, int, int], Program]:
    made = {}
    for encoding in ENCODINGS:
        for n, k in SHAPES:
            p = Program(f"linear {encoding.format} x {encoding.activations} [{n}, {k}] {bucket.name}", bucket)
            reference = through_int8("linear") if encoding.activations == "int8" else None
            p.op("linear", [p.input("x", f"f32[T,{k}]", stride=k + 5), p.weight("w", (n, k), encoding)], reference)
            made[encoding.format, encoding.activations, n, k] = p
    return made


DECODING, PREFILLING = _programs(DECODE), _programs(PREFILL)


@pytest.mark.parametrize("key", DECODING, ids=lambda k: f"{k[0]}x{k[1]}-{k[2]}x{k[3]}")
def test_decode(lab: Lab, key: tuple[str, str, int, int]) -> None:
    for tokens in (1, 2, 3, 5, 8):
        lab.check(DECODING[key], Ragged((tokens,)), threads=1 + tokens % 2, seed=tokens)


@pytest.mark.parametrize("key", PREFILLING, ids=lambda k: f"{k[0]}x{k[1]}-{k[2]}x{k[3]}")
def test_prefill(lab: Lab, key: tuple[str, str, int, int]) -> None:
    for tokens in (1, 6, 7, 13, 64):
        lab.check(PREFILLING[key], Ragged((tokens,)), threads=1 + tokens % 2, seed=tokens)


def _with_addend(name: str, encoding: Encoding) -> Program:
    p = Program(f"{name} {encoding.format}")
    x, w = p.input("x", "f32[T,50]"), p.weight("w", (35, 50), encoding)
    reference = through_int8(name) if encoding.activations == "int8" else None
    if name == "linear_add":
        p.op(name, [x, w, p.input("r", "f32[T,35]", stride=64)], reference)
    else:
        p.op(name, [x, w, p.weight("bias", (35,))], reference)
    return p


ADDENDS = [_with_addend(name, encoding) for name in ("linear_add", "linear") for encoding in
           (Encoding("bf16"), Encoding("int4", 32, "int8"))]


@pytest.mark.parametrize("program", ADDENDS, ids=lambda p: p.name)
def test_residual_and_bias(lab: Lab, program: Program) -> None:
    lab.check(program, Ragged((13,)), threads=2)


LAST_ROWS = Program("logits of wanted rows")
_x = LAST_ROWS.op("gather_rows", [LAST_ROWS.input("x", "f32[T,32]"), LAST_ROWS.input("rows", "i32[R]", ints=(0, "T"))])
LAST_ROWS.op("linear", [_x, LAST_ROWS.weight("w", (50, 32))])


def test_rows_of_another_symbol(lab: Lab) -> None:
    lab.check(LAST_ROWS, Ragged((9,), rows=3))


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: f"{e.format}x{e.activations}")
def test_a_token_gets_the_same_bits_alone_and_in_a_batch(lab: Lab, encoding: Encoding) -> None:
    key = (encoding.format, encoding.activations, 40, 100)
    many = Trial(PREFILLING[key], Ragged((17,)), lab.target, np.random.default_rng(5))
    whole = lab.launch(many, 2)
    assert np.array_equal(lab.pieces(many, [(DECODING[key], 1), (DECODING[key], 3), (PREFILLING[key], 13)]), whole)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_avx2_and_vnni_give_the_same_bits(lab: Lab, tmp_path: Path, form: str) -> None:
    if "vnni" not in lab.target.hardware.features:
        pytest.skip("needs AVX-512 VNNI")
    program = PREFILLING[form, "int8", 40, 100]
    plain = Lab(tmp_path, [program], CpuTarget("x86-64-v3"))
    one, two = (each.run(program, Ragged((13,)), seed=4).got[0] for each in (lab, plain))
    plain.host.c.qcn_host_shutdown()
    assert np.array_equal(one, two)


def _products(sums: Any, w: Any, x: Any, signed: bool) -> Any:
    """What a dot product instruction does to int32 lanes of four codes, in plain arithmetic."""
    lanes = lanes_of(sums)
    w, x = (T.reinterpret(vector("int32", lanes), codes) for codes in (w, x))
    for byte in range(4):
        left, down = i32(24 - 8 * byte, lanes), i32(24, lanes)
        a, b = (T.shift_right(T.shift_left(codes, left), down) for codes in (w, x))
        sums = sums + (a if signed else T.bitwise_and(a, i32(255, lanes))) * b
    return sums


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize(("machine", "family"), [
    (Machine(8, 8), integer.VnniTile), (Machine(8, 16), integer.VnniTile), (Machine(8, 4, arm=True), integer.ArmTile),
], ids=["avxvnni", "avx512vnni", "arm"])
def test_tiles_of_dot_products_give_the_same_bits(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str,
                                                  machine: Machine, family: type[integer.DotTile]) -> None:
    """On any machine: the instruction is replaced by what it does, everything around it runs as it is."""
    monkeypatch.setattr(family, "_product", lambda self, sums, w, x: _products(sums, w, x, machine.arm))
    monkeypatch.setattr(Machine, "of", staticmethod(lambda features: machine))
    programs = [PREFILLING[form, "int8", 40, 100], DECODING[form, "int8", 17, 33]]
    other = Lab(tmp_path, programs, CpuTarget("x86-64-v3"))
    for program in programs:
        one, two = (each.run(program, Ragged((7,)), seed=4).got[0] for each in (lab, other))
        assert np.array_equal(one, two)
    other.host.c.qcn_host_shutdown()


@pytest.mark.parametrize("key", [k for k in PREFILLING if k[2:] == (40, 100)], ids=str)
def test_threads_do_not_change_a_bit(lab: Lab, key: tuple[str, str, int, int]) -> None:
    one, two = (lab.run(PREFILLING[key], Ragged((13,)), threads, seed=1).got[0] for threads in (1, 2))
    assert np.array_equal(one, two)


def test_zero_rows_of_x_give_zero(lab: Lab) -> None:
    """A group of zeros has scale 0, not NaN."""
    program = PREFILLING["int4", "int8", 40, 100]
    trial = Trial(program, Ragged((3,)), lab.target, np.random.default_rng(0))
    for value, kind in program.values.items():
        if kind[0] == "input":
            trial.buffers[value][1][...] = 0
    assert_close(lab.launch(trial), np.zeros((3, 40), np.float32), 0.0, "zeros")
