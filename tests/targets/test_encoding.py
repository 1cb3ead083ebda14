"""Quantisation and packing in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcn_compile.errors import LoweringError, UsageError
from qcn_compile.ir import fp4
from qcn_compile.ir.encoding import (
    Coded,
    Encoding,
    dequantize,
    encode,
    encode_activations,
    from_bf16,
    quantize,
    quantize_activations,
    to_bf16,
)
from qcn_compile.targets.tvm.packing import interleave, pack, sizes

RNG = np.random.default_rng(0)
W = (RNG.standard_normal((19, 70)) * 0.05).astype(np.float32)
TALL = (RNG.standard_normal((40, 70)) * 0.05).astype(np.float32)


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


def test_nvfp4_takes_the_nearest_code() -> None:
    """Every value becomes the nearest of the 15 that its scales allow; the largest of a group is 6 of them, nearly."""
    w = torch.from_numpy(RNG.standard_normal((2, 5, 40)).astype(np.float32) * 0.05)
    w[0, 0, :16] = 0
    codes, scales, whole = fp4.quantize(w)
    assert codes.shape == (2, 5, 24) and scales.shape == (2, 5, 3) and whole.shape == (2,)
    assert np.array_equal(whole, w.abs().amax((1, 2)).numpy() / np.float32(2688))
    step = torch.from_numpy(scales.copy()).view(torch.float8_e4m3fn).float() * torch.from_numpy(whole)[:, None, None]
    choices = step.repeat_interleave(16, -1)[..., :40, None] * torch.from_numpy(np.unique(fp4.VALUES))
    best = (choices - w[..., None]).abs().min(-1)[0]
    back = torch.from_numpy(fp4.dequantize(codes, scales, whole, 40).copy())
    assert torch.allclose((back - w).abs(), best, atol=1e-8) and not back[0, 0, :16].any()
    most = torch.nn.functional.pad(w, (0, 8)).reshape(2, 5, 3, 16).abs().amax(-1)
    assert ((6 * step - most).abs() <= most / 15).all()
    assert np.array_equal(encode(w[0], Encoding("nvfp4", 16)), back[0].numpy())


def test_nvfp4_bytes() -> None:
    """Halfway goes to the even code; the first of two codes is in the low half of a byte."""
    w = torch.tensor([[6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -6, -0.25, -0.75, 0, 0, 0, 0, 0.5]])
    codes, scales, whole = fp4.quantize(w)
    assert codes.tolist() == [[0x07, 0x22, 0x44, 0x66, 0x8F, 0x0A, 0x00, 0x10]]
    assert scales.tolist() == [[0x7E]] and whole == np.float32(6) / np.float32(2688)


def test_bf16_rounds_to_even() -> None:
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
@pytest.mark.parametrize("layout", ["tiles", "gate_up", "rows", "vector", "channels"])
def test_sizes_are_known_without_packing(format_: str, layout: str) -> None:
    for activations in ("f32", "int8") if format_.startswith("int") else ("f32",):
        if layout in ("rows", "vector", "channels") and format_ != ("bf16" if layout == "rows" else "f32"):
            continue
        shape = (20, 37) if layout in ("rows", "channels") else (3, 20, 37)
        encoding = Encoding(format_, 32, activations)
        parts = pack(layout, encoding, RNG.standard_normal(shape).astype(np.float32))
        assert all(p.ndim == 1 for p in parts.values())
        assert {part: p.nbytes for part, p in parts.items()} == {p: n for p, (_, n) in
                                                                 sizes(layout, encoding, shape).items()}


@pytest.mark.parametrize("activations", ["f32", "int8"])
@pytest.mark.parametrize("format_", ["f32", "bf16", "int8", "int4"])
def test_tiles_by_their_definition(format_: str, activations: str) -> None:
    """Every code where the table in packing.py says it is."""
    if activations == "int8" and not format_.startswith("int"):
        pytest.skip("float weights take float activations")
    encoding = Encoding(format_, 32, activations)
    codes, scales = quantize(TALL, encoding)
    line = pack("tiles", encoding, TALL)["w"]
    for row, k in ((0, 0), (0, 9), (7, 5), (15, 69), (16, 3), (18, 68), (18, 37), (33, 1), (39, 69)):
        tile, lane, depth = row // 16, row % 16, codes.shape[1]
        if activations == "int8":
            value, scale = coded_at(line, format_, depth, row, k)
            assert scales is not None and scale == scales[row, k // 32], (row, k)
        elif format_ == "int4":
            value = int(line.reshape(-1, depth // 2, 16)[tile, k // 2, lane] >> (4 * (k % 2)) & 15) - 8
        elif format_ == "int8":
            value = line.reshape(-1, depth, 16)[tile, k, lane]
        elif tile == 2:  # the last of three
            value = line[2 * depth * 16:].reshape(depth, 16)[k, lane]
        else:
            value = line[:2 * depth * 16].reshape(depth, 2, 16)[k, tile, lane]
        assert value == codes[row, k], (row, k)


def coded_at(line: np.ndarray, format_: str, depth: int, row: int, k: int) -> tuple[int, np.float16]:
    """Code and scale of one weight in a stream for int8 activations."""
    size = 256 if format_ == "int4" else 512
    group = line.view(np.uint8).reshape(-1, depth // 32, size + 32)[row // 16, k // 32]
    lane, inside, scales = row % 16, k % 32, group[size:].view(np.float16)
    if format_ == "int4":
        byte = group[:size].reshape(4, 16, 4)[inside // 8, lane, k % 4]
        return int(byte >> (4 * (inside % 8 // 4)) & 15) - 8, scales[lane]
    return int(group[:size].view(np.int8).reshape(8, 16, 4)[inside // 4, lane, k % 4]), scales[lane]


def test_ties_go_to_the_positive_value() -> None:
    w = np.zeros((1, 32), np.float32)
    w[0, :2] = -1, 1
    _, scales = quantize(w, Encoding("int4"))
    assert scales is not None and scales[0, 0] == -0.125


def test_what_is_coded_already_is_taken_as_it_is() -> None:
    for format_ in ("int4", "int8"):
        codes, scales = quantize(W, Encoding(format_))
        coded = Coded(torch.from_numpy(codes), torch.from_numpy(scales), Encoding(format_), 70)
        again, same = quantize(coded, Encoding(format_, 32, "int8"))
        assert again is not None and np.array_equal(again, codes) and np.array_equal(same, scales)
        assert np.array_equal(coded.wide().numpy(), dequantize(codes, scales, Encoding(format_), 70))
        assert np.array_equal(encode(coded, Encoding("bf16")), encode(coded.wide(), Encoding("bf16")))


def test_f32_tiles_by_hand() -> None:
    w = np.arange(17 * 3, dtype=np.float32).reshape(17, 3)
    tiles = pack("tiles", Encoding("f32"), w)["w"].reshape(3, 2, 16)
    assert np.array_equal(tiles[:, 0].T, w[:16]) and np.array_equal(tiles[:, 1].T[0], w[16])
    assert not tiles[:, 1, 1:].any()
    mixed = interleave(w[:6])
    assert isinstance(mixed, torch.Tensor)
    assert np.array_equal(mixed.numpy()[[0, 1, 2, 8, 9, 10]], w[:6])


@pytest.mark.parametrize("layout", ["tiles", "gate_up"])
def test_codes_are_packed_without_quantising_again(layout: str) -> None:
    """Scales that no rounding of ours would choose survive the packing."""
    codes = torch.from_numpy(RNG.integers(-3, 4, (20, 64)).astype(np.int8))
    scales = torch.from_numpy(RNG.random((20, 2)).astype(np.float16))
    coded = Coded(codes, scales, Encoding("int4"), 64)
    parts = pack(layout, Encoding("int4"), coded)
    rows = np.arange(20) if layout == "tiles" else np.array([*range(8), *range(10, 18), 8, 9, *[-1] * 6, 18, 19])
    made = parts["s"].view(np.float16).reshape(-1, 2, 16)
    nibble = parts["w"].reshape(-1, 32, 16)
    for place, row in enumerate(rows):
        tile, lane = divmod(place, 16)
        if row >= 0:
            assert np.array_equal(made[tile, :, lane], scales[row].numpy())
            assert np.array_equal((nibble[tile, :, lane] & 15).astype(int) - 8, codes[row, 0::2].numpy())
            assert np.array_equal((nibble[tile, :, lane] >> 4).astype(int) - 8, codes[row, 1::2].numpy())


def test_unknown_layout() -> None:
    with pytest.raises(LoweringError, match="no weight layout named 'spiral'; the CPU target packs tiles"):
        pack("spiral", Encoding(), W)
