"""fold-layout: the channel shuffling after a projection becomes an order of the projection's weight rows.

A checkpoint interleaves channels (q, k, v and z of a key head side by side). The model untangles them with views. These
are folded into the weight: each thing that leaves the shuffle is then one contiguous slice of the projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcn_compile.ir.graph import Attr, Graph, Op, Value
from qcn_compile.ir.rewrite import Fired, Rewriter
from qcn_compile.ir.types import Dim, Sym, T
from qcn_compile.passes.base import Pass, PassContext, register_pass

Channels = dict[Value, np.ndarray]


@register_pass
@dataclass(frozen=True)
class FoldLayout(Pass):
    """linear(x, w) -> views => slices of linear(x, take_rows(w, order))."""

    name: ClassVar[str] = "fold-layout"
    after: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def run(self, graph: Graph, context: PassContext) -> Graph:
        rewriter = Rewriter(graph)
        for op in list(graph.ops):
            if op.name == "linear" and len(op.inputs) == 2:
                context.note(self.name, _fold(rewriter, op))
        return rewriter.finish()


def _fold(rewriter: Rewriter, linear: Op) -> list[Fired]:
    where, name = str(linear.loc), linear.result.name
    channels, shuffles = follow(rewriter, linear)
    if not shuffles:
        return []
    exits = [v for v in channels if _leaves(rewriter, v, channels)]
    order = np.concatenate([channels[v].reshape(-1) for v in exits]) if exits else np.zeros(0, int)
    if len(np.unique(order)) != len(order):
        return [Fired("fold views", where, name, "two readers take the same channels in different ways")]
    x, w = linear.inputs
    weight = _reorder(rewriter, w, order, linear)
    fresh = rewriter.make("linear", [x, weight], {}, linear.loc, name).result
    start = 0
    for value in exits:
        width = channels[value].size
        rewriter.replace(value, _part(rewriter, fresh, start, width, value, linear))
        start += width
    return [Fired("fold views", where, name)]


def follow(rewriter: Rewriter, linear: Op) -> tuple[Channels, bool]:
    """Which channels every value of the view-only region below a projection holds, and whether any are shuffled."""
    root = linear.result
    channels: Channels = {root: np.arange(int(root.tensor.shape[-1]))}  # type: ignore[arg-type]
    shuffles, work = False, [root]
    while work:
        for user in sorted(rewriter.users.get(work.pop(0), []), key=lambda o: rewriter.place[o]):
            if user.result in channels or len(user.results) != 1 or any(v not in channels for v in user.inputs):
                continue
            picture = _view(user, channels)
            if picture is not None:
                channels[user.result] = picture
                shuffles |= user.name in ("slice", "concat")
                work.append(user.result)
    ordered = sorted(channels, key=lambda v: rewriter.place[v.op] if v.op else (-1.0, 0))
    return {v: channels[v] for v in ordered}, shuffles


def _static_tail(shape: tuple[Dim, ...]) -> bool:
    return shape[0] == T and not any(isinstance(d, Sym) for d in shape[1:])


def _view(op: Op, channels: Channels) -> np.ndarray | None:
    """The channels of a view's result, or None when the op is no view of channels alone."""
    if op.name not in ("reshape", "slice", "concat") or not _static_tail(op.result.tensor.shape):
        return None
    parts = [channels[v] for v in op.inputs]
    if op.name == "reshape":
        return parts[0].reshape(op.result.tensor.shape[1:])  # type: ignore[arg-type]
    axis = int(op.attrs["axis"]) - 1  # type: ignore[arg-type]
    if axis < 0:
        return None
    if op.name == "concat":
        return np.concatenate(parts, axis)
    return np.take(parts[0], range(int(op.attrs["start"]), int(op.attrs["stop"])), axis)  # type: ignore[arg-type]


def _leaves(rewriter: Rewriter, value: Value, channels: Channels) -> bool:
    """Whether anything outside the region reads the value."""
    outside = any(r not in channels for u in rewriter.users.get(value, []) for r in u.results)
    return outside or value in rewriter.graph.outputs


def runs_of(order: np.ndarray) -> tuple[tuple[int, int], ...]:
    """A row order as (start, count) runs of consecutive rows."""
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    return tuple((int(run[0]), len(run)) for run in np.split(order, breaks))


def _reorder(rewriter: Rewriter, w: Value, order: np.ndarray, linear: Op) -> Value:
    runs = runs_of(order)
    if runs == ((0, int(w.tensor.shape[0])),):  # type: ignore[arg-type]
        return w
    return rewriter.make("take_rows", [w], {"runs": runs}, linear.loc, w.name).result


def _part(rewriter: Rewriter, source: Value, start: int, width: int, like: Value, linear: Op) -> Value:
    part = source
    if width != source.tensor.shape[1]:
        attrs: dict[str, Attr] = {"axis": 1, "start": start, "stop": start + width}
        part = rewriter.make("slice", [source], attrs, linear.loc, like.name).result
    if part.tensor.shape != like.tensor.shape:
        part = rewriter.make("reshape", [part], {"shape": like.tensor.shape}, linear.loc, like.name).result  # type: ignore
    return part
