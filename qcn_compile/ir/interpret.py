"""The interpreter: runs a graph through the references of the op table. The golden model of every pass and kernel."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from qcn_compile.errors import IRError
from qcn_compile.ir import ops as _rows  # noqa: F401  (fills the table)
from qcn_compile.ir.batch import Batch
from qcn_compile.ir.graph import Graph, Op, Value
from qcn_compile.ir.optable import row
from qcn_compile.ir.text import format_op
from qcn_compile.ir.types import BatchType
from qcn_compile.ir.verify import plain_attrs

Weights = Callable[[str], Tensor]
Walk = Generator[tuple[Op, Any], Any, list[Any]]
"""Runs the graph of a rank: yields (op, operand) at a collective, is sent its result, returns the outputs."""


def run_op(op: Op, operands: list[Any], weights: Weights | None = None) -> list[Any]:
    """One op on real operands."""
    if op.name == "weight":
        if weights is None:
            raise IRError(f"no weight source for {format_op(op)}")
        return [weights(str(op.attrs["name"]))]
    try:
        out = row(op.name).reference(*operands, **plain_attrs(op.attrs))
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise IRError(f"{error}\n  while interpreting {format_op(op)}") from error
    return list(out) if isinstance(out, tuple) else [out]


@torch.no_grad()
def run(graph: Graph, inputs: dict[str, Any], weights: Weights | None = None,
        watch: Callable[[Op, list[Any]], None] | None = None) -> list[Any]:
    """Outputs of the graph for named inputs (tensors; a `Batch` for the batch input).

    `watch(op, results)` is called after each op. Values are freed after their last use.
    """
    walk = _walk(graph, inputs, weights, watch)
    try:
        op, _ = next(walk)
    except StopIteration as done:
        return list(done.value)
    raise IRError(f"@{graph.name} is the graph of one rank of several: interpret all of them with run_ranks\n"
                  f"  at {format_op(op)}")


@torch.no_grad()
def run_ranks(graphs: Sequence[Graph], inputs: Sequence[dict[str, Any]], weights: Weights | None = None
              ) -> list[list[Any]]:
    """Outputs of every rank's graph, all run together: at a collective each waits for the others it is with."""
    return together([_walk(graph, given, weights) for graph, given in zip(graphs, inputs, strict=True)])


def together(walks: Sequence[Walk]) -> list[list[Any]]:
    """What the walks of all ranks return; each yields (op, operand) at a collective and is sent its result."""
    outputs: list[list[Any]] = [[] for _ in walks]
    waiting: dict[int, tuple[Op, Any]] = {}

    def go_on(rank: int, answer: Any) -> None:
        waiting.pop(rank, None)
        try:
            waiting[rank] = walks[rank].send(answer)
        except StopIteration as done:
            outputs[rank] = list(done.value)

    for rank in range(len(walks)):
        go_on(rank, None)
    while waiting:
        answers = next(filter(None, (_meet(rank, waiting) for rank in waiting)), None)
        if answers is None:
            raise IRError(f"{len(waiting)} of {len(walks)} ranks meet, "
                          + ", ".join(f"rank {rank} at {format_op(op)}" for rank, (op, _) in waiting.items())
                          + ": all must run the same collectives in the same order")
        for rank, answer in answers.items():
            go_on(rank, answer)
    return outputs


def _meet(rank: int, waiting: dict[int, tuple[Op, Any]]) -> dict[int, Any] | None:
    """The results of the collective that a rank waits at, by rank; None while others have not come to it."""
    op, value = waiting[rank]
    if op.name == "send":
        to = int(op.attrs["to"])  # type: ignore[arg-type]
        other = waiting.get(to)
        come = other is not None and other[0].name == "recv" and other[0].attrs["source"] == rank
        return {rank: value, to: value} if come else None
    if op.name == "recv":
        return None  # its sender meets it
    ranks = int(op.attrs["ranks"])  # type: ignore[arg-type]
    group = range(rank // ranks * ranks, rank // ranks * ranks + ranks)
    if not all(r in waiting and (waiting[r][0].name, waiting[r][0].attrs) == (op.name, op.attrs) for r in group):
        return None
    results = row(op.name).reference([waiting[r][1] for r in group], **plain_attrs(op.attrs))
    return dict(zip(group, results, strict=True))


def _walk(graph: Graph, inputs: dict[str, Any], weights: Weights | None,
          watch: Callable[[Op, list[Any]], None] | None = None) -> Walk:
    """Runs a graph; yields (op, operand) at a collective and takes its result back. Returns the outputs."""
    env: dict[Value, Any] = {}
    for value in graph.inputs:
        if value.name not in inputs:
            raise IRError(f"input %{value.name} of @{graph.name} was not given")
        env[value] = inputs[value.name]
    last = last_uses(graph)
    for index, op in enumerate(graph.ops):
        operands = [None if v is None else env[v] for v in op.operands]
        results = [(yield op, operands[0])] if row(op.name).collective else run_op(op, operands, weights)
        if watch:
            watch(op, results)
        env.update(zip(op.results, results, strict=True))
        for value in set(op.inputs) | set(op.results):
            if last.get(value, index) <= index:
                env.pop(value, None)
    return [env[v] for v in graph.outputs]


def last_uses(graph: Graph) -> dict[Value, int]:
    """Index of the last op that reads each value; graph outputs live to the end."""
    last = {value: index for index, op in enumerate(graph.ops) for value in op.inputs}
    last.update({value: len(graph.ops) for value in graph.outputs})
    return last


def default_inputs(graph: Graph, tokens: list[list[int]]) -> dict[str, Any]:
    """Inputs for fresh sequences of the given token ids; logits of every token wanted."""
    flat = torch.tensor([t for seq in tokens for t in seq], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(seq), dtype=torch.int32) for seq in tokens])
    values: dict[str, Any] = {"tokens": flat, "positions": positions,
                              "rows": torch.arange(len(flat), dtype=torch.int32)}
    for value in graph.inputs:
        if isinstance(value.type, BatchType):
            values[value.name] = Batch.fresh([len(seq) for seq in tokens])
    return values
