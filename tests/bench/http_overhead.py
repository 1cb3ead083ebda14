"""What the HTTP layer costs: CPU seconds of the server per 1,000 streamed tokens, with an engine that computes nothing.

python tests/bench/http_overhead.py [streams] [seconds per step] [tokens]
The engine's own thread is measured and taken off. A step gives every stream one token, and each token is one event.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path

from qcn_compile.runtime.server.config import ServerConfig
from qcn_compile.runtime.server.service import Service

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime" / "server"))
from fake_engine import FakeEngine
from serving import LiveServer, write_tokenizer


class Paced(FakeEngine):
    """Steps at a fixed pace and counts its thread's CPU time."""

    def step(self, launching):
        outputs = super().step(launching)
        self.cpu = time.thread_time()
        return outputs


async def stream(port, body, seen):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    while piece := await reader.read(65536):
        seen[0] += piece.count(b"data: {")
        if b"[DONE]" in piece:
            break
    writer.close()


def clients(port, streams, tokens, pipe):
    async def run():
        seen = [0]
        body = {"messages": [{"role": "user", "content": "go"}], "stream": True, "max_tokens": tokens}
        await asyncio.gather(*(stream(port, body, seen) for _ in range(streams)))
        return seen[0]

    pipe.send(asyncio.run(run()))


def main(streams=64, delay=0.02, tokens=400):
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_tokenizer(Path(folder))
        engine = Paced(tokenizer, lambda prompt, params: " return value" * tokens, streams, delay)
        service = Service(ServerConfig(("fake",)), tokenizer, engine, vocab_size=4096, sampling={},
                          context_length=10**6, occupancy=engine.occupancy)
        with LiveServer(service) as server:
            here, there = multiprocessing.Pipe()
            arguments = (server.port, streams, tokens, there)
            process = multiprocessing.get_context("spawn").Process(target=clients, args=arguments)
            cpu, started = time.process_time(), time.perf_counter()
            process.start()
            events = here.recv()
            wall, used = time.perf_counter() - started, time.process_time() - cpu
            process.join()
        count = service.metrics.totals["generated_tokens"]
        http = used - engine.cpu
        print(f"{streams} streams, {count} tokens in {events} events, {count / wall:.0f} tokens/s: "
              f"HTTP layer {1e3 * http / count:.4f} CPU s per 1,000 tokens ({1e6 * http / count:.0f} us a token), "
              f"engine thread {1e3 * engine.cpu / count:.4f}, threads {threading.active_count()}")
        return 1e6 * http / count


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((int, float, int), sys.argv[1:], strict=False)))
