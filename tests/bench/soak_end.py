"""How a server under load ends, and what the one after it finds: SIGTERM drains, SIGKILL leaves a usable prefix store.

Run by tests/bench/soak.py on its server, which holds its prefixes in files.
"""

from __future__ import annotations

import asyncio
import random
import signal

from soak_clients import Crowd

from qcn_compile.runtime.bench.client import HttpError

STREAMS = 24  # that run when the signal comes
LONG = 120  # tokens of each at least, so that none is at its end by then


async def drained(child, bodies, references):
    """SIGTERM while streams run: how many came whole and right, how a new request was refused, the exit code."""
    crowd, begun = Crowd(child.port, bodies), []
    streams = [asyncio.create_task(_read(crowd, place, bodies[place], begun)) for place in range(STREAMS)]
    while len(begun) < STREAMS:
        await asyncio.sleep(0.02)
    running = sum(not stream.done() for stream in streams)
    child.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.05)
    refused = []
    for path in ("/v1/chat/completions", "/health"):
        try:
            async with crowd.server.request("POST" if path.startswith("/v1") else "GET", path, bodies[0]) as answer:
                refused.append(answer.status)
        except OSError:
            refused.append(0)  # it had ended before
    texts = await asyncio.gather(*streams, return_exceptions=True)
    code = await asyncio.to_thread(child.process.wait, 40)
    whole = sum(text == references[place] for place, text in enumerate(texts))
    return {"running": running, "whole": whole, "refused": refused, "code": code}


async def _read(crowd, place, body, begun):
    async with crowd.server.request("POST", "/v1/chat/completions", body) as answer:
        await answer.check()
        text = ""
        async for event in answer.events():
            if "error" in event:
                raise HttpError("error event", str(event["error"]))
            begun.append(place) if not text and event["choices"][0]["delta"].get("content") else None
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    return text


async def reused(child, bodies, references):
    """Each request once: how many answers are wrong, and what share of their prompts was in the store."""
    crowd, wrong, cached, prompts = Crowd(child.port, bodies), 0, 0, 0
    for body, want in zip(bodies, references, strict=True):
        whole = await crowd.server.json("POST", "/v1/chat/completions", {**body, "stream": False})
        wrong += whole["choices"][0]["message"]["content"] != want
        prompts += whole["usage"]["prompt_tokens"]
        cached += (whole["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    held = child.idle()
    return {"wrong": wrong, "cached": round(cached / prompts, 3), "integrity": held["integrity"]}


async def killed(child, bodies, seconds):
    """SIGKILL amid the load of 60 streams."""
    crowd = Crowd(child.port, bodies, seed=5)
    load = asyncio.create_task(crowd.run(60, seconds + 30))
    await asyncio.sleep(seconds * (0.8 + 0.4 * random.Random(3).random()))
    child.process.kill()
    child.process.wait()
    load.cancel()
    await asyncio.gather(load, return_exceptions=True)
