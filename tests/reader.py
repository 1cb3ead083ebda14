"""A reader of the documentation: types its commands into one terminal, and keeps its servers running in another."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest.mock import patch

import httpx
import pytest

import qcn_compile
from qcn_compile import cli, opt
from qcn_compile.inspect import cli as inspect_cli
from qcn_compile.runtime import cli as run_cli
from qcn_compile.runtime.bench import cli as bench_cli
from qcn_compile.runtime.checkpoint import find_checkpoint

COMMANDS: dict[str, Any] = {"qcn-compile": cli, "qcn-opt": opt, "qcn-inspect": inspect_cli, "qcn-run": run_cli,
                            "qcn-bench": bench_cli}
BUNDLED = Path(qcn_compile.__file__).parent / "assets" / "tiny-coder"
HUB_NAME = "Qwen/Qwen3-Coder-Next"
KEYS = {"KEY": "one-key", "OTHER_KEY": "another-key"}
TYPED = "What is a list?\n/exit\n"
SHORT = ["--limit", "2", "--input-tokens", "256", "--turn-tokens", "32", "--token-scale", "0.02"]  # enough of a load
START, END = 60, 30  # seconds


class Reader:
    """Runs a page's commands in `folder`. A line with --port is a process that serves until the next one, or the end.

    DIR and the Hugging Face name are the bundled checkpoint, 8000 is a free port. What a page takes for granted is
    there: certificate, keys, trace. Checkpoints are served from the cache, into which this process compiles them, for
    its CPU: tests/runtime/server/test_launch_lines.py starts one that is not there yet.
    """

    def __init__(self, folder: Path) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = str(free.getsockname()[1])
        (folder / "DIR").symlink_to(BUNDLED)
        (folder / "sessions.jsonl").symlink_to(Path(__file__).parent / "data" / "agent_sessions.jsonl")
        hub = folder / "hub" / f"models--{HUB_NAME.replace('/', '--')}"
        (hub / "refs").mkdir(parents=True)
        (hub / "refs" / "main").write_text("0" * 40)
        (hub / "snapshots").mkdir()
        (hub / "snapshots" / ("0" * 40)).symlink_to(BUNDLED)
        self._caches = {"HF_HUB_CACHE": str(hub.parent), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._stop()
        elif self._server is not None:
            self._server.kill()
            self._server.wait()

    def run(self, line: str) -> None:
        """One command, in this process unless it serves; `> FILE` takes its output."""
        line = re.sub(r"\b8000\b", self._port, re.sub(r"\$(\w+)", lambda name: KEYS[name[1]], line))
        words = shlex.split(line, comments=True)
        if "--port" in words:
            return self._serve(words)
        words += SHORT if words[:2] == ["qcn-bench", "serve"] else []
        target = Path(words[words.index(">") + 1]) if ">" in words else Path("/dev/null")
        words = words[:words.index(">")] if ">" in words else words
        stdin, sys.stdin = sys.stdin, io.StringIO(TYPED)
        try:
            with target.open("w") as out, contextlib.redirect_stdout(out):
                assert COMMANDS[words[0]].main(words[1:]) == 0, line
        finally:
            sys.stdin = stdin
        return None

    def _serve(self, words: list[str]) -> None:
        self._stop()
        if "--ssl-certfile" in words:
            if shutil.which("openssl") is None:
                pytest.skip("no openssl")
            subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
                            "-keyout", "key.pem", "-out", "cert.pem"], check=True, capture_output=True)
        if words[1] in ("DIR", HUB_NAME):
            words += ["--target", "cpu"]
        with patch.dict(os.environ, self._caches):
            checkpoint = find_checkpoint(run_cli.parser().parse_args(words[1:]))
            if checkpoint is not None:
                assert cli.main(["--model", checkpoint.model, "-o", str(checkpoint.build), *checkpoint.flags]) == 0
            self._server = subprocess.Popen([sys.executable, "-m", COMMANDS[words[0]].__name__, *words[1:]])
        self._ask(words)

    def _ask(self, words: list[str]) -> None:
        """It says that it is well, and answers."""
        url = f"{'https' if '--ssl-certfile' in words else 'http'}://127.0.0.1:{self._port}"
        with httpx.Client(base_url=url, verify=False, timeout=60,
                          headers={"Authorization": f"Bearer {KEYS['KEY']}"}) as client:
            self._wait(client, words)
            name = client.get("/v1/models").json()["data"][0]["id"]
            asked = {"model": name, "max_tokens": 4, "messages": [{"role": "user", "content": "def fib(n):"}]}
            answer = client.post("/v1/chat/completions", json=asked)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"], answer.text

    def _wait(self, client: httpx.Client, words: list[str]) -> None:
        until = time.monotonic() + START
        while self._server is not None:
            with contextlib.suppress(httpx.TransportError):
                if client.get("/health").status_code == 200:
                    return
            assert self._server.poll() is None and time.monotonic() < until, f"{shlex.join(words)} does not serve"
            time.sleep(0.05)

    def _stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            server.send_signal(signal.SIGTERM)
            try:
                assert server.wait(END) == 0
            finally:
                server.kill()
