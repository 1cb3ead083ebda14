"""The memory plan: buffers that are alive together never share a byte, and the total is close to what must be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qcn_compile.artifact import ALIGNMENT
from qcn_compile.ir.graph import Value
from qcn_compile.ir.types import DType, T, TensorType
from qcn_compile.lowering.memory import Buffer, assign, lower_bound

lives = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 30), st.integers(0, 8)), max_size=40)


def buffers(rows: list[tuple[int, int, int]]) -> list[Buffer]:
    kind = TensorType(DType.f32, (T,))
    return [Buffer(Value(str(i), kind), size, first, first + more) for i, (size, first, more) in enumerate(rows)]


@given(lives)
def test_no_two_living_buffers_overlap(rows: list[tuple[int, int, int]]) -> None:
    plan = buffers(rows)
    total = assign(plan)
    for i, a in enumerate(plan):
        assert a.offset % ALIGNMENT == 0
        assert a.offset >= 0 and a.offset + a.bytes <= total
        for b in plan[i + 1:]:
            if a.overlaps(b):
                assert a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
    assert total >= lower_bound(plan)


def test_a_chain_needs_two_buffers() -> None:
    """x0 -> x1 -> x2 ...: each step reads one buffer and writes another, so two are enough for any length."""
    plan = buffers([(640, i, 1) for i in range(20)])
    assert assign(plan) == lower_bound(plan) == 1280
