"""Pieces of the importer on their own: views that cancel, shapes that are checked, long name lists."""

from __future__ import annotations

import pytest

from qcn_compile.errors import IRError
from qcn_compile.frontend.aten_rules import stripped
from qcn_compile.frontend.builder import Builder, drop_unused
from qcn_compile.frontend.names import collapse
from qcn_compile.ir.graph import Graph, Location, Value
from qcn_compile.ir.types import DType, Sym, T, TensorType
from qcn_compile.ir.verify import verify


@pytest.fixture
def x():
    return Value("x", TensorType(DType.f32, (T, 2, 8)))


@pytest.fixture
def build(x):
    return Builder(Graph("main", [x]))


def test_views_cancel(build, x):
    assert build.reshape(x, (T, 2, 8)) is x
    assert build.transpose(build.transpose(x, 0, 1), 1, 0) is x
    assert build.slice(x, 2, 0, 8) is x
    assert build.cast(x, DType.f32) is x
    assert build.reshape(build.reshape(x, (T, 16)), (T, 2, 8)) is x
    again = build.reshape(build.reshape(x, (T, 16)), (T, 4, 4))
    assert again.op is not None and again.op.operands == [x]


def test_reshape_checks_the_number_of_elements(build, x):
    with pytest.raises(IRError, match=r"f32\[T,2,8\] has another number of elements"):
        build.reshape(x, (T, 17))


def test_names_are_unique_and_carry_the_layer(build, x):
    build.at = Location("model.layers.3.mlp")
    names = [build.one("neg", [x]).name for _ in range(3)]
    assert names == ["L3.neg", "L3.neg_2", "L3.neg_3"]
    build.at = Location("model.norm")
    assert build.one("neg", [x]).name == "neg"


def test_unused_ops_are_dropped(build, x):
    kept = build.one("neg", [x])
    build.one("exp", [kept])
    build.graph.outputs = [kept]
    drop_unused(build.graph)
    assert [op.name for op in build.graph.ops] == ["neg"]
    verify(build.graph)


def test_leading_ones_are_dropped_from_what_carries_tokens():
    assert stripped((1, 1, T, 64)) == (T, 64)
    assert stripped((1, Sym("T", 4), 1)) == (Sym("T", 4), 1)
    assert stripped((1, 64)) == (1, 64)


@pytest.mark.parametrize(("names", "patterns"), [
    ([f"layers.{i}.experts.{j}.up" for i in range(3) for j in range(10)], ["layers.{0..2}.experts.{0..9}.up"]),
    (["a.0.w", "a.2.w", "b"], ["a.{0,2}.w", "b"]),
    (["a.1.x.7", "a.2.x.7", "a.2.x.8"], ["a.1.x.7", "a.2.x.{7..8}"]),
    (["conv1d.weight", "conv2d.weight"], ["conv1d.weight", "conv2d.weight"]),
])
def test_names_collapse(names, patterns):
    assert collapse(names) == patterns
