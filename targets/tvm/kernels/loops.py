"""Loops that several families share: rows of an operand, sweeps over a row, reductions of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tvm.tirx.script.builder import ir as T

from qcn_compile.targets.tvm.kernels.core import Array, Arrays, Expr, f32, let, local, loop, parallel
from qcn_compile.targets.tvm.kernels.math import total

COUNTS = {"T": 0, "S": 1, "R": 2, "width": 3}


def count(a: Arrays, rows: str, times: int = 1) -> Expr:
    """Number of rows: a whole number, or `times` a symbol read from `counts`."""
    if rows not in COUNTS:
        return T.int32(int(rows) * times)
    value = let("rows", a.counts[COUNTS[rows]])
    return value * times if times != 1 else value


@contextmanager
def each(name: str, stop: Expr, threads: bool) -> Iterator[Expr]:
    """A loop, split over the threads or not."""
    with parallel(name, stop) if threads else loop(name, stop) as index:
        yield index


def row_start(row: Expr, width: int, heads: int, stride: int) -> Expr:
    """Offset of row `row` of [rows, heads, width] flattened over heads; `stride` between outer rows, 0 when dense."""
    if stride in (0, heads * width):
        return row * width
    if heads == 1:
        return row * stride
    return T.floordiv(row, heads) * stride + T.floormod(row, heads) * width


def sweep(width: int, lanes: int, body: Callable[[Expr, int], None]) -> None:
    """body(index, lanes) over 0..width: vectors first, then the rest one by one."""
    if width >= lanes:
        with loop("i", width // lanes) as i:
            body(i * lanes, lanes)
    if width % lanes and lanes > 1:
        with loop("i", width % lanes) as i:
            body(i + width // lanes * lanes, 1)
    elif width < lanes == 1:
        body(0, 1)


def unrolled(count_: int, times: int, body: Callable[[Expr], None]) -> None:
    """body(index) over 0..count_, `times` copies in the loop."""
    if count_ >= times:
        with loop("i", count_ // times) as i:
            for u in range(times):
                body(i * times + u)
    for u in range(count_ % times):
        body(T.int32(count_ // times * times + u))


def reduce_row(name: str, width: int, lanes: int, term: Callable[[Expr, int], Expr], chains: int = 4) -> Expr:
    """Sum of term(index, lanes) over 0..width, in an order that depends on width and lanes alone."""
    acc = local(name, "float32", chains * lanes)
    acc[0, chains * lanes] = f32(0.0, chains * lanes)
    step = chains * lanes
    if width >= step:
        with loop("i", width // step) as i:
            for c in range(chains):
                acc[c * lanes, lanes] = acc[c * lanes, lanes] + term(i * step + c * lanes, lanes)
    done = width // step * step
    for c in range((width - done) // lanes):
        acc[c * lanes, lanes] = acc[c * lanes, lanes] + term(done + c * lanes, lanes)
    done = width // lanes * lanes
    if width > done:
        with loop("i", width - done) as i:
            acc[0] = acc[0] + term(i + done, 1)
    for c in range(1, chains):
        acc[0, lanes] = acc[0, lanes] + acc[c * lanes, lanes]
    return let(name + "_sum", total(acc[0, lanes]))


def copy_row(source: Array, start: Expr, into: Array, at: Expr, width: int, lanes: int) -> None:
    """into[at : at + width] = source[start : start + width]."""
    def body(i: Expr, n: int) -> None:
        into[at + i, n] = source[start + i, n]

    sweep(width, lanes, body)
