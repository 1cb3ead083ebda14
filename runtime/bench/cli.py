"""`qcn-bench`: load on a server (serve), the speed of a build on this machine (kernels, prefill, decode, e2e), or that
of the CPU target beside other programs (cpu)."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from qcn_compile.errors import DeviceError, QcnError, UsageError
from qcn_compile.runtime.bench import local, peers
from qcn_compile.runtime.bench.client import HttpError, Server
from qcn_compile.runtime.bench.local_table import table as local_table
from qcn_compile.runtime.bench.report import report, table
from qcn_compile.runtime.bench.runner import Options, Run, Runner
from qcn_compile.runtime.bench.workload import Session, Texts, poisson, read_trace, sample_text, synthetic

CONCURRENCY = 8
TOKENS_PER_WORD = 1.3  # when the server has no /tokenize
SERVE = "Load on an OpenAI-compatible server, and what it took."
EXAMPLES = """examples:
  qcn-bench serve --url http://127.0.0.1:8000 --concurrency 16 --input-tokens 1024 --output-tokens 128
  qcn-bench serve --url http://127.0.0.1:8000 --rate 2 --limit 200
  qcn-bench serve --url http://127.0.0.1:8000 --turns 10 --input-tokens 4000 --turn-tokens 500
  qcn-bench serve --url http://127.0.0.1:8000 --trace aiperf_agentic_code.jsonl --limit 8 --concurrency 4 --time-scale 0
"""


class _Parser(argparse.ArgumentParser):
    """One line per mistake, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser("qcn-bench", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    local.add_parsers(commands)
    peers.add_parser(commands)
    p = commands.add_parser("serve", help="load on a server", description=SERVE, epilog=EXAMPLES, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--url", required=True, help="the server, with or without /v1")
    p.add_argument("--model", metavar="NAME", help="default: the first one that /v1/models names")
    p.add_argument("--api-key", metavar="KEY", help="a key that the server takes")
    p.add_argument("--api", choices=("chat", "completions"), default="chat", help="default chat")
    w = p.add_argument_group("what is sent")
    w.add_argument("--input-tokens", type=int, default=512, metavar="N", help="first prompt (default 512)")
    w.add_argument("--output-tokens", type=int, default=64, metavar="N", help="most tokens of an answer (default 64)")
    w.add_argument("--spread", type=float, default=0.0, metavar="X", help="lengths vary by this share (default 0)")
    w.add_argument("--turns", type=int, default=1, metavar="N",
                   help="requests of a session; its history grows, tools are offered (default 1)")
    w.add_argument("--turn-tokens", type=int, default=128, metavar="N", help="new tokens of later turns (default 128)")
    w.add_argument("--trace", type=Path, metavar="FILE",
                   help="replay: Azure's CSV, Mooncake's JSON lines, or aiperf's agent sessions")
    w.add_argument("--time-scale", type=float, default=1.0, metavar="X",
                   help="seconds per second of the trace; 0 sends at once (default 1)")
    w.add_argument("--token-scale", type=float, default=1.0, metavar="X",
                   help="tokens per token of the trace, for small models (default 1)")
    w.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction,
                   help="answers of full length (default: yes for single requests, no for sessions)")
    w.add_argument("--temperature", type=float, metavar="X", help="default: the server's")
    w.add_argument("--seed", type=int, default=0, metavar="N", help="of texts and arrivals (default 0)")
    a = p.add_argument_group("when")
    a.add_argument("--concurrency", type=int, metavar="N",
                   help=f"most sessions at once (default {CONCURRENCY}; any with --rate or --trace)")
    a.add_argument("--rate", type=float, metavar="X", help="Poisson arrivals, sessions a second")
    a.add_argument("--limit", type=int, default=100, metavar="N", help="sessions in all (default 100)")
    a.add_argument("--duration", type=float, default=300.0, metavar="S", help="begin nothing after (default 300)")
    a.add_argument("--timeout", type=float, default=120.0, metavar="S", help="most for one request (default 120)")
    p.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0, 1 when no request succeeded, or the error's own code."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if words[:1] == ["cpu"]:
            return peers.run(words[1:])
        arguments = parser().parse_args(words)
        if arguments.command in local.COMMANDS:
            data = local.run(arguments)
            print(json.dumps(data) if arguments.json else "\n".join(local_table(data)))
            return 0
        check(arguments)
        result = asyncio.run(bench(arguments))
    except QcnError as error:
        print(f"qcn-bench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nqcn-bench: interrupted", file=sys.stderr)
        return 130
    print(json.dumps(result) if arguments.json else table(result))
    return 0 if result["requests"]["completed"] else 1


def check(arguments: argparse.Namespace) -> None:
    """Raises UsageError for values that cannot work."""
    for name in ("input_tokens", "output_tokens", "turn_tokens", "turns", "limit", "concurrency"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("duration", "timeout", "rate", "token_scale"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < 1e9:
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: must be more than 0")
    if not 0 <= arguments.spread < 1:
        raise UsageError(f"--spread {arguments.spread:g}: must be at least 0 and less than 1")
    if not 0 <= arguments.time_scale < 1e6:
        raise UsageError(f"--time-scale {arguments.time_scale:g}: must be at least 0")
    if arguments.trace is not None and arguments.rate is not None:
        raise UsageError("--trace and --rate exclude each other: a trace has its own arrivals")


def workload(arguments: argparse.Namespace) -> list[Session]:
    """The sessions to send."""
    a = arguments
    if a.trace is not None:
        return read_trace(a.trace, a.limit, a.time_scale, a.token_scale)
    made: Iterable[Session] = synthetic(a.input_tokens, a.output_tokens, a.turns, a.turn_tokens, a.spread, a.seed)
    if a.rate is not None:
        made = poisson(iter(made), a.rate, a.seed)
    return list(islice(made, a.limit))


async def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask the server about itself, run, report. Raises DeviceError when it cannot be reached."""
    server = Server.at(arguments.url, arguments.api_key)
    sessions = workload(arguments)
    try:
        model, context = await _model(server, arguments.model)
        rate = await _tokens_per_word(server, model)
    except (OSError, HttpError, ValueError, KeyError, IndexError) as error:
        raise DeviceError(f"{arguments.url} does not answer as an OpenAI-compatible server does: {error}") from None
    several = any(len(session.turns) > 1 for session in sessions)
    concurrency = arguments.concurrency
    if concurrency is None and arguments.rate is None and arguments.trace is None:
        concurrency = CONCURRENCY
    ignore = not several if arguments.ignore_eos is None else arguments.ignore_eos
    options = Options(model, arguments.api, concurrency, arguments.duration, arguments.timeout, ignore, several,
                      arguments.temperature, context)
    runner = Runner(server, options, Texts(rate, arguments.seed), _progress if sys.stderr.isatty() else None)
    return {"model": model, **report(await runner.go(sessions))}


async def _model(server: Server, name: str | None) -> tuple[str, int | None]:
    """The model's name and context length, where the server says it."""
    models = (await server.json("GET", "/v1/models"))["data"]
    found = next((m for m in models if m["id"] == name), models[0])
    return name or found["id"], found.get("max_model_len")


async def _tokens_per_word(server: Server, model: str) -> float:
    text = sample_text()
    try:
        count = (await server.json("POST", "/tokenize", {"model": model, "prompt": text}))["count"]
    except (HttpError, KeyError):
        return TOKENS_PER_WORD
    return float(count) / len(text.split())


def _progress(run: Run) -> None:
    failed = sum(sample.error is not None for sample in run.samples)
    sys.stderr.write(f"\r\x1b[K{len(run.samples)} requests, {failed} failed")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
