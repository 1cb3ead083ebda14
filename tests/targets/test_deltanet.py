"""The DeltaNet token mixer: outputs and both final states, ragged, with and without earlier tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import DECODE, PREFILL, Lab, Program, Ragged, Trial, floats

from qcn_compile.ir.types import DType, StateKind, StateType
from qcn_compile.targets.base import Bucket


def _delta_net(key_heads: int, value_heads: int, key_dim: int, value_dim: int, taps: int, bucket: Bucket,
               strided: bool = False, rounds: str | None = None) -> Program:
    sizes = f"{key_heads}/{value_heads} {key_dim}x{value_dim} taps {taps}"
    p = Program(f"delta_net {sizes} {bucket.name} {rounds or 'f32'}", bucket)
    channels, width, more = 2 * key_heads * key_dim + value_heads * value_dim, value_heads * value_dim, 9 * strided
    conv = p.state("conv", StateType(StateKind.conv, DType.f32, (channels, taps - 1)))
    delta = p.state("delta", StateType(StateKind.delta, DType(rounds or "f32"), (value_heads, key_dim, value_dim)))
    p.op("delta_net", [
        p.input("qkv", f"f32[T,{channels}]", stride=channels + more),
        p.input("z", f"f32[T,{width}]", stride=width + more),
        p.input("b", f"f32[T,{value_heads}]", stride=value_heads + more),
        p.input("a", f"f32[T,{value_heads}]", stride=value_heads + 2 * more),
        p.weight("conv_w", (channels, taps)), p.weight("decay", (value_heads,)), p.weight("dt_bias", (value_heads,)),
        p.weight("norm_w", (value_dim,), scale=1.0), p.batch], key_heads=key_heads, value_heads=value_heads,
        key_dim=key_dim, value_dim=value_dim, eps=1e-6, conv=conv, delta=delta, rounds=rounds)
    return p


PROGRAMS = [
    _delta_net(2, 4, 16, 32, 4, PREFILL, strided=True), _delta_net(2, 4, 16, 32, 4, DECODE),
    _delta_net(1, 3, 7, 9, 3, PREFILL), _delta_net(2, 2, 32, 16, 2, DECODE, strided=True),
    _delta_net(2, 4, 16, 32, 4, PREFILL, rounds="bf16"), _delta_net(2, 4, 16, 32, 4, DECODE, rounds="bf16"),
    _delta_net(1, 3, 7, 9, 3, PREFILL, rounds="bf16"),
]
BATCHES = [
    Ragged((1,)), Ragged((1,), (9,)), Ragged((5,)), Ragged((2, 1, 3), (0, 17, 4)), Ragged((1, 1, 1, 1), (3, 0, 1, 2)),
    Ragged((33, 1, 20), (0, 100, 31)), Ragged((64,), (7,)),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
@pytest.mark.parametrize("ragged", BATCHES, ids=lambda r: f"{r.lengths}+{r.contexts}")
def test_delta_net(lab: Lab, program: Program, ragged: Ragged) -> None:
    if ragged.sizes["T"] > program.bucket.tokens:
        pytest.skip("more tokens than the bucket holds")
    rounded = "bf16" in program.name  # sums in another order may round to the next number, 2^-8 away
    lab.check(program, ragged, threads=1 + len(ragged.lengths) % 2, seed=len(ragged.lengths),
              tolerance=8e-3 if rounded else 5e-5)


def test_a_bf16_state_is_rounded_to_the_nearest(lab: Lab) -> None:
    """After the first token from nothing: the f32 state rounded as torch does, and the same result, bit by bit."""
    exact, rounded = (Trial(program, Ragged((1,)), lab.target, np.random.default_rng(4))
                      for program in (PROGRAMS[1], PROGRAMS[5]))
    assert np.array_equal(lab.launch(exact), lab.launch(rounded))
    slot = exact.arrays["slots"][0]
    fine, coarse = (floats(trial.buffers["state", "delta", ""][1][slot]) for trial in (exact, rounded))
    assert np.array_equal(torch.from_numpy(fine).bfloat16().float().numpy(), coarse)
    assert not np.array_equal(fine, coarse)


@pytest.mark.parametrize("program", [PROGRAMS[0], PROGRAMS[1], PROGRAMS[4]], ids=lambda p: p.name)
def test_a_state_may_be_written_to_another_slot(lab: Lab, program: Program) -> None:
    """Same results and states as in place, and what was read is still there, bit by bit."""
    ragged = Ragged((3, 1, 2), (7, 0, 40))
    trials = [Trial(program, ragged, lab.target, np.random.default_rng(9)) for _ in range(2)]
    place, away = trials
    free = [slot for slot in range(away.slots) if slot not in away.arrays["slots"]]
    assert len(free) == 2
    away.arrays["into"][[0, 2]] = free
    keys = [key for key in away.buffers if isinstance(key, tuple) and key[0] == "state"]
    before = {key: away.buffers[key][1].copy() for key in keys}
    results = [lab.launch(trial) for trial in trials]
    assert np.array_equal(*results)
    for key, old in before.items():
        have, want = away.buffers[key][1], place.buffers[key][1]
        for s, slot in enumerate(away.arrays["slots"]):
            assert np.array_equal(have[away.arrays["into"][s]], want[slot]), (key, s)
        for slot in away.arrays["slots"][[0, 2]]:
            assert np.array_equal(have[slot], old[slot], equal_nan=True), (key, slot)


def test_threads_do_not_change_a_bit(lab: Lab) -> None:
    one, two = (lab.run(PROGRAMS[0], BATCHES[5], threads, seed=2) for threads in (1, 2))
    assert np.array_equal(one.got[0], two.got[0])
    for (_, a, _), (_, b, _) in zip(one.states, two.states, strict=True):
        assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize(("prefill", "decode"), [PROGRAMS[:2], PROGRAMS[4:6]], ids=["f32", "bf16"])
def test_steps_and_chunks_give_the_same_bits_as_the_whole(lab: Lab, prefill: Program, decode: Program) -> None:
    whole = Trial(prefill, Ragged((22,)), lab.target, np.random.default_rng(3))
    result = lab.launch(whole, 2)
    steps = [(prefill, 7), (prefill, 11), (decode, 1), (decode, 1), (decode, 2)]
    assert np.array_equal(lab.pieces(whole, steps), result)
