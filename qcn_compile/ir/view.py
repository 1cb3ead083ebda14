"""A graph as a networkx digraph, for graph questions: layering, critical path, reachability. Needs no torch."""

from __future__ import annotations

from typing import Any

import networkx

from qcn_compile.ir.graph import Graph, Op
from qcn_compile.ir.types import Sym, TensorType


def digraph(graph: Graph) -> Any:
    """Nodes are indices of ops (attribute `op`), edges lead from producer to reader (attribute `value`, its name).

    An op that reads a cache follows the op that wrote it before: such edges carry `state` instead.
    """
    view = networkx.DiGraph()
    index = {op: i for i, op in enumerate(graph.ops)}
    last: dict[str, int] = {}
    for op, i in index.items():
        view.add_node(i, op=op)
        for value in op.inputs:
            if value.op is not None:
                view.add_edge(index[value.op], i, value=value.name)
        for name in _states(op):
            if name in last:
                view.add_edge(last[name], i, state=name)
            last[name] = i
    return view


def _states(op: Op) -> list[str]:
    from qcn_compile.ir.types import StateRef

    return [value.name for value in op.attrs.values() if isinstance(value, StateRef)]


def is_static(op: Op) -> bool:
    """Whether the results have no symbolic size: weights and what is made from them."""
    return not any(isinstance(d, Sym) for v in op.results if isinstance(v.type, TensorType) for d in v.type.shape)


def bytes_of(op: Op, sizes: dict[str, int]) -> int:
    """Bytes read and written by an op, every operand once."""
    return sum(v.type.bytes(sizes) for v in (*op.inputs, *op.results) if isinstance(v.type, TensorType))


def layers(view: Any) -> dict[int, int]:
    """For each node, the number of edges on the longest way to it."""
    depth: dict[int, int] = {}
    for node in networkx.topological_sort(view):
        depth[node] = max((depth[p] + 1 for p in view.predecessors(node)), default=0)
    return depth


def critical_path(view: Any, cost: dict[int, float]) -> list[int]:
    """The nodes of the chain with the greatest total cost, in order."""
    best: dict[int, tuple[float, int | None]] = {}
    for node in networkx.topological_sort(view):
        way = max(((best[p][0], p) for p in view.predecessors(node)), default=(0.0, None))
        best[node] = (way[0] + cost.get(node, 0.0), way[1])
    at = max(best, key=lambda n: best[n][0], default=None)
    path: list[int] = []
    while at is not None:
        path.append(at)
        at = best[at][1]
    return path[::-1]
