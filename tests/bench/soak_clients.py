"""Clients that behave badly, and what each of them must have read all the same.

python tests/bench/soak_clients.py PORT STREAMS SEED      streams until killed
python tests/bench/soak_clients.py PORT health SECONDS    how long /health takes, as JSON
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import socket
import sys
import time
from collections import Counter
from contextlib import aclosing

from qcn_compile.runtime.bench.client import Answer, HttpError, Server

HANG = 90.0  # seconds without an end
PLAIN, CANCEL, SLOW = "plain", "cancelled", "slow"
_WORDS = ("def", "return", "list", "sort", "parse", "tree", "file", "class", "loop", "sum", "stack", "queue")


def cases(count, seed=0):
    """Requests with a known answer: greedy or seeded; some share their first turns."""
    rng = random.Random(seed)
    shared = [{"role": "user", "content": " ".join(rng.choices(_WORDS, k=200))}, {"role": "assistant", "content": "ok"}]
    for number in range(count):
        question = {"role": "user", "content": " ".join(rng.choices(_WORDS, k=8 + number % 60))}
        yield {"messages": [*shared * (number % 2), question], "max_tokens": rng.randint(8, 80), "stream": True,
               "ignore_eos": True, "seed": number, "temperature": 0.9 * (number % 3)}


async def read(answer, most=None):
    """The text of a stream, or of its first `most` events."""
    await answer.check()
    text, count = "", 0
    async with aclosing(answer.events()) as events:
        async for event in events:
            if "error" in event:
                raise HttpError("error event", str(event["error"]))
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            count += 1
            if count == most:
                break
    return text


class Crowd:
    """`streams` clients at once that begin anew when they end."""

    def __init__(self, port, bodies, references=None, seed=0):
        self.server, self.bodies, self.references = Server("127.0.0.1", port), bodies, references
        self.rng, self.ended, self.wrong = random.Random(seed), Counter(), []
        self.took = []  # seconds of those read to the end without pauses

    async def ask(self, body, most=None):
        async with self.server.request("POST", "/v1/chat/completions", body) as answer:
            return await read(answer, most)

    async def run(self, streams, seconds):
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._client(end) for _ in range(streams)))

    async def _client(self, end):
        while time.monotonic() < end:
            place = self.rng.randrange(len(self.bodies))
            kind = self.rng.choices((PLAIN, CANCEL, SLOW), (60, 25, 15))[0]
            start = time.monotonic()
            try:
                async with asyncio.timeout(HANG):
                    self._compare(place, kind, await self._one(kind, self.bodies[place]))
                self.took += [time.monotonic() - start] * (kind == PLAIN)
            except TimeoutError:
                self.ended["hung"] += 1
            except (OSError, HttpError, ValueError) as error:
                self.ended[f"failed: {str(error)[:100]}"] += 1

    async def _one(self, kind, body):
        if kind == SLOW:
            return await self._slow(body)
        most = self.rng.randint(1, body["max_tokens"]) if kind == CANCEL else None
        if kind == CANCEL and self.rng.random() < 0.2:  # gone before the answer began
            async with self.server.request("GET", "/health"):
                pass
            _, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
            data = json.dumps(body).encode()
            writer.write(self.server.head("POST", "/v1/chat/completions", len(data)) + data)
            await asyncio.sleep(self.rng.random() * 0.2)
            writer.close()
            return ""
        return await self.ask(body, most)

    async def _slow(self, body):
        """Buffers so small, and pauses so long, that the server has to wait."""
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        link.setblocking(False)
        await asyncio.get_running_loop().sock_connect(link, ("127.0.0.1", self.server.port))
        reader, writer = await asyncio.open_connection(sock=link, limit=1024)
        try:
            data = json.dumps(body).encode()
            writer.write(self.server.head("POST", "/v1/chat/completions", len(data)) + data)
            await asyncio.sleep(self.rng.random() * 2)
            return await read(await Answer.read_head(Sleepy(reader, self.rng)))
        finally:
            writer.close()

    def _compare(self, place, kind, text):
        self.ended[kind] += 1
        if self.references is None:
            return
        want = self.references[place]
        if not (want.startswith(text) if kind == CANCEL else want == text):
            self.wrong.append((place, kind, text, want))


class Sleepy:
    """A reader that pauses before each read."""

    def __init__(self, reader, rng):
        self._reader, self._rng = reader, rng

    async def readline(self):
        if self._rng.random() < 0.2:
            await asyncio.sleep(0.1 * self._rng.random())
        return await self._reader.readline()

    async def readexactly(self, count):
        return await self._reader.readexactly(count)


def health(port, seconds):
    """Milliseconds of /health, asked every 50 ms over one connection."""
    link, taken, end = http.client.HTTPConnection("127.0.0.1", port, timeout=30), [], time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        link.request("GET", "/health")
        answer = link.getresponse()
        answer.read()
        assert answer.status == 200
        taken.append(1e3 * (time.perf_counter() - start))
        time.sleep(0.05)
    return taken


if __name__ == "__main__":
    port, what, number = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    if what == "health":
        print(json.dumps(health(port, float(number))))
    else:
        asyncio.run(Crowd(port, list(cases(40)), seed=int(number)).run(int(what), 1e9))
