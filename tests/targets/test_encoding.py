"""Quantisation and packing in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from qcn_compile.errors import LoweringError, UsageError
from qcn_compile.ir.encoding import (
    Encoding,
    dequantize,
    encode,
    encode_activations,
    from_bf16,
    quantize,
    quantize_activations,
    to_bf16,
)
from qcn_compile.targets.tvm.packing import interleave, pack

RNG = np.random.default_rng(0)
W = (RNG.standard_normal((19, 70)) * 0.05).astype(np.float32)


@pytest.mark.parametrize(("format_", "step"), [("int8", 127), ("int4", 8)])
def test_error_is_within_half_a_step(format_: str, step: int) -> None:
    codes, scales = quantize(W, Encoding(format_))
    assert codes.shape == (19, 96) and codes.dtype == np.int8
    assert scales is not None and scales.shape == (19, 3) and scales.dtype == np.float16
    error = np.abs(dequantize(codes, scales, Encoding(format_), 70) - W)
    most = np.stack([np.abs(W[:, g * 32:(g + 1) * 32]).max(1) for g in range(3)], 1).repeat(32, 1)[:, :70]
    bound = most / step * (1.01 if format_ == "int4" else 0.51)  # int4: the end without a code may clip by one step
    assert (error <= bound).all()


def test_extremes_are_kept() -> None:
    w = np.zeros((1, 32), np.float32)
    w[0, :3] = 0.5, -0.25, 0.125
    assert np.array_equal(encode(w, Encoding("int4")), w)
    assert (quantize(w, Encoding("int4"))[0][0, :3] == [-8, 4, -2]).all()


def test_zeros_and_infinitesimals() -> None:
    for format_ in ("int8", "int4"):
        for value in (0.0, 1e-38):
            assert np.array_equal(encode(np.full((2, 40), value, np.float32), Encoding(format_)), np.zeros((2, 40)))
    codes, scales = quantize_activations(np.zeros((2, 40), np.float32))
    assert not codes.any() and not scales.any()


def test_bf16_rounds_to_even() -> None:
    import torch

    special = np.float32([0, -0.0, np.inf, -np.inf, np.nan, 1e-40])
    x = np.concatenate([RNG.standard_normal(1000).astype(np.float32), special])
    want = torch.from_numpy(x).bfloat16().float().numpy()
    assert np.array_equal(from_bf16(to_bf16(x)), want, equal_nan=True)
    assert np.array_equal(encode(W, Encoding("bf16")), torch.from_numpy(W).bfloat16().float().numpy())
    assert encode(W, Encoding("f32")) is not None and np.array_equal(encode(W, Encoding("f32")), W)


def test_activations_round_trip() -> None:
    x = RNG.standard_normal((5, 70)).astype(np.float32)
    assert np.abs(encode_activations(x) - x).max() <= np.abs(x).max() / 127 * 0.51


@pytest.mark.parametrize(("encoding", "message"), [
    (Encoding("fp6"), "weight format 'fp6' is unknown here; choose one of f32, bf16, int8, int4"),
    (Encoding("int4", 128), "group 128 is not supported on the CPU; use group 32"),
    (Encoding("bf16", 32, "int8"), "bf16 weights take f32 activations"),
    (Encoding("int8", 32, "bf16"), "activations 'bf16' are unknown here; choose f32 or int8"),
])
def test_unknown_encodings(encoding: Encoding, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(W, encoding)


@pytest.mark.parametrize("format_", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("layout", ["tiles", "gate_up"])
def test_blobs_are_flat_and_whole_lines(format_: str, layout: str) -> None:
    for activations in ("f32", "int8") if format_.startswith("int") else ("f32",):
        weight = RNG.standard_normal((3, 20, 37)).astype(np.float32)
        parts = pack(layout, Encoding(format_, 32, activations), weight)
        assert set(parts) == ({"w", "s"} if format_.startswith("int") else {"w"})
        assert all(p.ndim == 1 and p.nbytes % 64 == 0 for p in parts.values())


def test_f32_tiles_by_hand() -> None:
    w = np.arange(17 * 3, dtype=np.float32).reshape(17, 3)
    tiles = pack("tiles", Encoding("f32"), w)["w"].reshape(2, 3, 16)
    assert np.array_equal(tiles[0].T, w[:16]) and np.array_equal(tiles[1].T[0], w[16]) and not tiles[1][:, 1:].any()
    assert np.array_equal(interleave(w[:6])[[0, 1, 2, 8, 9, 10]], w[:6])


def test_unknown_layout() -> None:
    with pytest.raises(LoweringError, match="no weight layout named 'spiral'; the CPU target packs tiles"):
        pack("spiral", Encoding(), W)
