"""200 streams for some minutes with cancels, slow readers and killed clients; then everything must be given back.

python tests/bench/soak.py BUILD [--minutes 5] [--streams 200] [--threads 1] [--health-ms 100]
At last SIGTERM amid streams, and SIGKILL amid the next server's load; both servers after find the prefixes of before.
Prints what was measured as JSON; the exit code is 1 when a check failed. Memory is compared with a first look after
a fifth of the time, when the caches are full.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from soak_clients import Crowd, cases
from soak_end import LONG, STREAMS, drained, killed, reused

HERE = Path(__file__).parent
KILLED = 8  # streams of a client process that is killed
GROWTH, SLACK = 1.05, 20e6


class Child:
    """The server's process."""

    def __init__(self, build, threads, store):
        command = [sys.executable, str(HERE / "soak_server.py"), str(build), str(threads), str(store)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = json.loads(self.process.stdout.readline())["port"]
        end = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert time.monotonic() < end, "the server does not listen"
            time.sleep(0.1)

    def held(self):
        """What it holds now."""
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def idle(self, patience=60.0):
        """What it holds once nothing runs and connections are closed, or after `patience` seconds."""
        end = time.monotonic() + patience
        while True:
            found = self.held()
            if not (found["unfinished"] or found["live"]) or time.monotonic() > end:
                time.sleep(1.0)
                return self.held()
            time.sleep(0.1)

    def end(self):
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return None


class Victims:
    """Client processes that are killed at random times and replaced."""

    def __init__(self, port, count):
        self._port, self._rng, self.killed = port, random.Random(1), 0
        self._processes = [self._start(number) for number in range(count)]

    def _start(self, number):
        command = [sys.executable, str(HERE / "soak_clients.py"), str(self._port), str(KILLED), str(number)]
        return subprocess.Popen(command)

    async def run(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._processes:
            await asyncio.sleep(min(3 + 4 * self._rng.random(), max(0.0, end - time.monotonic())))
            place = self._rng.randrange(len(self._processes))
            self._kill(self._processes[place])
            self._processes[place] = self._start(self.killed)

    def _kill(self, process):
        process.kill()
        process.wait()
        self.killed += 1

    def end(self):
        for process in self._processes:
            self._kill(process)


async def memory(child, seconds):
    """Resident megabytes of the server, ten times on the way."""
    found = []
    for _ in range(10):
        await asyncio.sleep(seconds / 10)
        found.append(round((await asyncio.to_thread(child.held))["rss"] / 1e6, 1))
    return found


async def load_for(child, crowd, streams, seconds):
    """The whole load for some seconds: milliseconds of /health, megabytes of memory, how many clients were killed."""
    watcher = subprocess.Popen([sys.executable, str(HERE / "soak_clients.py"), str(child.port), "health", str(seconds)],
                               stdout=subprocess.PIPE, text=True)
    processes = streams // 5 // KILLED
    victims = Victims(child.port, processes)
    try:
        load = crowd.run(streams - processes * KILLED, seconds), victims.run(seconds)
        megabytes, *_ = await asyncio.gather(memory(child, seconds), *load)
    finally:
        victims.end()
    return json.loads(await asyncio.to_thread(lambda: watcher.communicate()[0])), megabytes, victims.killed


async def endings(start):
    """What SIGTERM and SIGKILL did to a server each, and what the next one found; `start` starts one."""
    bodies = [{**body, "max_tokens": LONG} for body in cases(STREAMS, seed=1)]
    child = start()
    try:
        alone = Crowd(child.port, bodies)
        references = [await alone.ask(body) for body in bodies]
        result = {"drained": await drained(child, bodies, references)}
        child = start()
        result["after_sigterm"] = await reused(child, bodies, references)
        await killed(child, bodies, 3.0)
        child = start()
        result["after_sigkill"] = await reused(child, bodies, references)
        return {**result, "code": child.end()}
    finally:
        child.process.kill()


async def soak(child, streams, seconds, count):
    """Everything that was measured."""
    bodies = list(cases(count))
    alone = Crowd(child.port, bodies)
    references = [await alone.ask(body) for body in bodies]
    start = child.idle()
    crowd = Crowd(child.port, bodies, references, seed=2)
    await load_for(child, crowd, streams, seconds / 5)
    warm = child.idle()
    latencies, megabytes, killed = await load_for(child, crowd, streams, 4 * seconds / 5)
    end = child.idle()
    latencies.sort()
    took = sorted(crowd.took)
    return {"streams": streams, "seconds": seconds, "ended": dict(crowd.ended), "clients_killed": killed,
            "wrong": len(crowd.wrong), "examples": crowd.wrong[:2], "start": start, "warm": warm, "end": end,
            "rss_mb": megabytes,
            "plain_s": {"p50": round(took[len(took) // 2], 2), "max": round(took[-1], 2)},
            "health_ms": {f"p{p}": round(latencies[len(latencies) * p // 100], 1) for p in (50, 90, 99)},
            "health_max_ms": round(latencies[-1], 1)}


def faults(result, code, health_ms):
    """What is not as it must be."""
    start, end = result["start"], result["end"]
    drain, found = result["endings"]["drained"], [result["endings"][f"after_{name}"] for name in ("sigterm", "sigkill")]
    failed = sum(count for kind, count in result["ended"].items() if kind == "hung" or kind.startswith("failed"))
    checks = [
        (result["wrong"] == 0, f"{result['wrong']} wrong streams"), (failed == 0, f"{failed} hung or failed"),
        (result["ended"].get("plain", 0) > 0, "nothing was read to its end"),
        (end["integrity"] == "ok", end["integrity"]), (end["unfinished"] == end["live"] == 0, "requests are left"),
        (end["slots_used"] == start["slots_used"], "state slots are left"),
        (end["tasks"] <= start["tasks"], f"tasks: {start['tasks']} -> {end['tasks']}"),
        (end["fds"] <= start["fds"], f"open files: {start['fds']} -> {end['fds']}"),
        (end["threads"] <= result["warm"]["threads"], f"threads: {result['warm']['threads']} -> {end['threads']}"),
        (end["rss"] <= GROWTH * result["warm"]["rss"] + SLACK, f"memory: {result['warm']['rss']} -> {end['rss']}"),
        (result["health_ms"]["p99"] <= health_ms, f"/health p99 {result['health_ms']['p99']} ms"),
        (code == 0, f"the exit code after SIGTERM is {code}"),
        (drain["running"] == drain["whole"] == STREAMS and drain["code"] == 0 and 200 not in drain["refused"],
         f"SIGTERM amid streams: {drain}"),
        (all(f["wrong"] == 0 and f["cached"] > 0.3 and f["integrity"] == "ok" for f in found), f"store: {found}")]
    return [text for fine, text in checks if not fine]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("build", type=Path)
    p.add_argument("--minutes", type=float, default=5.0)
    p.add_argument("--streams", type=int, default=200)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--cases", type=int, default=40, help="different requests")
    p.add_argument("--health-ms", type=float, default=100.0, help="most for the 99th percentile of /health")
    arguments = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as store:
        child = Child(arguments.build, arguments.threads, store)
        try:
            result = asyncio.run(soak(child, arguments.streams, 60 * arguments.minutes, arguments.cases))
            code = child.end()
        finally:
            child.process.kill()
        result["endings"] = asyncio.run(endings(lambda: Child(arguments.build, arguments.threads, store)))
    found = faults(result, code, arguments.health_ms)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps({**result, "machine": machine, "date": time.strftime("%Y-%m-%d"), "faults": found}, indent=1))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
