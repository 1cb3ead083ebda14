"""The server under soak: as `qcn-run --port`, and each line on stdin is answered by what it holds right now.

python tests/bench/soak_server.py BUILD THREADS STORE
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
from collections import Counter
from pathlib import Path

from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.server.config import ServerConfig
from qcn_compile.runtime.server.launch import Server, listen, run
from qcn_compile.runtime.server.service import Service

ARENA, ARENA_PART = 64 << 20, 1 << 20  # malloc's arenas of threads
SLOTS, CONTEXT = 64, 2048
CACHE_BYTES, HOST_BYTES = 60_000_000, 16_000_000  # small: all of it was used before the first look at memory
STORE_BYTES = 300_000_000  # of files


def resident():
    """Resident megabytes of this process by what they are: its heap, files, caches and weights (large), the rest."""
    parts, kind = Counter(), "other"
    with open("/proc/self/smaps") as file:
        for line in file:
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                low, high = (int(end, 16) for end in words[0].split("-"))
                name = words[5] if len(words) > 5 else ""
                kind = "heap" if name == "[heap]" else "files" if name.startswith("/") else (
                    "arenas" if high - low == ARENA else "large" if high - low > 4 * ARENA_PART else "other")
            elif words[0] == "Rss:":
                parts[kind] += int(words[1]) / 1e3
    return {name: round(size, 1) for name, size in sorted(parts.items())}


def held(model, service):
    """What is in use, and whether every page and slot has exactly its owners."""
    engine = model.engine
    try:
        model.check_integrity()
        integrity = "ok"
    except AssertionError as error:
        integrity = str(error)
    with open("/proc/self/statm") as file:
        rss = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"integrity": integrity, "unfinished": engine.unfinished, "live": service.bridge.live,
            "slots_used": engine.slots.total - engine.slots.free, "pages_used": engine.pages.used, "rss": rss,
            "parts": resident(), "fds": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}


def answer(model, service, server):
    """Look from the engine's thread, between two steps; tasks are counted on the event loop."""
    for _ in sys.stdin:
        found, done = {}, threading.Event()
        service.bridge._commands.put(lambda found=found, done=done: (found.update(held(model, service)), done.set()))
        done.wait(30)
        counted = threading.Event()
        service.bridge._loop.call_soon_threadsafe(
            lambda found=found, counted=counted: (found.update(tasks=len(asyncio.all_tasks())), counted.set()))
        counted.wait(30)
        print(json.dumps(found), flush=True)


def main(build, threads, store):
    prefix = PrefixOptions(host_bytes=HOST_BYTES, store=store, store_bytes=STORE_BYTES)
    with listen("127.0.0.1", 0) as listener, load(
            build, context_length=CONTEXT, threads=threads, max_running_requests=SLOTS, cache_memory=CACHE_BYTES,
            prefix=prefix) as model:
        service = Service.of(model, ServerConfig(("soak",)))
        server = Server(service, listener)
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        threading.Thread(target=answer, args=(model, service, server), daemon=True).start()
        return run(server)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
