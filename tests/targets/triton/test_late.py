"""Weights bound late equal weights copied, byte for byte; dummy sizes equal packed sizes."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from qcn_compile.ir import fp4, fp8, int4
from qcn_compile.ir.encoding import Encoding, to_bf16
from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.optable import TABLE
from qcn_compile.lowering.late import deferred, merged_names
from qcn_compile.lowering.rows import Tensors
from qcn_compile.lowering.weights import BlobKey, name_blobs, packed
from qcn_compile.runtime import late_fp4, late_int4, late_weights
from qcn_compile.runtime.late_checkpoint import Checkpoint, Tensor, concat
from qcn_compile.targets.triton.packing import pack, sizes
from qcn_compile.targets.triton.target import GpuTarget

FORMATS = (Encoding("bf16"), Encoding("fp8", 128), Encoding("nvfp4", 16), Encoding("int4-g128", 128))


def _value(op: str, inputs: list[Value], /, **attrs: object) -> Value:
    import qcn_compile.ir.ops  # noqa: F401  (fills the op table)

    made = Op(op, list(inputs), [], attrs)  # type: ignore[arg-type]
    made.results = [Value(op, TABLE[op].infer(*[v.type for v in inputs], **attrs), made)]
    return made.result


def _weight(name: str, *shape: int) -> Value:
    from qcn_compile.ir.types import DType

    return _value("weight", [], name=name, dtype=DType.bf16, shape=shape)


def _keys() -> list[BlobKey]:
    from qcn_compile.ir.types import DType

    a, b = _weight("a.weight", 256, 160), _weight("b.weight", 128, 160)
    both = _value("concat", [_value("take_rows", [a], runs=((128, 128), (0, 128))), b], axis=0)
    odd = _value("take_rows", [a], runs=((2, 2), (0, 2)))
    experts, one = _weight("model.layers.0.mlp.experts.gate_up_proj", 3, 64, 40), _weight("s.weight", 64, 40)
    stack = _value("concat", [experts, _value("reshape", [one], shape=(1, 64, 40))], axis=0)
    norm = _value("add_scalar", [_value("cast", [_weight("n.weight", 40)], dtype=DType.f32)], value=1.0)
    decay = _value("neg", [_value("exp", [_value("cast", [_weight("A_log", 40)], dtype=DType.f32)])])
    taps = _value("reshape", [_weight("c.weight", 24, 1, 4)], shape=(24, 4))
    return [*(BlobKey(v, "matrix", e) for v in (both, odd, stack) for e in FORMATS),
            BlobKey(norm, "vector", Encoding()), BlobKey(decay, "vector", Encoding()),
            BlobKey(taps, "channels", Encoding())]


def _checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """bf16 tensors on disk, experts apart; the same as the traced model names them, f32."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (256, 160), "b.weight": (128, 160), "s.weight": (64, 40),
                                          "n.weight": (40,), "A_log": (40,), "c.weight": (24, 1, 4)}
    for e in range(3):
        for part in ("gate_proj", "up_proj"):
            shapes[f"model.layers.0.mlp.experts.{e}.{part}.weight"] = (32, 40)
    bits = {name: to_bf16(rng.standard_normal(shape)) for name, shape in shapes.items()}
    _save(bits, folder, {"U16": "BF16"})
    wide = {name: (data.astype(np.uint32) << 16).view(np.float32) for name, data in bits.items()}
    stem = "model.layers.0.mlp.experts"
    wide[f"{stem}.gate_up_proj"] = np.stack([np.concatenate(
        [wide[f"{stem}.{e}.{part}.weight"] for part in ("gate_proj", "up_proj")]) for e in range(3)])
    return wide


def _save(tensors: dict[str, np.ndarray], folder: Path, dtypes: dict[str, str]) -> None:
    """A safetensors file whose dtypes have these names: NumPy knows neither bf16 nor e4m3."""
    save_file(tensors, folder / "model.safetensors")
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8:8 + length].decode()
    for old, new in dtypes.items():
        header = header.replace(f'"{old}"', f'"{new}"')
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + raw[8 + length:])


def test_late_equals_copied(tmp_path: Path) -> None:
    wide, target = _checkpoint(tmp_path), GpuTarget("h100")
    names = name_blobs(_keys())
    copied = dict(packed(names, Tensors({name: torch.from_numpy(data) for name, data in wide.items()}), target))
    later, now = deferred(names, target, "late")
    assert not now
    checkpoint = Checkpoint(tmp_path)
    for name, recipe in json.loads(json.dumps(later["recipes"])).items():
        for part, blob in bound(recipe, checkpoint).items():
            want = copied[f"{name}.{part}"]
            if "vector" in name:  # exp of NumPy and of torch differ in the last bit
                np.testing.assert_allclose(blob.view(np.float32), want.view(np.float32), rtol=1e-6)
            else:
                assert blob.tobytes() == want.tobytes(), name
            assert blob.nbytes == recipe["parts"][part]


def test_an_fp8_checkpoint_is_copied_not_converted() -> None:
    rng = np.random.default_rng(1)
    codes, scales = fp8.quantize(torch.from_numpy(rng.standard_normal((256, 160)).astype(np.float32)))
    stored = Tensor("fp8", codes, scales)
    runs = late_weights.runs([[128, 128], [0, 128]], 0, 256)
    parts = late_weights.pack("matrix", "fp8", concat([stored.rows(*run) for run in runs], 0))
    assert parts["w"].tobytes() == np.concatenate([codes[128:], codes[:128]]).tobytes()
    assert parts["s"][:16].tobytes() == scales[::-1].copy().tobytes()
    np.testing.assert_array_equal(stored.wide(), fp8.dequantize(codes, scales))


