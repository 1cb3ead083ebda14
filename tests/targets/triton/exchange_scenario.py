"""Ranks that take turns in one process: all push, then all pull. `TRITON_INTERPRET=1 exchange_scenario.py`."""

from __future__ import annotations

import torch
from interpreter import repair

from qcn_compile.targets.base import Bucket, Operand
from qcn_compile.targets.triton.families import FAMILIES, constants
from qcn_compile.targets.triton.target import GpuTarget


def sums(ranks: int, width: int, capacity: int) -> None:
    """Four exchanges of a changing number of rows; each rank's memory is only reached through `peers`."""
    kernel = lowered("all_reduce", ranks, width, capacity)[0].kernel
    function, params = FAMILIES["all_reduce"].load("all_reduce"), constants(kernel)
    slots = params["SLOTS"]
    areas = [torch.zeros(4 * slots + 8 * ranks * slots * width, dtype=torch.uint8) for _ in range(ranks)]
    peers = [torch.tensor([rank, *(area.data_ptr() for area in areas)]) for rank in range(ranks)]
    for turn, rows in enumerate((1, capacity, capacity - 1, 2)):
        counts = torch.tensor([rows, 1, 1, 1], dtype=torch.int32)
        torch.manual_seed(turn)
        x = [torch.randn(capacity, width).bfloat16() * 10.0**rank for rank in range(ranks)]
        y = [torch.full((capacity, width), float("nan")).bfloat16() for _ in range(ranks)]
        for phase in (1, 2):
            for rank in range(ranks):
                function[capacity, 1, 1](x[rank], y[rank], peers[rank], counts, **{**params, "PHASES": phase},
                                         PDL=False)
        want = sum(part.float() for part in x).bfloat16()
        for found in y:
            assert torch.equal(found[:rows], want[:rows]) and found[rows:].isnan().all(), (ranks, turn)


def columns(ranks: int, width: int, capacity: int) -> None:
    kernel = lowered("all_gather", ranks, width, capacity)[1].kernel
    parts = torch.randn(ranks, capacity, width).bfloat16()
    y = torch.full((capacity, ranks * width), float("nan")).bfloat16()
    counts = torch.tensor([1, 1, capacity - 1, 1], dtype=torch.int32)
    function = FAMILIES["interleave"].load("interleave")
    function[capacity, ranks, 1](parts, y, counts, **constants(kernel), PDL=False)
    assert torch.equal(y[:-1], torch.cat(list(parts), 1)[:-1]) and y[-1].isnan().all()


def lowered(name: str, ranks: int, width: int, capacity: int) -> list:
    from qcn_compile.ir import ops as _ops  # noqa: F401  (fills the op table)
    from qcn_compile.ir.graph import Op, Value
    from qcn_compile.ir.types import parse_type

    x = Value("x", parse_type(f"bf16[{'T' if name == 'all_reduce' else 'R'},{width}]"))
    op = Op(name, [x], [], {"ranks": ranks})
    result = parse_type(f"bf16[T,{width}]")
    return GpuTarget("h100").lower(op, [Operand(x.tensor, width)], [result], Bucket("b", capacity, capacity, capacity))


if __name__ == "__main__":
    repair()
    for count in (2, 3):
        sums(count, 34, 3)
    columns(2, 37, 4)
    print("equal")
