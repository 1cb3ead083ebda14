"""`qcn-opt in.qir -p canonicalize,fuse-norm`: run passes on the text form of a graph; shrink it, interpret it."""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path

from qcn_compile.errors import QcnError, UsageError
from qcn_compile.flags import check_passes, check_plugins


def parser() -> argparse.ArgumentParser:
    """All flags of qcn-opt."""
    top = argparse.ArgumentParser(prog="qcn-opt", description="Run passes on a .qir file and print the graph. The "
                                  "verifier runs before the first pass and after each.")
    top.add_argument("file", type=Path, help="the graph, .qir or .qir.gz; - reads standard input")
    top.add_argument("-p", "--passes", default="", help="pass names, comma-separated, in order")
    top.add_argument("--plugin", action="append", default=[], type=Path, metavar="FILE",
                     help="Python file with passes and ops; may be repeated")
    top.add_argument("--verify", action="store_true", help="run the verifier before and after each pass; always done")
    top.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the graph there instead of printing it")
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
    try:
        names = [n for n in args.passes.split(",") if n]
        check_plugins(args.plugin)
        check_passes(names, args.plugin)
        text = _read(args.file)
        from qcn_compile.opt_run import run  # here the compiler is imported

        return run(text, names, args)
    except QcnError as error:
        print(f"qcn-opt: {error}", file=sys.stderr)
        return error.exit_code


def _read(path: Path) -> str:
    try:
        if str(path) == "-":
            return sys.stdin.read()
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


if __name__ == "__main__":
    sys.exit(main())
