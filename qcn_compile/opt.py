"""`qcn-opt in.qir -p canonicalize,fuse-norm`: run passes on the text form of a graph; shrink it, interpret it."""

from __future__ import annotations

import argparse
import gzip
import re
import sys
from pathlib import Path
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


def parser() -> argparse.ArgumentParser:
    """All flags of qcn-opt."""
    top = argparse.ArgumentParser(prog="qcn-opt", description="Run passes on a .qir file and print the graph. The "
                                  "verifier runs before the first pass and after each.")
    top.add_argument("file", type=Path, help="the graph, .qir or .qir.gz; - reads standard input")
    top.add_argument("-p", "--passes", default="", help="pass names, comma-separated, in order")
    top.add_argument("--plugin", action="append", default=[], type=Path, metavar="FILE",
                     help="Python file with passes and ops; may be repeated")
    top.add_argument("--log", action="store_true", help="print what fired and what did not, as comments")
    top.add_argument("--interpret", action="store_true", help="run the graph on random inputs and weights, before and "
                     "after the passes; print shape and norm of each output and how far the passes moved it")
    top.add_argument("--reduce", action="store_true", help="shrink the graph while the passes fail in the same way "
                     "(with --interpret: or change the numbers), and print what is left")
    top.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(argv)
    context = PassContext()
    try:
        load_plugins(args.plugin)
        text, names = _read(args.file), [n for n in args.passes.split(",") if n]
        list(passes_by_name(names))
        if args.reduce:
            return _reduce(parse_graph(text), names, args)
        graph = run_text(text, names, context)
        if args.interpret:
            print("\n".join(interpret(parse_graph(text), graph, args.seed)))
            return 0
    except QcnError as error:
        print(f"qcn-opt: {error}", file=sys.stderr)
        return error.exit_code
    if args.log:
        for name, event in context.log:
            verdict = f"not fired: {event.reason}" if event.reason else "fired"
            print(f"// {name}: {event.rule} at %{event.value}: {verdict}")
    print(print_graph(graph), end="")
    return 0


def _read(path: Path) -> str:
    try:
        if str(path) == "-":
            return sys.stdin.read()
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


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


if __name__ == "__main__":
    sys.exit(main())
