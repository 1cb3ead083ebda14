"""Packed weight files are valid safetensors whose data is aligned; blobs get readable, unique names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.text import parse_graph
from qcn_compile.lowering import weights as module
from qcn_compile.lowering.weights import BlobKey, evaluate, name_blobs, write_safetensors, write_shards

GRAPH = """graph @g(%x: f32[T,4]) {
  %a : f32[2,4] = weight() {name="model.a", dtype=f32, shape=(2,4)}
  %b : f32[2,4] = weight() {name="model.b", dtype=f32, shape=(2,4)}
  %c : f32[4,4] = concat(%b, %a) {axis=0}
  %d : f32[4,4] = take_rows(%c) {runs=((3,1),(0,2),(2,1))}
  %y : f32[T,4] = linear(%x, %d)
  return %y
}
"""


def blob(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, n * 64, dtype=np.uint8)


def test_file_is_safetensors_and_aligned(tmp_path: Path) -> None:
    blobs = [("one", blob(3)), ("two: odd name", blob(1, 1)), ("three", blob(7, 2))]
    write_safetensors(tmp_path / "w.safetensors", blobs)
    loaded = load_file(tmp_path / "w.safetensors")
    assert all(np.array_equal(loaded[name], data) for name, data in blobs)
    head = int.from_bytes((tmp_path / "w.safetensors").read_bytes()[:8], "little")
    assert (8 + head) % 64 == 0


def test_sizes_that_break_alignment_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="blob one has 10 bytes"):
        write_safetensors(tmp_path / "w.safetensors", [("one", np.zeros(10, np.uint8))])


def test_shards_split_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 256)
    blobs = [(f"w{i}", blob(i % 5 + 1, i)) for i in range(12)]
    files = write_shards(iter(blobs), tmp_path)
    assert len(files) > 3
    loaded = {k: v for f in files for k, v in load_file(tmp_path / f).items()}
    assert all(np.array_equal(loaded[name], data) for name, data in blobs)


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
