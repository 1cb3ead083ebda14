"""What HTTP streaming adds to a token of one stream: qcn-run's server beside the engine alone, in turns.

python tests/bench/http_ratio.py BUILD [rounds] [tokens]
Both run in a process of their own with one compute thread; the client is a third process, so two free cores are needed.
Prints medians in microseconds a token, and that of the rounds' ratios, as both sides of a round met the same moment.
"""

from __future__ import annotations

import json
import re
import socket
import statistics
import subprocess
import sys
import time

PROMPT = "def fib(n):\n" * 12


def post(port, tokens):
    """Seconds a token between the first and the last event of one streamed answer."""
    body = json.dumps({"prompt": PROMPT, "stream": True, "max_tokens": tokens, "temperature": 0,
                       "ignore_eos": True}).encode()
    times, rest = [], b""
    with socket.create_connection(("127.0.0.1", port)) as link:
        link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        while b"[DONE]" not in rest:
            piece = link.recv(65536)
            assert piece, rest
            times += [time.perf_counter()] * piece.count(b"data: {")
            rest = (rest + piece)[-64:]
    assert 2 <= len(times) <= tokens + 1, len(times)  # an event holds several tokens when the client lags
    return (times[-1] - times[0]) / (tokens - 1)


ENGINE = """
import sys, time
from qcn_compile.runtime.loaded import load
with load(sys.argv[1], threads=1, max_running_requests=16) as model:
    for line in sys.stdin:
        count, times = int(line), []
        for output in model.generate(sys.argv[2], temperature=0, max_tokens=count, ignore_eos=True):
            times.append(time.perf_counter())
        print((times[-1] - times[0]) / (len(times) - 1), flush=True)
"""


class Engine:
    """The engine alone: no server, nothing but its loop."""

    def __init__(self, build):
        self.process = subprocess.Popen([sys.executable, "-c", ENGINE, build, PROMPT], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def ask(self, tokens):
        self.process.stdin.write(f"{tokens}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main(build, rounds=60, tokens=200):
    server = subprocess.Popen([sys.executable, "-m", "qcn_compile.runtime.cli", build, "--port", "0", "--threads", "1"],
                              stderr=subprocess.PIPE, text=True)
    engine = Engine(build)
    try:
        port = next(int(m[1]) for line in server.stderr if (m := re.search(r"serving .* at http://[^:]+:(\d+)", line)))
        found = {"engine": [], "http": []}
        for number in range(rounds + 1):
            for name, ask in (("engine", engine.ask), ("http", lambda count: post(port, count))):
                took = ask(tokens)
                if number:  # the first is for warming up
                    found[name].append(1e6 * took)
        for name, times in found.items():
            print(f"{name:7} least {min(times):.0f}, median {statistics.median(times):.0f} us a token")
        ratios = sorted(http / engine for http, engine in zip(found["http"], found["engine"], strict=True))
        quarter = len(ratios) // 4
        print(f"ratio   median {statistics.median(ratios):.3f} of {rounds} rounds, the middle half "
              f"{ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}")
    finally:
        server.terminate()
        engine.process.stdin.close()
        server.wait(20)
        engine.process.wait(20)


if __name__ == "__main__":
    main(sys.argv[1], *(int(text) for text in sys.argv[2:]))
