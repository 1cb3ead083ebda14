"""`qcn-run`: stream an answer, chat with, or serve a build of qcn-compile, or a checkpoint, which it compiles first."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qcn_compile.errors import QcnError, UsageError
from qcn_compile.runtime.checkpoint import Checkpoint, add_checkpoint_flags, check_layout, find_checkpoint
from qcn_compile.runtime.prefix.options import add_prefix_flags, prefix_options
from qcn_compile.runtime.replicas.options import OFF, add_replica_flags
from qcn_compile.runtime.replicas.options import check as check_replicas
from qcn_compile.runtime.server.flags import add_server_flags, cache_budget
from qcn_compile.runtime.server.sglang import add_sglang_flags, check_sglang_flags, check_state_type
from qcn_compile.runtime.speculation.options import add_speculation_flags, speculation_options

if TYPE_CHECKING:
    from qcn_compile.runtime.loaded import Model
    from qcn_compile.runtime.request import SamplingParams

PROMPT_TOKENS, CHAT_TOKENS = 512, 4096
RUNNING, SERVED = 4, 16
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE
EXAMPLES = """examples:
  qcn-run build/ --prompt "def fib(n):"
  qcn-run build/ --prompt - --temperature 0 < prompt.txt
  qcn-run build/ --chat
  qcn-run build/ --port 8000
  qcn-run build/ --batch requests.jsonl
  qcn-run Qwen/Qwen3-Coder-Next --port 8000
