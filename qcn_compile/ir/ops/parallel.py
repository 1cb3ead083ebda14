"""Rows for the graph of one rank of several: collectives, and the experts that a rank holds.

A collective's reference takes the operand of every rank, in order, and returns every rank's result;
`interpret.run_ranks` calls it when all ranks have come to it. The ranks of a sum or gather are those of one stage of a
pipeline; `send` and `recv` are between two ranks, counted over all stages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcn_compile.ir.optable import op, same
from qcn_compile.ir.types import DType, Sym, TensorType


@op("all_reduce", "x", ranks=int, infer=same(), collective=True)
def all_reduce(xs: list[Tensor], *, ranks: int) -> list[Tensor]:
    """y = x of rank 0 + x of rank 1 + ..., summed in fp32, the same on every rank. x [T, W]."""
    total = torch.stack([x.float() for x in xs]).sum(0).to(xs[0].dtype)
    return [total] * ranks


def _gathered(x: TensorType, *, ranks: int) -> TensorType:
    return TensorType(x.dtype, (*x.shape[:-1], int(x.shape[-1]) * ranks))  # type: ignore[arg-type]


@op("all_gather", "x", ranks=int, infer=_gathered, collective=True)
def all_gather(xs: list[Tensor], *, ranks: int) -> list[Tensor]:
    """The columns of rank 0, then those of rank 1, and so on, on every rank. x [T, W] -> [T, ranks*W]."""
    return [torch.cat(xs, -1)] * ranks


@op("send", "x", to=int, infer=same(), collective=True)
def send(xs: list[Tensor], *, to: int) -> list[Tensor]:
    """y = x, which rank `to` gets where it comes to `recv`. x [T, W] or [R, W]."""
    return xs


def _received(_: TensorType, *, rows: str, width: int, dtype: DType, **__: object) -> TensorType:
    return TensorType(dtype, (Sym(rows), width))


@op("recv", "after", source=int, rows=str, width=int, dtype=DType, infer=_received, collective=True)
def recv(xs: list[Tensor], *, source: int, rows: str, width: int, dtype: DType) -> list[Tensor]:
    """What rank `source` sends: y [rows, width], rows "T" or "R". `after` only says what must have come before."""
    return xs


def _local(ids: TensorType, weights: TensorType, **_: object) -> tuple[TensorType, TensorType]:
    return TensorType(DType.i32, ids.shape), TensorType(DType.f32, weights.shape)


@op("local_experts", "ids, weights", first=int, count=int, shared=int, group=int, groups=int, infer=_local)
def local_experts(ids: Tensor, weights: Tensor, *, first: int, count: int, shared: int, group: int,
                  groups: int) -> tuple[Tensor, Tensor]:
    """The routing of one of `groups` groups of ranks, which holds experts first..first+count-1 as 0..count-1.

    Expert `shared` (-1: there is none) is held by every group as number `count`; group t mod `groups` computes it for
    token t. A pair that another group computes keeps its place with weight 0 and the last expert held: reading that one
    costs little where it is read anyway. ids i32 [T, k], weights f32 [T, k] -> the same types.
    """
    token = torch.arange(ids.shape[0])[:, None]
    routed = (ids >= first) & (ids < first + count)
    common = (ids == shared) & (token % groups == group)
    last = count - 1 + int(shared >= 0)
    here = torch.where(routed, ids - first, torch.full_like(ids, last))
    return here.int(), torch.where(routed | common, weights, torch.zeros_like(weights))
