"""Prefix cache, drafts, chunked prefill and batching, all on behind HTTP: each answer is the plain model's alone."""

from __future__ import annotations

import asyncio

import pytest

from qcn_compile.runtime.bench.client import Server
from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.server.config import ServerConfig
from qcn_compile.runtime.server.service import Service
from qcn_compile.runtime.speculation.options import SpeculationOptions
from tests.e2e.test_drafting import CODE
from tests.runtime.server.serving import LiveServer

TURNS = ["Write a stack:\n" + CODE, "Add a docstring to every method:\n" + CODE, "x = [1, 2, 3]\n" * 20]
HOW = [{"temperature": 0}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.0, "seed": 4, "top_p": 0.9}]


def conversations(plain):
    """(messages, sampling, the plain model's answer); each conversation goes on from the one before it."""
    for how in HOW:
        messages = []
        for turn in TURNS:
            messages = [*messages, {"role": "user", "content": turn}]
            text = plain.generate(messages, max_tokens=40, **how).text()
            yield messages, how, text
            messages = [*messages, {"role": "assistant", "content": text}]


async def ask(server, messages, how, stream):
    body = {"messages": messages, "max_tokens": 40, "stream": stream, **how}
    if not stream:
        whole = await server.json("POST", "/v1/chat/completions", body)
        return whole["choices"][0]["message"]["content"]
    async with server.request("POST", "/v1/chat/completions", body) as answer:
        await answer.check()
        return "".join([event["choices"][0]["delta"].get("content") or "" async for event in answer.events()])


@pytest.mark.parametrize("options", [SpeculationOptions(4), SpeculationOptions(3, "mtp")], ids=["ngram", "mtp"])
def test_streamed_equals_unstreamed_equals_alone(options, builds, loaded):
    jobs = list(conversations(loaded("bf16")))

    async def everything(server):
        return await asyncio.gather(*(ask(server, messages, how, stream)
                                      for messages, how, _ in jobs for stream in (True, False)))

    with load(builds("mtp"), max_running_requests=3, threads=2, prefill_chunk=48, prefix=PrefixOptions(),
              speculation=options) as model:
        model.engine.speculation.times.ratio = lambda sequences: 1.0  # draft as long as anything is gained
        with LiveServer(Service.of(model, ServerConfig(("all",)))) as live:
            for _ in range(2):  # the second time from cached prefixes
                got = asyncio.run(everything(Server("127.0.0.1", live.port)))
                assert got == [text for _, _, text in jobs for _ in range(2)]
        model.check_integrity()
        assert model.engine.speculation.accepted > 40 and model.engine.prefixes.counts.hits > len(jobs)
