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


def norms(ranks: int, width: int, codes: bool) -> None:
    """The sum with its norm, and alone in the same kernel, against the table's row."""
    from qcn_compile.targets.triton.exchange import all_reduce_norm

    capacity, eps = 3, 1e-6
    weight = torch.rand(width) + 0.5
    for normed in (True, False):
        kernel = lowered("all_reduce_norm" if normed else "all_reduce", ranks, width, capacity, fused=True, codes=codes)
        function, params = FAMILIES["all_reduce_norm"].load("all_reduce_norm"), constants(kernel[0].kernel)
        areas = [torch.zeros(4 * params["SLOTS"] + 8 * ranks * params["SLOTS"] * width, dtype=torch.uint8)
                 for _ in range(ranks)]
        peers = [torch.tensor([rank, *(area.data_ptr() for area in areas)]) for rank in range(ranks)]
        for turn, rows in enumerate((2, 3, 1)):
            counts, x = torch.tensor([rows, 1, 1, 1], dtype=torch.int32), torch.randn(ranks, capacity, width).bfloat16()
            made = [(torch.full((capacity, width), float("nan")).bfloat16(),
                     torch.full((capacity, width), float("nan")).bfloat16(),
                     torch.zeros(capacity, width, dtype=torch.float8_e4m3fn), torch.zeros(capacity, -(-width // 128)))
                    for _ in range(ranks)]
            for phase in (1, 2):
                for rank, (y, n, q, qs) in enumerate(made):
                    function[capacity, 1, 1](x[rank], y, peers[rank], weight if normed else None,
                                             n if normed else None, q if normed and codes else None,
                                             qs if normed and codes else None, counts, **{**params, "PHASES": phase},
                                             PDL=False)
            want = all_reduce_norm(list(x), weight, ranks=ranks, eps=eps, codes=codes)[0]
            for y, n, q, qs in made:
                assert torch.equal(y[:rows], want[0][:rows]) and y[rows:].isnan().all(), (ranks, turn)
                assert n[rows:].isnan().all()
                if not normed:
                    continue
                torch.testing.assert_close(n[:rows].float(), want[1][:rows].float(), rtol=1e-2, atol=1e-6)
                if codes:
                    wide = q.float() * qs.repeat_interleave(128, -1)
                    error = (wide[:rows] - want[1][:rows].float()).norm() / want[1][:rows].float().norm()
                    assert error < 0.04 and (qs[:rows] / want[3][:rows] - 1).abs().max() < 1e-2


def columns(ranks: int, width: int, capacity: int) -> None:
    kernel = lowered("all_gather", ranks, width, capacity)[1].kernel
    parts = torch.randn(ranks, capacity, width).bfloat16()
    y = torch.full((capacity, ranks * width), float("nan")).bfloat16()
    counts = torch.tensor([1, 1, capacity - 1, 1], dtype=torch.int32)
    function = FAMILIES["interleave"].load("interleave")
    function[capacity, ranks, 1](parts, y, counts, **constants(kernel), PDL=False)
    assert torch.equal(y[:-1], torch.cat(list(parts), 1)[:-1]) and y[-1].isnan().all()


def lowered(name: str, ranks: int, width: int, capacity: int, fused: bool = False, codes: bool = False) -> list:
    from qcn_compile.ir import ops as _ops  # noqa: F401  (fills the op table)
    from qcn_compile.ir.graph import Op, Value
    from qcn_compile.ir.types import parse_type

    x = Value("x", parse_type(f"bf16[{'R' if name == 'all_gather' else 'T'},{width}]"))
    operands, attrs = [x], {"ranks": ranks}
    if name == "all_reduce_norm":
        operands.append(Value("w", parse_type(f"f32[{width}]")))
        attrs |= {"eps": 1e-6, "codes": codes}
    op = Op(name, operands, [], attrs)
    result = parse_type(f"bf16[T,{width}]")
    return GpuTarget("h100").lower(op, [Operand(v.tensor, width) for v in operands], [result] * 4,
                                   Bucket("b", capacity, capacity, capacity, fused))


if __name__ == "__main__":
    repair()
    for count in (2, 3):
        sums(count, 34, 3)
    columns(2, 37, 4)
    norms(2, 34, False)
    norms(3, 256, True)
    print("equal")
