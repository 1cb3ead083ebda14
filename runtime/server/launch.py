"""`qcn-run BUILD --port N`: the flags of the server, its start, its signals and its end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import uvicorn

from qcn_compile.errors import QcnError, UsageError
from qcn_compile.runtime.loaded import Model
from qcn_compile.runtime.parsing import make_reasoning_parser, tool_parser_name
from qcn_compile.runtime.request import SamplingParams
from qcn_compile.runtime.server.app import create_app
from qcn_compile.runtime.server.config import Limits, ServerConfig
from qcn_compile.runtime.server.service import Service

_log = logging.getLogger("qcn.server")
_LAST_WORDS = 5  # seconds that connections get to be told about a failed engine
_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # flags that requests may override
_ELSEWHERE = ("max_tokens", "seed", "stop", "json", "profile", "chrome_trace")  # flags of --prompt and --chat
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(arguments: argparse.Namespace, load: Callable[[], Model]) -> int:
    """Load a build and serve it until a signal comes. Returns the exit code: 0, or that of what failed the engine.

    Flags and the address are checked before loading: raises UsageError at once.
    """
    config = server_config(arguments)
    given = {name: value for name in _DEFAULTS if (value := getattr(arguments, name)) is not None}
    SamplingParams(**given)  # raises UsageError for values out of range
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with listen(arguments.host, arguments.port) as listener, load() as model:
        _log.info("%s: %s", arguments.build, model.describe())
        service = Service.of(model, config, given)
        if model.executable.team is not None:
            model.executable.team.on_failure = service.bridge.fail
        return run(Server(service, listener, arguments.ssl_certfile, arguments.ssl_keyfile))


def run(server: Server) -> int:
    """Serve until the end. Returns the exit code."""
    server.run()
    service = server.service
    failure = service.bridge.failure
    ended = service.bridge.stop()
    if not ended:  # a kernel hangs: nothing can free it
        os._exit(1)
    if failure is not None:
        return failure.exit_code if isinstance(failure, QcnError) else 1
    return 0


def server_config(arguments: argparse.Namespace) -> ServerConfig:
    """The flags as a config. Raises UsageError for values that cannot work."""
    for name in _ELSEWHERE:
        if getattr(arguments, name):
            raise UsageError(f"--{name.replace('_', '-')}: not with --port; each request says its own")
    for name in ("request_timeout", "drain_timeout"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < 1e9:
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: must be at least 0 seconds")
    for name in ("max_queued_requests", "max_body_bytes"):
        if getattr(arguments, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 0")
    if bool(arguments.ssl_certfile) != bool(arguments.ssl_keyfile):
        raise UsageError("--ssl-certfile and --ssl-keyfile go together")
    for path in (arguments.ssl_certfile, arguments.ssl_keyfile):
        if path is not None and not path.is_file():
            raise UsageError(f"{path}: no such file")
    if any(not key or not key.isascii() for key in arguments.api_key):
        raise UsageError("--api-key: must be plain ASCII and not empty")
    if arguments.tool_call_parser not in ("auto", "none"):
        tool_parser_name(arguments.tool_call_parser)
    if arguments.reasoning_parser not in ("auto", "none"):
        make_reasoning_parser(arguments.reasoning_parser, False)
    names = arguments.served_model_name or [Path(arguments.build).resolve().name]
    return ServerConfig(
        tuple(names), arguments.accept_any_model, tuple(arguments.api_key), tuple(arguments.cors_origin),
        arguments.tool_call_parser, arguments.reasoning_parser, arguments.request_timeout or None,
        arguments.drain_timeout, arguments.max_queued_requests, Limits(body_bytes=arguments.max_body_bytes))


class Server:
    """uvicorn around a service. The first SIGINT or SIGTERM drains, the second ends at once."""

    def __init__(self, service: Service, listener: socket.socket, certificate: Path | None = None,
                 key: Path | None = None) -> None:
        self.service, self._socket = service, listener
        config = uvicorn.Config(create_app(service), lifespan="off", log_config=None, access_log=False, ws="none",
                                server_header=False, timeout_keep_alive=75, timeout_graceful_shutdown=_LAST_WORDS,
                                ssl_certfile=certificate, ssl_keyfile=key)
        self._uvicorn = uvicorn.Server(config)
        self._uvicorn.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        self._scheme = "https" if certificate else "http"
        self._drain: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Until the end."""
        with asyncio.Runner(loop_factory=self._uvicorn.config.get_loop_factory()) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        async with self._signals():
            bridge = self.service.bridge
            bridge.on_failure = self._failed
            bridge.start()
            gc.collect()
            gc.freeze()  # the model's objects live as long as the process: the collector need not look at them
            self._socket.listen(1024)  # from here on clients may connect
            host, port = self._socket.getsockname()[:2]
            names = ", ".join(self.service.config.model_names)
            _log.info("serving %s at %s://%s:%d (tool calls: %s, reasoning: %s)", names, self._scheme,
                      f"[{host}]" if ":" in host else host, port, self.service.tool_parser or "not parsed",
                      self.service.reasoning_parser or "not parsed")
            await self._uvicorn.serve(sockets=[self._socket])
            if self._drain is not None:
                await self._drain

    @contextlib.asynccontextmanager
    async def _signals(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._signal)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _signal(self) -> None:
        if self._drain is not None:
            _log.warning("second signal: ending at once")
            os._exit(128 + signal.SIGTERM)
        _log.info("draining %d requests for at most %g s", self.service.bridge.live,
                  self.service.config.drain_timeout)
        self._drain = asyncio.ensure_future(self._drain_then_exit())

    async def _drain_then_exit(self) -> None:
        await self.service.bridge.drain(self.service.config.drain_timeout)
        self._uvicorn.should_exit = True

    def _failed(self) -> None:
        _log.critical("the engine failed: %s", self.service.bridge.failure, exc_info=self.service.bridge.failure)
        self._uvicorn.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UsageError when the address cannot be had."""
    if not 0 <= port < 65536:
        raise UsageError(f"--port {port}: must be 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}; "
                         "choose another --host or --port") from None
    listener.set_inheritable(True)
    return listener