@pytest.mark.parametrize("stored", ["bf16", "fp8"])
def test_a_bank_of_experts_never_lies_in_memory(stored: str, tmp_path: Path) -> None:
    experts, shape = 64, (256, 512)
    rng = np.random.default_rng(4)
    tensors: dict[str, np.ndarray] = {}
    for name in (f"m.experts.{e}.down_proj.weight" for e in range(experts)):
        w = rng.standard_normal(shape).astype(np.float32)
        tensors |= {name: to_bf16(w)} if stored == "bf16" else dict(
            zip((name, name + "_scale_inv"), late_weights.quantize(w), strict=True))
    _save(tensors, tmp_path, {"U16": "BF16", "U8": "F8_E4M3"})
    bank = _weight("m.experts.down_proj", experts, *shape)
    target = GpuTarget("h100")
    recipe = deferred({BlobKey(bank, "matrix", Encoding("fp8", 128)): "bank"}, target, "late")[0]["recipes"]["bank"]
    checkpoint = Checkpoint(tmp_path)
    list(late_weights.pieces(recipe, checkpoint))
    tracemalloc.start()
    whole = sum(data.nbytes for _, _, data in late_weights.pieces(recipe, checkpoint))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert whole == experts * (256 * 512 + 4 * 2 * 4)
    assert most < 16e6 < 4 * experts * 256 * 512  # some experts in f32 of 33 MB


def bound(recipe: dict[str, Any], checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Part name -> whole lines of bytes of one blob."""
    made = {part: np.zeros(size, np.uint8) for part, size in recipe["parts"].items()}
    for part, offset, data in late_weights.pieces(recipe, checkpoint):
        made[part][offset:offset + len(data)] = data
    return made


def test_rows_of_every_step(tmp_path: Path) -> None:
    """Whatever rows are asked for, they are those of the whole: slices, turned and split axes, scales cut through."""
    rng = np.random.default_rng(5)
    codes, scales = late_weights.quantize(rng.standard_normal((384, 256)).astype(np.float32))
    _save({"a": to_bf16(rng.standard_normal((384, 256))), "b": codes, "b_scale_inv": scales}, tmp_path,
          {"U16": "BF16", "U8": "F8_E4M3"})
    checkpoint = Checkpoint(tmp_path)
    for name in ("a", "b"):
        start = {"op": "weight", "name": name, "shape": [384, 256], "args": []}
        whole = late_weights.Rows([start], checkpoint).get(0, 384).wide()
        for step, want in (({"op": "slice", "axis": 1, "start": 128, "stop": 256}, whole[:, 128:]),
                           ({"op": "slice", "axis": 1, "start": 32, "stop": 256}, whole[:, 32:]),
                           ({"op": "slice", "axis": 0, "start": 100, "stop": 300}, whole[100:300]),
                           ({"op": "transpose", "a": 0, "b": 1}, whole.T),
                           ({"op": "take_rows", "runs": [[200, 30], [0, 128], [129, 3]]},
                            np.concatenate([whole[200:230], whole[:128], whole[129:132]])),
                           ({"op": "reshape", "shape": [3, 128, 256]}, whole.reshape(3, 128, 256)),
                           ({"op": "reshape", "shape": [768, 128]}, whole.reshape(768, 128))):
            rows = late_weights.Rows([start, {**step, "args": [0]}], checkpoint)
            assert rows.shapes[-1] == want.shape
            for first, last in ((0, len(want)), (1, 2), (0, 128), (len(want) // 2, len(want))):
                last = min(last, len(want))
                np.testing.assert_array_equal(rows.get(first, last).wide(), want[first:last])


def test_names_of_experts() -> None:
    assert merged_names("model.layers.3.mlp.experts.down_proj") == ["model.layers.3.mlp.experts.*.down_proj.weight"]
    assert merged_names("model.layers.3.mlp.gate.weight") == []


@pytest.mark.parametrize("layout", ["matrix", "vector", "channels"])
@pytest.mark.parametrize("encoding", FORMATS, ids=lambda e: e.format)
def test_sizes_without_packing(layout: str, encoding: Encoding) -> None:
    shape = (3, 130, 40) if layout == "matrix" else (24, 4)
    made = pack(layout, encoding, np.ones(shape, np.float32))
    assert {part: blob.nbytes for part, blob in made.items()} == {p: n for p, (_, n) in
                                                                  sizes(layout, encoding, shape).items()}


def test_both_sides_quantise_alike() -> None:
    rng = np.random.default_rng(2)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(fp8.VALUES, every)
    for spread in (0, 6):  # the second reaches the subnormals
        w = rng.standard_normal((130, 200)) * 10.0 ** -rng.integers(0, spread + 1, (130, 200))
        w = w.astype(np.float32)
        for mine, theirs in zip(fp8.quantize(torch.from_numpy(w)), late_weights.quantize(w), strict=True):
            assert np.array_equal(mine, theirs)
        for mine, theirs in zip(int4.quantize(torch.from_numpy(w)), late_int4.quantize(w), strict=True):
            assert np.array_equal(mine, theirs)
        four = late_fp4.quantize(w, fp8.VALUES)
        for mine, theirs in zip(fp4.quantize(torch.from_numpy(w)), four, strict=True):
            assert np.array_equal(mine.reshape(-1), theirs.reshape(-1))
