"""Static values computed by rows equal the whole ones; codes stay codes until a group of a scale is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcn_compile.ir.encoding import Coded, Encoding, quantize, wide
from qcn_compile.ir.pieces import cat, narrow, reshape
from qcn_compile.ir.text import parse_graph
from qcn_compile.lowering.rows import Rows, Tensors, evaluate

GRAPH = """graph @g(%x: f32[T,6]) {
  %a : f32[5,6] = weight() {name="a", dtype=f32, shape=(5,6)}
  %b : f32[3,6] = weight() {name="b", dtype=f32, shape=(3,6)}
  %e : f32[4,5,6] = weight() {name="e", dtype=f32, shape=(4,5,6)}
  %both : f32[8,6] = concat(%b, %a) {axis=0}
  %order : f32[8,6] = take_rows(%both) {runs=((3,3),(0,2),(6,2),(2,1))}
  %sliced : f32[4,6] = slice(%order) {axis=0, start=2, stop=6}
  %columns : f32[4,3] = slice(%sliced) {axis=1, start=1, stop=4}
  %wide : f32[4,6] = concat(%columns, %columns) {axis=1}
  %one : f32[1,5,6] = reshape(%a) {shape=(1,5,6)}
  %stack : f32[5,5,6] = concat(%e, %one) {axis=0}
  %plus : f32[4,6] = add_scalar(%wide) {value=1.0}
  %exp : f32[4,6] = exp(%plus)
  %turned : f32[6,4] = transpose(%exp) {a=0, b=1}
  %last : f32[12,4] = concat(%turned, %turned) {axis=0}
  %split : f32[24,2] = reshape(%last) {shape=(24,2)}
  return %x
}
"""


@pytest.mark.parametrize("name", ["a", "both", "order", "sliced", "columns", "wide", "stack", "exp", "turned", "last",
                                  "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_equal_the_whole(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = {"a": torch.randn(5, 6), "b": torch.randn(3, 6), "e": torch.randn(4, 5, 6)}
    stored = Tensors({key: tensor.to(dtype) for key, tensor in table.items()})
    value = next(op.result for op in parse_graph(GRAPH).ops if op.result.name == name)
    whole = evaluate(value, lambda key: stored.get(key).float())
    rows, count = Rows(value, stored), len(whole)
    for start in range(count):
        for stop in range(start + 1, count + 1):
            assert torch.equal(wide(rows.get(start, stop)), whole[start:stop]), (start, stop)


def test_only_what_is_needed_is_read() -> None:
    asked: list[tuple[str, int, int]] = []

    class Watched(Tensors):
        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            asked.append((name, start, stop))
            return super().rows(name, start, stop)

        def get(self, name: str) -> torch.Tensor:
            raise AssertionError(f"{name} was read whole")

    source = Watched({"a": torch.zeros(5, 6), "b": torch.zeros(3, 6), "e": torch.zeros(4, 5, 6)})
    values = {op.result.name: op.result for op in parse_graph(GRAPH).ops}
    Rows(values["stack"], source).get(2, 3)
    Rows(values["order"], source).get(1, 4)
    assert asked == [("e", 2, 3), ("a", 1, 3), ("b", 0, 1)]


def coded(format_: str, *shape: int) -> Coded:
    torch.manual_seed(1)
    encoding = Encoding(format_, 128 if format_ == "fp8" else 32)
    codes, scales = quantize(torch.randn(shape), encoding)
    assert scales is not None
    return Coded(torch.from_numpy(codes), torch.from_numpy(scales), encoding, shape[-1])


@pytest.mark.parametrize(("format_", "axis", "start", "stop", "kept"), [
    ("fp8", 0, 128, 300, True), ("fp8", 0, 128, 256, True), ("fp8", 0, 64, 256, False), ("fp8", 0, 0, 200, False),
    ("fp8", 1, 128, 200, True), ("fp8", 1, 100, 200, False),
    ("int4", 0, 3, 7, True), ("int4", 1, 32, 96, True), ("int4", 1, 64, 200, True), ("int4", 1, 16, 64, False),
])
def test_narrow(format_: str, axis: int, start: int, stop: int, kept: bool) -> None:
    x = coded(format_, 300, 200)
    part = narrow(x, axis, start, stop)
    assert isinstance(part, Coded) == kept
    assert torch.equal(wide(part), x.wide().narrow(axis, start, stop - start))


@pytest.mark.parametrize(("format_", "first", "axis", "kept"), [
    ("fp8", (128, 200), 0, True), ("fp8", (100, 200), 0, False), ("fp8", (128, 128), 1, True),
    ("int4", (7, 200), 0, True), ("int4", (128, 96), 1, True), ("int4", (128, 90), 1, False),
    ("int8", (7, 200), 0, True),
])
def test_cat(format_: str, first: tuple[int, int], axis: int, kept: bool) -> None:
    parts = [coded(format_, *first), coded(format_, 128, 200)]
    both = cat(parts, axis)
    assert isinstance(both, Coded) == kept
    assert torch.equal(wide(both), torch.cat([p.wide() for p in parts], axis))


def test_mixed_storage_becomes_f32() -> None:
    parts = [coded("fp8", 128, 200), torch.ones(2, 200, dtype=torch.bfloat16)]
    assert torch.equal(wide(cat(parts, 0)), torch.cat([wide(p) for p in parts]))
    x = coded("int4", 6, 40)
    stack = reshape(x, (2, 3, 40))
    assert isinstance(stack, Coded) is False or np.array_equal(wide(stack).numpy(), x.wide().reshape(2, 3, 40).numpy())
    assert torch.equal(wide(reshape(x, (1, 6, 40))), x.wide()[None])
    assert isinstance(reshape(x, (1, 6, 40)), Coded)
