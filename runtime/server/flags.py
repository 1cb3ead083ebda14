"""The server's flags. Imports nothing heavy: qcn-run reads them on every start."""

from __future__ import annotations

import argparse
from pathlib import Path

from qcn_compile.errors import UsageError
from qcn_compile.runtime.server.config import Limits


def cache_budget(arguments: argparse.Namespace) -> int | None:
    """Bytes for KV pages and states from --cache-memory; None: the default, or what --mem-fraction-static leaves.

    Raises UsageError when both are given, or the share is none.
    """
    share, memory = arguments.mem_fraction_static, arguments.cache_memory
    if share is not None and memory is not None:
        raise UsageError("--mem-fraction-static and --cache-memory exclude each other")
    if share is not None and not 0 < share < 1:
        raise UsageError(f"--mem-fraction-static {share:g}: must be between 0 and 1")
    return None if memory is None else int(memory * 1e9)


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """The server's own flags; `--port` itself, and those of the machine, belong to qcn-run."""
    parser.add_argument("--mem-fraction-static", type=float, metavar="X",
                        help="share of the memory for weights, KV pages and states, instead of --cache-memory")
    s = parser.add_argument_group("server (with --port)")
    s.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default 127.0.0.1: this machine alone")
    s.add_argument("--served-model-name", action="append", default=[], metavar="NAME",
                   help="what clients call the model; may be repeated (default: the build's folder)")
    s.add_argument("--accept-any-model", action="store_true", help="answer to every model name")
    s.add_argument("--tool-call-parser", default="auto", metavar="NAME",
                   help="qwen3_coder (qwen_coder), hermes (qwen25), none; auto (default) looks at the chat template")
    s.add_argument("--reasoning-parser", default="auto", metavar="NAME",
                   help="qwen3, none; auto (default) looks at the chat template")
    s.add_argument("--api-key", action="append", default=[], metavar="KEY", help="may be repeated: each key is valid")
    s.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN",
                   help="web pages of this origin may call; * is all; may be repeated (default: none)")
    s.add_argument("--ssl-certfile", type=Path, metavar="FILE", help="certificate, PEM: serve over https")
    s.add_argument("--ssl-keyfile", type=Path, metavar="FILE", help="its private key, PEM")
    s.add_argument("--request-timeout", type=float, metavar="S", help="most seconds a request may take (default: any)")
    s.add_argument("--drain-timeout", type=float, default=30.0, metavar="S",
                   help="seconds that running requests get after SIGTERM (default 30)")
    s.add_argument("--max-queued-requests", type=int, default=256, metavar="N",
                   help="requests that may wait; more get a 503 (default 256)")
    s.add_argument("--max-body-bytes", type=int, default=Limits.body_bytes, metavar="N",
                   help="largest request body (default 32 MiB)")
