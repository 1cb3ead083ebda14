"""What qcn-opt does with a graph: run passes, interpret before and after, shrink what fails."""

from __future__ import annotations

import argparse
import re
from typing import Any

from qcn_compile.errors import PassError, QcnError, UsageError
from qcn_compile.ir.graph import Graph
from qcn_compile.ir.reduce import reduce_graph
from qcn_compile.ir.text import parse_graph, print_graph
from qcn_compile.ir.verify import verify
from qcn_compile.passes.base import PassContext
from qcn_compile.pipeline import Pipeline, Tracing, passes_by_name, run_text
from qcn_compile.plugins import load_plugins

DIFFERENT = 1e-3  # relative distance of outputs beyond which --reduce calls a change wrong


def run(text: str, names: list[str], args: argparse.Namespace) -> int:
    """The command on the text of a graph; prints its result and returns the exit code."""
    context = PassContext()
    load_plugins(args.plugin)
    list(passes_by_name(names))
    if args.reduce:
        return _reduce(parse_graph(text), names, args)
    graph = run_text(text, names, context)
    if args.interpret:
        print("\n".join(interpret(parse_graph(text), graph, args.seed)))
        return 0
    if args.log:
        for name, event in context.log:
            verdict = f"not fired: {event.reason}" if event.reason else "fired"
            print(f"// {name}: {event.rule} at %{event.value}: {verdict}")
    if args.output is None:
        print(print_graph(graph), end="")
        return 0
    try:
        args.output.write_text(print_graph(graph), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {args.output}: {error.strerror}; name another file") from None
    return 0


def outputs(graph: Graph, like: Graph, seed: int) -> list[Any]:
    """Results of a graph on random inputs and weights; those of `like` where the passes dropped or added some."""
    from qcn_compile.ir.interpret import run
    from qcn_compile.ir.sample import sample_inputs, sample_weights

    return run(graph, {**sample_inputs(graph, seed), **sample_inputs(like, seed)}, sample_weights(like).__getitem__)


def interpret(before: Graph, after: Graph, seed: int) -> list[str]:
    """A line for each output: name, shape, norm, distance to the same output before the passes."""
    old, new = outputs(before, before, seed), outputs(after, before, seed)
    return [f"%{value.name} {value.type} {list(b.shape)}: norm {b.float().norm():.6g}, "
            f"moved by {distance(a, b):.2e}" for value, a, b in zip(after.outputs, old, new, strict=True)]


def distance(a: Any, b: Any) -> float:
    """Relative L2 distance; infinite for different shapes."""
    if a.shape != b.shape:
        return float("inf")
    return float((a.float() - b.float()).norm() / a.float().norm().clamp_min(1e-30))


def failure(graph: Graph, names: list[str], numbers: bool, seed: int) -> str | None:
    """How the passes fail on a graph, without the names of values; None when they do not, or the graph is no input."""
    try:
        verify(graph)
    except QcnError as error:
        return None if names else _kind(error)
    try:
        after = Pipeline(list(passes_by_name(names))).run(graph, PassContext(), Tracing())
        verify(after)
        if numbers and any(distance(a, b) > DIFFERENT for a, b in zip(outputs(graph, graph, seed),
                                                                     outputs(after, graph, seed), strict=True)):
            return "the numbers differ"
    except QcnError as error:
        return _kind(error)
    return None


def _kind(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, PassError) and error.__cause__ is not None else error
    return re.sub(r"%[\w.]+|\d+", "_", f"{type(cause).__name__}: {cause}".splitlines()[0])


def _reduce(graph: Graph, names: list[str], args: argparse.Namespace) -> int:
    def fails(candidate: Graph) -> str | None:
        return failure(candidate, names, args.interpret, args.seed)

    found = fails(graph.clone())
    if found is None:
        what = f"the passes {args.passes} work" if names else "the graph verifies"
        raise UsageError(f"nothing to reduce: {what} on {args.file}")
    small = reduce_graph(graph, fails)
    print(f"// reduced from {len(graph.ops)} to {len(small.ops)} ops; still: {found}")
    print(print_graph(small), end="")
    return 0
