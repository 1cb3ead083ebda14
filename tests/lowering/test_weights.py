"""Blobs get readable, unique names; files are laid out before a weight is read, and are valid, aligned safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from qcn_compile.errors import LoweringError
from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.graph import Value
from qcn_compile.ir.text import parse_graph
from qcn_compile.lowering import weights as module
from qcn_compile.lowering.convert import convert
from qcn_compile.lowering.rows import Rows, Tensors, evaluate
from qcn_compile.lowering.weights import BlobKey, cuts, name_blobs, pack_piece, packed, plan_files
from qcn_compile.targets.base import Target
from qcn_compile.targets.cpu import CpuTarget
from qcn_compile.targets.triton.target import GpuTarget

GRAPH = """graph @g(%x: f32[T,4]) {
  %a : f32[2,4] = weight() {name="model.a", dtype=f32, shape=(2,4)}
  %b : f32[2,4] = weight() {name="model.b", dtype=f32, shape=(2,4)}
  %c : f32[4,4] = concat(%b, %a) {axis=0}
  %d : f32[4,4] = take_rows(%c) {runs=((3,1),(0,2),(2,1))}
  %y : f32[T,4] = linear(%x, %d)
  return %y
}
"""


def weight(name: str, *shape: int) -> Value:
    shape_text = "(" + ",".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
    text = f"""graph @w(%x: f32[T,4]) {{
  %a : f32[{",".join(map(str, shape))}] = weight() {{name="{name}", dtype=f32, shape={shape_text}}}
  return %x
}}
"""
    return parse_graph(text).ops[0].result


def model(target: Target) -> tuple[dict[BlobKey, str], Tensors]:
    """Weights of every layout of a target, ragged sizes, in several formats."""
    rng = np.random.default_rng(0)
    shapes = {"m": (300, 200), "e": (3, 44, 130), "v": (70,), "c": (24, 4)}
    table = {n: torch.from_numpy(rng.standard_normal(s).astype(np.float32)).bfloat16() for n, s in shapes.items()}
    values = {n: weight(n, *s) for n, s in shapes.items()}
    if target.kind == "gpu":
        rows = [("m", "matrix", "bf16"), ("m", "matrix", "fp8"), ("e", "matrix", "bf16"), ("e", "matrix", "fp8")]
    else:
        rows = [(n, layout, f) for f in ("f32", "bf16", "int8", "int4")
                for n, layout in (("m", "tiles"), ("e", "tiles"), ("e", "gate_up"))] + [("m", "rows", "bf16")]
    rows += [("v", "vector", "f32"), ("c", "channels", "f32")]
    keys = [BlobKey(values[n], layout, Encoding(f, 128 if f == "fp8" else 32)) for n, layout, f in rows]
    return name_blobs(keys), Tensors(table)


def test_graphs_share_a_weight_of_the_checkpoint() -> None:
    """A draft head's own graph reads the model's table of tokens: one blob, written once, in each of two formats."""
    rows = [BlobKey(weight("embed", 300, 200), "matrix", Encoding(f)) for f in ("bf16", "fp8") for _ in range(2)]
    names = name_blobs(rows)
    assert len(set(names.values())) == 2 and names[rows[0]] == names[rows[1]] != names[rows[2]]
    source = Tensors({"embed": torch.ones(300, 200).bfloat16()})
    parts = [name for name, _ in packed(names, source, GpuTarget("h100"))]
    assert len(parts) == len(set(parts)) == 3 and len(plan_files(names, GpuTarget("h100"))) == 1


TARGETS = [CpuTarget("x86-64-v3"), GpuTarget("h100")]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.kind)
def test_pieces_one_after_the_other_are_the_whole(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 1 << 13)
    names, source = model(target)
    blobs = dict(packed(names, source, target))
    for key, name in names.items():
        whole = target.pack(key.layout, key.encoding, evaluate(key.value, source.get))
        pieces = cuts(key, target)
        assert len(pieces) > 1 or key.layout in ("vector", "channels")
        for part, data in whole.items():
            assert blobs[f"{name}.{part}"].tobytes()[:data.nbytes] == data.tobytes(), (name, part)
            assert blobs[f"{name}.{part}"].nbytes % 64 == 0


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.kind)
def test_files_hold_every_blob_and_are_aligned(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 100_000)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 1 << 13)
    names, source = model(target)
    files = plan_files(names, target)
    assert len(files) > 2
    steps: list[tuple[int, int]] = []
    written = convert(files, source, target, tmp_path, lambda done, total: steps.append((done, total)))
    assert written.files == tuple(f.name for f in files)
    loaded = {k: v for f in written.files for k, v in load_file(tmp_path / f).items()}
    want = dict(packed(names, source, target))
    assert set(loaded) == set(want)
    assert all(loaded[name].tobytes() == want[name].tobytes() for name in want)
    for file in files:
        assert (tmp_path / file.name).stat().st_size == file.nbytes and len(file.header) % 64 == 0
    assert steps[0][0] == 0 and [d for d, _ in steps] == sorted(d for d, _ in steps)


def test_a_target_that_contradicts_itself_is_named() -> None:
    class Odd(GpuTarget):
        def packed_sizes(self, layout: str, encoding: Encoding, shape: tuple[int, ...]) -> dict[str, tuple[str, int]]:
            return {"w": ("bf16", 7 * shape[0])}

    key = BlobKey(weight("m", 300, 200), "matrix", Encoding("bf16"))
    with pytest.raises(LoweringError, match=r"a: target h100 packs rows \(0, 128\) of \(300, 200\) as matrix"):
        pack_piece(key, Rows(key.value, Tensors({"m": torch.zeros(300, 200)})), (0, 128), Odd("h100"))


def test_static_values_are_evaluated() -> None:
    graph = parse_graph(GRAPH)
    table = {"model.a": torch.arange(8.0).reshape(2, 4), "model.b": -torch.ones(2, 4)}
    value = graph.ops[-1].operands[1]
    assert value is not None
    got = evaluate(value, table.__getitem__)
    assert got.tolist() == [[4, 5, 6, 7], [-1] * 4, [-1] * 4, [0, 1, 2, 3]]


def test_names_are_readable_and_unique() -> None:
    graph = parse_graph(GRAPH)
    a, d = graph.ops[0].results[0], graph.ops[3].results[0]
    keys = [BlobKey(a, "tiles", Encoding()), BlobKey(d, "tiles", Encoding("int4")),
            BlobKey(d, "rows", Encoding("int4")), BlobKey(graph.ops[2].results[0], "tiles", Encoding("int4"))]
    names = list(name_blobs(keys).values())
    assert names == ["model.a:tiles.f32", "model.b+1:tiles.int4", "model.b+1:rows.int4", "model.b+1:tiles.int4.2"]
