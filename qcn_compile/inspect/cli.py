"""`qcn-inspect`: look into a build."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcn_compile.errors import QcnError
from qcn_compile.inspect import show, views
from qcn_compile.inspect.build import Build

VIEWS = {
    "summary": "model, target, decisions, sizes, work of each plan (the default)",
    "ops": "ops of the final graph; bytes and FLOPs of each op in each plan",
    "kernels": "source, code bytes and instruction statistics of each kernel",
    "memory": "workspace against its lower bound, and the bytes alive over a step",
    "decisions": "what was chosen, how each weight is stored, what was not done, and why",
    "passes": "ops before and after each pass, what it did and what it did not",
    "verify": "check every file against its hash, read every plan and graph",
    "profile": "run a prompt and 32 steps, time each op, measure the machine's limits",
}
OTHERS = {
    "diff": "what differs between two builds: decisions, ops, passes, plans, kernels, sizes, tools",
    "device": "bytes that a GPU build takes on its card when loaded",
    "targets": "the chips that builds can be made for, each figure with its source",
}


def parser() -> argparse.ArgumentParser:
    """All commands and flags of qcn-inspect."""
    top = argparse.ArgumentParser(prog="qcn-inspect", description="Look into a build: qcn-inspect BUILD, or "
                                  "qcn-inspect COMMAND BUILD.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in VIEWS.items():
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("build", type=Path, help="directory written by qcn-compile")
        sub.add_argument("--json", action="store_true", help="print the data as JSON")
        if name in ("summary", "kernels"):
            sub.add_argument("--profile", type=Path, metavar="FILE",
                             help="measured times: what `qcn-inspect profile BUILD --json` printed")
        if name == "kernels":
            sub.add_argument("--source", metavar="KERNEL", help="print the source of the kernel whose name begins so")
        if name == "summary":
            sub.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page about the build")
    for name, text in OTHERS.items():
        sub = commands.add_parser(name, help=text, description=text)
        for place in {"diff": ("build", "other"), "device": ("build",), "targets": ()}[name]:
            sub.add_argument(place, type=Path, help="directory written by qcn-compile")
        sub.add_argument("--json", action="store_true", help="print the data as JSON")
    sub = commands.choices["device"]
    sub.add_argument("--context-length", type=int, metavar="N", help="longest sequence (default: the build's)")
    sub.add_argument("--max-running-requests", type=int, default=4, metavar="N", help="sequences at once (default 4)")
    sub.add_argument("--embedding-on-host", action="store_true", help="the table of tokens in host memory")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] not in (*VIEWS, *OTHERS, "-h", "--help"):
        words.insert(0, "summary")
    args = parser().parse_args(words)
    try:
        data = _data(args)
        if getattr(args, "html", None):
            from qcn_compile.inspect.page import write_page

            write_page(Build.open(args.build), args.html, args.profile)
            print(f"wrote {args.html}", file=sys.stderr)
        if isinstance(data, str):
            text = data.rstrip()
        else:
            text = json.dumps(data, indent=1) if args.json else "\n".join(getattr(show, args.command)(data))
        print(text)
        return 0
    except QcnError as error:
        print(f"qcn-inspect: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _data(args: argparse.Namespace) -> Any:
    if args.command == "targets":
        return views.targets()
    if args.command == "profile":
        from qcn_compile.inspect.profile import measure

        return measure(args.build)
    build = Build.open(args.build)
    if args.command == "device":
        return views.device(build, args.context_length, args.max_running_requests, args.embedding_on_host)
    if args.command == "diff":
        return views.diff(build, Build.open(args.other))
    if args.command == "kernels":
        from qcn_compile.inspect import profile
        from qcn_compile.inspect.kernels import kernels, text_of

        if args.source is not None:
            return text_of(build, args.source)
        return kernels(build, profile.read(args.profile) if args.profile else None)
    return getattr(views, args.command)(build)


if __name__ == "__main__":
    sys.exit(main())
