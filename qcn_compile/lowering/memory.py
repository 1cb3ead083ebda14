"""plan-memory: every temporary buffer gets a fixed offset; buffers that are never alive together share bytes."""

from __future__ import annotations

from dataclasses import dataclass

from qcn_compile.artifact import ALIGNMENT
from qcn_compile.ir.graph import Value
from qcn_compile.lowering.schedule import Schedule

Key = Value | tuple[int, str]


@dataclass
class Buffer:
    """A temporary: `bytes` alive from step `first` to step `last`, both included, at `offset`."""

    key: Key
    bytes: int
    first: int
    last: int
    offset: int = -1

    def overlaps(self, other: Buffer) -> bool:
        """Whether the two are alive at the same time."""
        return self.first <= other.last and other.first <= self.last


def liveness(schedule: Schedule) -> list[Buffer]:
    """All temporaries with their first write and last read, in order of first use."""
    table: dict[Key, Buffer] = {}
    sizes = schedule.bucket.sizes
    owned = {v for step in schedule.steps for v in step.op.results}

    def touch(key: Key, size: int, at: int) -> None:
        buffer = table.setdefault(key, Buffer(key, size, at, at))
        buffer.last = max(buffer.last, at)

    for at, step in enumerate(schedule.steps):
        for value in (*step.op.inputs, *step.op.results):
            view = schedule.views.get(value)
            if view is not None and view.base in owned:
                touch(view.base, view.base.tensor.bytes(sizes), at)
        for ref in step.call.args:
            if ref.kind == "scratch":
                touch((id(step.op), ref.name), ref.bytes, at)
    for value in schedule.graph.outputs:
        table[schedule.views[value].base].last = len(schedule.steps)
    return list(table.values())


def assign(buffers: list[Buffer]) -> int:
    """Offsets, largest buffers first, each at the lowest place that is free for its whole life; returns total bytes."""
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.bytes, b.first)):
        at = 0
        for other in sorted((p for p in placed if p.overlaps(buffer)), key=lambda p: p.offset):
            if at + buffer.bytes <= other.offset:
                break
            at = max(at, -(-(other.offset + other.bytes) // ALIGNMENT) * ALIGNMENT)
        buffer.offset = at
        placed.append(buffer)
    return max((b.offset + -(-b.bytes // ALIGNMENT) * ALIGNMENT for b in placed), default=0)


def lower_bound(buffers: list[Buffer]) -> int:
    """Most bytes alive at one step: no plan can be smaller."""
    steps = {b.first for b in buffers}
    return max((sum(b.bytes for b in buffers if b.first <= at <= b.last) for at in steps), default=0)


