"""Runs a batch: as many requests at once as the engine takes, answers as they come, progress on stderr."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from qcn_compile.runtime.loaded import Model
from qcn_compile.runtime.offline.asgi import post
from qcn_compile.runtime.offline.files import Answers, Line, read_requests
from qcn_compile.runtime.server.app import create_app
from qcn_compile.runtime.server.launch import server_config
from qcn_compile.runtime.server.service import Service

_AHEAD = 4  # requests that wait in the engine beside those that run
_QUEUE = 1 << 20  # that may wait in the engine, a request's choices counted one by one: no line is turned away
_INTERVAL = 10.0  # seconds between lines of progress when stderr is no terminal


def run_batch(arguments: argparse.Namespace, load: Callable[[], Model]) -> int:
    """Answer every line that has no answer yet. Returns 0; raises UsageError for bad files before loading."""
    lines = read_requests(arguments.batch)
    output = arguments.batch_output or arguments.batch.with_suffix(".out.jsonl")
    config = replace(server_config(arguments), accept_any_model=True, api_keys=(), max_queued=_QUEUE)
    with closing(Answers(output)) as answers:
        left = [line for line in lines if line.custom_id not in answers.done]
        progress = Progress(len(lines), len(lines) - len(left))
        if left:
            with load() as model:
                service = Service.of(model, config)
                asyncio.run(_answer_all(service, left, answers, progress, model.memory.slots + _AHEAD))
        progress.end(output, answers.failed)
    return 0


async def _answer_all(service: Service, lines: list[Line], answers: Answers, progress: Progress, width: int) -> None:
    app, waiting = create_app(service), iter(enumerate(lines))

    async def work() -> None:
        for number, line in waiting:
            status, data = await post(app, line.url, json.dumps(line.body).encode())
            if service.bridge.failure is not None:
                raise service.bridge.failure
            body = json.loads(data)
            answers.add(line, number, status, body)
            progress.add(body.get("usage") or {})

    service.bridge.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(width):
                tasks.create_task(work())
    except* Exception as group:
        raise group.exceptions[0] from None
    finally:
        service.bridge.stop()


class Progress:
    """Requests and tokens so far: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int, before: int) -> None:
        self._total, self._before = total, before
        self._done = self._tokens = 0
        self._started = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def add(self, usage: dict[str, int]) -> None:
        """One more answer."""
        self._done += 1
        self._tokens += usage.get("completion_tokens", usage.get("output_tokens", 0))
        now = time.monotonic()
        if self._terminal:
            print(f"\r\x1b[K{self.line()}", end="", file=sys.stderr, flush=True)
        elif now - self._shown > _INTERVAL:
            self._shown = now
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """How far it is."""
        done, seconds = self._before + self._done, max(time.monotonic() - self._started, 1e-9)
        bar = "#" * (24 * done // self._total)
        left = (self._total - done) * seconds / self._done if self._done else 0.0
        return (f"batch [{bar:.<24}] {done}/{self._total} requests, {self._tokens / seconds:.0f} tok/s, "
                f"{left:.0f} s left")

    def end(self, output: Path, failed: int) -> None:
        """The last line."""
        resumed = f" ({self._before} from before)" if self._before else ""
        print(f"{chr(13) + chr(27) + '[K' if self._terminal else ''}{output}: {self._before + self._done} answers"
              f"{resumed}, {failed} of them errors, {time.monotonic() - self._started:.1f} s", file=sys.stderr)
