"""Rotary embedding, cache append and attention over pages, with caches compared afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from harness import DECODE, PREFILL, Lab, Program, Ragged, Trial

from qcn_compile.ir.types import DType, StateKind, StateType
from qcn_compile.targets.base import Bucket

TABLE = Program("rope_table")
_positions = TABLE.input("positions", "i32[T]", ints=(0, 1_048_576))
TABLE.op("rope_table", [_positions, TABLE.weight("inv_freq", (9,), scale=1.0)], scaling=1.25)


def test_rope_table(lab: Lab) -> None:
    lab.check(TABLE, Ragged((13,)))


def _attention(heads: int, kv_heads: int, dim: int, half: int, norms: bool, gate: bool, bucket: Bucket,
               strided: bool = False) -> Program:
    p = Program(f"attention {heads}/{kv_heads} of {dim}, rope {half}, {norms=}, {gate=}, {bucket.name}", bucket)
    kv = p.state("kv", StateType(StateKind.kv, DType.f32, (kv_heads, dim)))
    more = 11 if strided else 0
    q = p.input("q", f"f32[T,{heads},{dim}]", stride=heads * dim + more)
    k = p.input("k", f"f32[T,{kv_heads},{dim}]", stride=kv_heads * dim + more)
    v = p.input("v", f"f32[T,{kv_heads},{dim}]", stride=kv_heads * dim + 2 * more)
    weights = [p.weight("q_w", (dim,), scale=1.0), p.weight("k_w", (dim,), scale=1.0)] if norms else [None, None]
    cos, sin = p.input("cos", f"f32[T,{half}]"), p.input("sin", f"f32[T,{half}]")
    query = p.op("rope_append", [q, k, v, *weights, cos, sin, p.batch], eps=1e-6, state=kv)
    g = p.input("g", f"f32[T,{heads * dim}]", stride=heads * dim + more) if gate else None
    p.op("paged_attention", [query, g, p.batch], scale=dim ** -0.5, state=kv)
    return p


PROGRAMS = [
    _attention(4, 2, 32, 4, True, True, PREFILL, strided=True),
    _attention(4, 2, 32, 4, True, True, DECODE),
    _attention(6, 1, 24, 12, False, False, PREFILL),
    _attention(3, 3, 21, 5, True, False, PREFILL),
    _attention(16, 2, 64, 8, True, True, DECODE, strided=True),
]
LONG = _attention(4, 2, 32, 4, True, True, Bucket("prefill-1200", 1200, 1, 1))
BATCHES = [
    Ragged((1,)), Ragged((5,)), Ragged((1,), (40,)), Ragged((3, 1, 4), (0, 31, 70)),
    Ragged((1, 1, 1, 1), (15, 16, 0, 63)),
    Ragged((33, 1, 20), (0, 100, 31)),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
@pytest.mark.parametrize("ragged", BATCHES, ids=lambda r: f"{r.lengths}+{r.contexts}")
def test_attention(lab: Lab, program: Program, ragged: Ragged) -> None:
    if ragged.sizes["T"] > program.bucket.tokens:
        pytest.skip("more tokens than the bucket holds")
    lab.check(program, ragged, threads=1 + len(ragged.lengths) % 2, seed=len(ragged.lengths))


@pytest.mark.parametrize("program", PROGRAMS[:2], ids=lambda p: p.name)
@pytest.mark.parametrize("ragged", [Ragged((1,), (511,)), Ragged((1,), (512,)), Ragged((2, 1, 1), (1030, 5, 8191)),
                                    Ragged((3, 2), (8190, 9500))], ids=lambda r: f"{r.lengths}+{r.contexts}")
def test_long_contexts_are_cut_into_parts(lab: Lab, program: Program, ragged: Ragged) -> None:
    lab.check(program, ragged, threads=2)


def test_threads_do_not_change_a_bit(lab: Lab) -> None:
    one, two = (lab.run(PROGRAMS[0], BATCHES[5], threads, seed=2).got[-1] for threads in (1, 2))
    assert np.array_equal(one, two)


def test_steps_and_chunks_give_the_same_bits_as_the_whole(lab: Lab) -> None:
    decode = PROGRAMS[1]
    for prefill, tokens in ((PROGRAMS[0], 50), (LONG, 1100)):
        whole = Trial(prefill, Ragged((tokens,)), lab.target, np.random.default_rng(3))
        result = lab.launch(whole, 2)
        steps = [(prefill, tokens - 33), (prefill, 30), (decode, 1), (decode, 2)]
        assert np.array_equal(lab.pieces(whole, steps), result)
