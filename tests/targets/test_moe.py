"""Router and experts against the op table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import DECODE, PREFILL, Lab, Program, Ragged, Trial
from torch.nn import functional as F

from qcn_compile.ir.encoding import Encoding, encode_activations
from qcn_compile.ir.graph import Value
from qcn_compile.targets.base import Bucket

ENCODINGS = [Encoding("f32"), Encoding("bf16"), Encoding("int8"), Encoding("int4"),
             Encoding("int8", 32, "int8"), Encoding("int4", 32, "int8")]


def _route(experts: int, top_k: int, normalize: bool, shared: bool, stride: int = 0) -> Program:
    p = Program(f"route {experts} {top_k} {normalize} {shared}")
    p.op("moe_route", [p.input("logits", f"f32[T,{experts + shared}]", stride=stride, scale=3.0)], top_k=top_k,
         normalize=normalize, shared=shared)
    return p


ROUTES = [_route(8, 2, True, False), _route(64, 10, True, True, 80), _route(33, 3, False, True),
          _route(5, 5, True, False), _route(512, 10, True, True)]


@pytest.mark.parametrize("program", ROUTES, ids=lambda p: p.name)
def test_route(lab: Lab, program: Program) -> None:
    for tokens in (1, 3, 13):
        lab.check(program, Ragged((tokens,)), threads=2, seed=tokens)


def _local(first: int, count: int, shared: bool, group: int) -> Program:
    p = Program(f"local experts {first} {count} {shared} {group}")
    route = p.op("moe_route", [p.input("logits", f"f32[T,{12 + shared}]", scale=3.0)], top_k=5, normalize=True,
                 shared=shared)
    p.op("local_experts", list(route), first=first, count=count, shared=12 if shared else -1, group=group, groups=3)
    return p


LOCAL = [_local(0, 4, True, 0), _local(8, 4, True, 2), _local(4, 3, False, 1)]


@pytest.mark.parametrize("program", LOCAL, ids=lambda p: p.name)
def test_experts_of_a_group(lab: Lab, program: Program) -> None:
    for tokens in (1, 13):
        lab.check(program, Ragged((tokens,)), seed=tokens)


TIES = Program("route with ties")
TIES.op("moe_route", [TIES.op("mul_scalar", [TIES.input("x", "f32[T,20]")], value=0.0)], top_k=4, normalize=True,
        shared=False)


def test_equal_scores_go_to_lower_experts(lab: Lab) -> None:
    ids = lab.run(TIES, Ragged((3,))).got[1]
    assert (ids == np.arange(4)).all()


def test_nan_scores_still_name_experts(lab: Lab) -> None:
    nan = lab.run(NOT_A_NUMBER, Ragged((3,)))
    assert ((nan.got[2] >= 0) & (nan.got[2] < 20)).all()


NOT_A_NUMBER = Program("route of NaN")
NOT_A_NUMBER.op("moe_route", [NOT_A_NUMBER.op("rsqrt", [NOT_A_NUMBER.op("add_scalar", [
    NOT_A_NUMBER.input("x", "f32[T,20]")], value=-50.0)])], top_k=4, normalize=True, shared=False)


def int8_experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
                 r: torch.Tensor | None = None, *, activation: str) -> torch.Tensor:
    """moe_experts with the int8 round trip before both products."""
    def quantised(t: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(encode_activations(t.numpy()))

    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for j in range(ids.shape[1]):
            e = int(ids[t, j])
            gate, up = F.linear(quantised(x[t:t + 1]), gate_up[e]).chunk(2, -1)
            out[t] += weights[t, j] * F.linear(quantised(F.silu(gate) * up), down[e])[0]
    return out if r is None else out + r


def _experts(name: str, encoding: Encoding, bucket: Bucket, experts: int, hidden: int, inner: int,
             top_k: int) -> Program:
    p = Program(f"{name} {encoding.format} x {encoding.activations} {experts} {hidden} {inner} {bucket.name}", bucket)
    shared = name == "moe_add"
    logits = p.input("logits", f"f32[T,{experts}]", scale=2.0)
    ids, weights = p.op("moe_route", [logits], top_k=top_k, normalize=True, shared=shared)
    operands: list[Value | None] = [
        p.input("x", f"f32[T,{hidden}]", stride=hidden + 3), ids, weights,
        p.weight("gate_up", (experts, 2 * inner, hidden), encoding),
        p.weight("down", (experts, hidden, inner), encoding)]
    if shared:
        operands.append(p.input("r", f"f32[T,{hidden}]", stride=hidden + 8))
    p.op(name, operands, int8_experts if encoding.activations == "int8" else None, activation="silu")
    return p


EXPERTS = ([_experts("moe_experts", e, PREFILL, 9, 33, 20, 2) for e in ENCODINGS]
           + [_experts("moe_add", e, PREFILL, 6, 64, 32, 3) for e in ENCODINGS]
           + [_experts("moe_add", e, DECODE, 6, 64, 32, 3) for e in ENCODINGS])


@pytest.mark.parametrize("program", EXPERTS, ids=lambda p: p.name)
def test_experts(lab: Lab, program: Program) -> None:
    # a code of the quantised hidden layer may round the other way, one step in 127
    tolerance = 4e-3 if "x int8" in program.name else 2e-5
    for tokens in (1, 3, 8) if program.bucket is DECODE else (1, 5, 13, 40):
        lab.check(program, Ragged((tokens,)), threads=1 + tokens % 2, seed=tokens, tolerance=tolerance)


def test_threads_do_not_change_a_bit(lab: Lab) -> None:
    for program in EXPERTS[6:12]:
        one, two = (lab.run(program, Ragged((13,)), threads, seed=2).got[-1] for threads in (1, 2))
        assert np.array_equal(one, two)


@pytest.mark.parametrize("index", range(6))
def test_a_token_gets_the_same_bits_alone_and_in_a_batch(lab: Lab, index: int) -> None:
    prefill, decode = EXPERTS[6 + index], EXPERTS[12 + index]
    whole = Trial(prefill, Ragged((31,)), lab.target, np.random.default_rng(3))
    result = lab.launch(whole, 2)
    assert np.array_equal(lab.pieces(whole, [(decode, 1), (decode, 7), (prefill, 23)]), result)
