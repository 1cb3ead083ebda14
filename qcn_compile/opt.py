"""`python -m qcn_compile.opt in.qir -p canonicalize,fuse-norm`: run passes on the text form of a graph."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qcn_compile.errors import QcnError, UsageError
from qcn_compile.ir.text import print_graph
from qcn_compile.passes.base import PassContext
from qcn_compile.pipeline import run_text


def main(argv: list[str] | None = None) -> int:
    """Read `.qir`, run passes with verification, print the result; `--log` adds what fired and what did not."""
    top = argparse.ArgumentParser(prog="qcn-opt", description="Run passes on a .qir file.")
    top.add_argument("file", type=Path, help="the graph; - reads standard input")
    top.add_argument("-p", "--passes", default="", help="pass names, comma-separated, in order")
    top.add_argument("--log", action="store_true", help="print what fired and what did not, as comments")
    args = top.parse_args(argv)
    context = PassContext()
    try:
        graph = run_text(_read(args.file), [n for n in args.passes.split(",") if n], context)
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
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
