"""Sums of ranks together with the norm behind them: ops that only plans of few tokens for several GPUs have."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.ops.norm import rms_norm
from qcn_compile.ir.ops.parallel import all_reduce
from qcn_compile.ir.optable import op
from qcn_compile.ir.types import TensorType
from qcn_compile.targets.triton.narrow import codes_of, narrow

NORMS = ("rms_norm", "narrow_rms_norm")


def _types(x: TensorType, w: TensorType, *, codes: bool, **_: object) -> tuple[TensorType, ...]:
    return (x, x, *(codes_of(x) if codes else ()))


@op("all_reduce_norm", "x, w", ranks=int, eps=float, codes=bool, infer=_types, collective=True)
def all_reduce_norm(xs: list[Tensor], w: Tensor, *, ranks: int, eps: float, codes: bool) -> list[tuple[Tensor, ...]]:
    """(y, n), with `codes` (y, n, codes, scales): y the sum of x over ranks, n = rms_norm(y, w), its codes as those of
    narrow_rms_norm. x [T, W], w [W]."""
    y = all_reduce(xs, ranks=ranks)[0]
    n = rms_norm(y, w, eps=eps)
    return [(y, n, *(narrow(n) if codes else ()))] * ranks


def with_norms(ops: Sequence[Op], single: bool) -> list[Op]:
    """The ops of a plan (of a single token?) with every sum and the first norm that reads it as one op.

    A norm that moves into two products at once, as in plans of one token, stays there: alone, these are two launches.
    """
    readers: dict[Value, list[Op]] = {}
    for one in ops:
        for value in dict.fromkeys(one.inputs):
            readers.setdefault(value, []).append(one)
    swapped: dict[Op, Op] = {}
    gone: set[Op] = set()
    for total in ops:
        norm = next((r for r in readers.get(total.results[0], []) if r.name in NORMS), None)
        if total.name != "all_reduce" or norm is None or (single and _pair(norm, readers)):
            continue
        fresh = Op("all_reduce_norm", [total.operands[0], norm.operands[1]], [*total.results, *norm.results],
                   {"ranks": total.attrs["ranks"], "eps": norm.attrs["eps"], "codes": len(norm.results) > 1}, total.loc)
        swapped[total] = fresh
        gone.add(norm)
    return [swapped.get(one, one) for one in ops if one not in gone]


def _pair(norm: Op, readers: dict[Value, list[Op]]) -> bool:
    """Whether two products and nothing else read the norm."""
    found = readers.get(norm.results[0], [])
    return len(found) == 2 and all(r.name == "linear" for r in found)
