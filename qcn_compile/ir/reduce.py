"""Shrink a graph that makes something fail, as long as the same failure remains."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qcn_compile.ir.graph import Graph, Op, Value
from qcn_compile.ir.types import StateRef

Fails = Callable[[Graph], str | None]


def reduce_graph(graph: Graph, fails: Fails, report: Callable[[int], None] | None = None) -> Graph:
    """The smallest graph found for which `fails` returns what it returns for `graph` (None: no failure).

    A candidate is a prefix of the ops, or the graph without some outputs, or with some ops taken out: their results
    become inputs. Every candidate is tidied: ops that nothing reads, unused inputs and states go.
    """
    want = fails(graph.clone())
    if want is None:
        raise ValueError("the graph does not fail")

    def still(candidate: Graph) -> bool:
        return fails(candidate.clone()) == want

    best, again = _shortest_prefix(graph, still), True
    while again:
        again = False
        for candidate in _smaller(best):
            if len(candidate.ops) + len(candidate.outputs) < len(best.ops) + len(best.outputs) and still(candidate):
                best, again = candidate, True
                if report is not None:
                    report(len(best.ops))
                break
    return best


def _shortest_prefix(graph: Graph, still: Callable[[Graph], bool]) -> Graph:
    """By bisection, the ops up to the one where the failure begins."""
    low, high, best = 0, len(graph.ops), graph
    while low < high:
        middle = (low + high) // 2
        candidate = prefix(graph, middle)
        if candidate.outputs and still(candidate):
            high, best = middle, candidate
        else:
            low = middle + 1
    return best


def prefix(graph: Graph, length: int) -> Graph:
    """The first ops; what later ops or the caller read becomes an output."""
    copy = graph.clone()
    later = {v for op in copy.ops[length:] for v in op.inputs} | set(copy.outputs)
    copy.ops = copy.ops[:length]
    copy.outputs = [v for op in copy.ops for v in op.results if v in later]
    return tidy(copy)


def _smaller(graph: Graph) -> Iterator[Graph]:
    """Candidates, the boldest first."""
    for value in reversed(graph.outputs):
        if len(graph.outputs) > 1:
            yield _with_outputs(graph, [value.name])
    for value in graph.outputs:
        if len(graph.outputs) > 1:
            yield _with_outputs(graph, [v.name for v in graph.outputs if v is not value])
    size = max(1, len(graph.ops) // 2)
    while True:
        for start in range(0, len(graph.ops), size):
            yield without(graph, range(start, min(start + size, len(graph.ops))))
        if size == 1:
            return
        size //= 2


def _with_outputs(graph: Graph, names: list[str]) -> Graph:
    copy = graph.clone()
    copy.outputs = [v for v in copy.outputs if v.name in names]
    return tidy(copy)


def without(graph: Graph, places: range) -> Graph:
    """The graph without some ops: results that are still read become inputs, outputs among them go."""
    copy = graph.clone()
    gone = set(copy.ops[places.start:places.stop])
    lost = {v for op in gone for v in op.results}
    copy.ops = [op for op in copy.ops if op not in gone]
    copy.outputs = [v for v in copy.outputs if v not in lost]
    if not copy.outputs:
        copy.outputs = [v for op in copy.ops[-1:] for v in op.results]
    read = {v for op in copy.ops for v in op.inputs}
    for op in (o for o in graph.ops if o.results):
        names = {v.name for v in op.results}
        for old in [v for v in lost if v in read and v.name in names]:
            fresh = Value(old.name, old.type)
            copy.replace_uses(old, fresh)
            copy.inputs.append(fresh)
    return tidy(copy)


def tidy(graph: Graph) -> Graph:
    """In place: ops that nothing reads are dropped, effects or not, then unused inputs and states."""
    live, kept = set(graph.outputs), []
    for op in reversed(graph.ops):
        if any(v in live for v in op.results):
            kept.append(op)
            live.update(op.inputs)
    graph.ops = kept[::-1]
    graph.inputs = [v for v in graph.inputs if v in live]
    named = {ref.name for op in graph.ops for ref in _states(op)}
    graph.states = {name: state for name, state in graph.states.items() if name in named}
    return graph


def _states(op: Op) -> Iterator[StateRef]:
    return (value for value in op.attrs.values() if isinstance(value, StateRef))