"""


class _Parser(argparse.ArgumentParser):
    """One line per mistake, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The command line. Sampling defaults are the model's own, from its generation_config.json."""
    p = _Parser("qcn-run", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False)
    p.add_argument("build", type=Path, nargs="?", metavar="BUILD",
                   help="folder written by qcn-compile; or a checkpoint's folder or Hugging Face name")
    mode = p.add_argument_group("what to do (one of)").add_mutually_exclusive_group(required=True)
    mode.add_argument("--prompt", metavar="TEXT", help="continue this text; - reads it from stdin")
    mode.add_argument("--chat", action="store_true", help="chat line by line; /clear forgets, /exit leaves")
    mode.add_argument("--batch", type=Path, metavar="FILE",
                      help="answer the requests of a file, in OpenAI's batch format")
    mode.add_argument("--port", type=int, metavar="N", help="serve the OpenAI and Anthropic APIs; 0 picks a port")
    s = p.add_argument_group("sampling (default: the model's generation_config.json)")
    s.add_argument("--max-tokens", type=int, metavar="N",
                   help=f"most new tokens (default {PROMPT_TOKENS}, with --chat {CHAT_TOKENS})")
    s.add_argument("--temperature", type=float, metavar="X", help="0 is greedy")
    s.add_argument("--top-k", type=int, metavar="N", help="the N likeliest tokens only; 0 is all")
    s.add_argument("--top-p", type=float, metavar="X", help="the likeliest tokens that hold this much probability")
    s.add_argument("--min-p", type=float, metavar="X", help="tokens at least this likely relative to the likeliest")
    s.add_argument("--repetition-penalty", type=float, metavar="X",
                   help="over 1: tokens that were there already become less likely (default 1)")
    s.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    s.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    m = p.add_argument_group("machine")
    m.add_argument("--model", "--model-path", type=Path, metavar="DIR",
                   help="checkpoint for a build made with --weights late; without BUILD: what to run")
    m.add_argument("--threads", type=int, metavar="N", help="default: QCN_THREADS, or all cores of this process")
    m.add_argument("--context-length", type=int, metavar="N", help="tokens a sequence may have (default: the build's)")
    m.add_argument("--max-running-requests", type=int, metavar="N",
                   help=f"sequences computed at once (default {RUNNING}, with --port {SERVED})")
    m.add_argument("--cache-memory", type=float, metavar="GB", help="most memory for KV pages and states")
    m.add_argument("--prefill-chunk", "--chunked-prefill-size", type=int, metavar="N",
                   help="most prompt tokens a step; -1 is any")
    m.add_argument("--huge-pages", action="store_true", help="copy weights to huge pages: later start, faster tokens")
    m.add_argument("--pin-threads", action="store_true", help="bind each thread to a core of its own; with "
                   "--huge-pages its part of the weights then lies in memory near that core")
    m.add_argument("--embedding-on-host", action="store_true", help="GPU builds: keep the table of tokens in host "
                   "memory, its rows read over the bus; leaves the card more room for caches")
    add_prefix_flags(p)
    add_speculation_flags(p)
    add_server_flags(p)
    add_replica_flags(p)
    add_checkpoint_flags(p)
    add_sglang_flags(p)
    o = p.add_argument_group("output")
    o.add_argument("--batch-output", type=Path, metavar="FILE",
                   help="answers of --batch (default: its name with .out.jsonl); those already there are kept")
    o.add_argument("--json", action="store_true", help="one JSON object a line: every piece, then usage and timing")
    o.add_argument("--profile", action="store_true", help="time of every kernel, on stderr")
    o.add_argument("--chrome-trace", type=Path, metavar="FILE",
                   help="time of every kernel of every step, for chrome://tracing or ui.perfetto.dev")
    o.add_argument("--expert-statistics", type=Path, metavar="FILE",
                   help="count which experts the tokens take; JSON, written at the end (CPU builds)")
    o.add_argument("--verify", action="store_true", help="hash every file of the build first")
    o.add_argument("--verbose", action="store_true", help="say what was loaded and what it costs")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, the error's own, 130 for Ctrl-C, 141 when the reader went away."""
    started = time.perf_counter()
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        return _run(parser().parse_args(words), words, started)
    except QcnError as error:
        print(f"qcn-run: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nqcn-run: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
        return BROKEN_PIPE


def _run(arguments: argparse.Namespace, argv: Sequence[str], started: float) -> int:
    check_sglang_flags(arguments)
    check_replicas(arguments)
    checkpoint = find_checkpoint(arguments)
    if arguments.ray != OFF:
        from qcn_compile.runtime.replicas.launch import serve as serve_replicas

        if checkpoint is not None:
            checkpoint.compile()
        return serve_replicas(arguments, argv)
    if arguments.port is not None:
        from qcn_compile.runtime.server.launch import serve

        return serve(arguments, lambda: _load(arguments, checkpoint))
    if arguments.batch is not None:
        from qcn_compile.runtime.offline.run import run_batch

        return run_batch(arguments, lambda: _load(arguments, checkpoint))
    from qcn_compile.runtime.profile import Profile
    from qcn_compile.runtime.terminal import chat, complete
    from qcn_compile.runtime.trace import Trace

    with _load(arguments, checkpoint) as model:
        params = _sampling(model, arguments)
        model.load_seconds = time.perf_counter() - started
        if arguments.verbose:
            print(f"{arguments.build}: {model.describe()}", file=sys.stderr)
        profile = Profile(Trace(str(arguments.build)) if arguments.chrome_trace else None)
        if arguments.profile or arguments.chrome_trace:
            model.executable.profile = profile
        if arguments.chat:
            chat(model, params, arguments.json)
        else:
            prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
            complete(model, prompt, params, arguments.json)
        if arguments.verbose and model.engine.prefixes is not None:
            print(model.engine.prefixes, file=sys.stderr)
        if arguments.verbose and model.engine.speculation is not None:
            print(model.engine.speculation, file=sys.stderr)
        if profile.trace is not None:
            profile.trace.write(arguments.chrome_trace)
        if arguments.profile:
            print("\n".join(profile.lines()), file=sys.stderr)
    return 0


def _load(arguments: argparse.Namespace, checkpoint: Checkpoint | None) -> Model:
    from qcn_compile.runtime.loaded import load
    from qcn_compile.runtime.progress import Progress

    prefix, speculation = prefix_options(arguments), speculation_options(arguments)
    if checkpoint is not None:
        checkpoint.compile()
    else:
        check_layout(arguments.build, arguments.tp, arguments.ep, arguments.pp)
    check_state_type(arguments.build, arguments.mamba_ssm_dtype)
    running, chunk = arguments.max_running_requests, arguments.prefill_chunk
    if running is None:
        running = RUNNING if arguments.port is None and arguments.batch is None else SERVED
    if arguments.disable_radix_cache and arguments.max_mamba_cache_size is not None:
        running = min(running, arguments.max_mamba_cache_size)  # no cached prefixes: all states are of running ones
    with Progress() as progress:
        model = load(arguments.build, context_length=arguments.context_length, threads=arguments.threads,
                     max_running_requests=running, prefill_chunk=None if chunk == -1 else chunk,
                     cache_memory=cache_budget(arguments), memory_share=arguments.mem_fraction_static,
                     huge_pages=arguments.huge_pages, pin=arguments.pin_threads,
                     verify=arguments.verify, model=arguments.model, prefix=prefix, speculation=speculation,
                     overrides=arguments.json_model_override_args, embedding_on_host=arguments.embedding_on_host,
                     report=progress.report)
    if arguments.expert_statistics is not None:
        try:
            model.count_experts(arguments.expert_statistics)
        except QcnError:
            model.close()
            raise
    return model


def _sampling(model: Model, arguments: argparse.Namespace) -> SamplingParams:
    usual = CHAT_TOKENS if arguments.chat else PROMPT_TOKENS
    limit = usual if arguments.max_tokens is None else arguments.max_tokens
    return model.sampling(max_tokens=limit, temperature=arguments.temperature, top_k=arguments.top_k,
                          top_p=arguments.top_p, min_p=arguments.min_p, seed=arguments.seed,
                          repetition_penalty=arguments.repetition_penalty, stop=tuple(arguments.stop))


if __name__ == "__main__":
    sys.exit(main())
