"""The whole stack: HTTP, engine and the bundled model's compiled kernels."""

from __future__ import annotations

import asyncio
import json
import re
import time

import httpx
import pytest
from anthropic import Anthropic
from openai import OpenAI
from test_chat_api import TOOLS

CODE = [{"role": "user", "content": "Write a function that adds two numbers."}]


def client(real):
    return OpenAI(base_url=real.url + "/v1", api_key="EMPTY", max_retries=0)


def ask(real, **fields):
    return client(real).chat.completions.create(**{"model": "tiny", "messages": CODE, "max_tokens": 60, **fields})


def free(real):
    return real.model.engine.unfinished == 0 and real.model.engine.pages.used == 0


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"seed": 5, "temperature": 1.0}, {"seed": 6, "n": 3}])
def test_streamed_equals_unstreamed(real, fields):
    whole = [choice.message.content for choice in ask(real, **fields).choices]
    pieces = [""] * len(whole)
    for chunk in ask(real, stream=True, **fields):
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
    assert pieces == whole and all(whole)


def test_http_equals_the_library(real, build):
    from qcn_compile.runtime.loaded import load

    served = ask(real, temperature=0).choices[0].message.content
    with load(build, threads=1, context_length=1536) as model:
        assert model.generate(CODE, max_tokens=60, temperature=0).text() == served


def test_64_streams_at_once_are_the_same_as_one_at_a_time(real):
    def body(seed):
        return {"model": "tiny", "messages": [{"role": "user", "content": f"def f{seed}():"}], "seed": seed,
                "temperature": 0.9, "max_tokens": 12, "stream": True}

    async def one(client, seed):
        response = await client.post(real.url + "/v1/chat/completions", json=body(seed))
        chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    async def run(seeds, at_once):
        limits = httpx.Limits(max_connections=at_once)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            return await asyncio.gather(*(one(client, seed) for seed in seeds))

    together = asyncio.run(run(range(64), 64))
    alone = asyncio.run(run(range(0, 64, 8), 1))
    assert together[::8] == alone and len(set(together)) > 8
    until(lambda: free(real))
    real.model.check_integrity()


def test_leaving_frees_pages(real):
    with httpx.stream("POST", real.url + "/v1/chat/completions", json={
            "messages": CODE, "stream": True, "ignore_eos": True, "max_tokens": 1400}) as response:
        for line in response.iter_lines():
            if '"content":"' in line and '"content":""' not in line:  # pages are taken by now
                break
        assert not free(real)
    until(lambda: free(real))
    real.model.check_integrity()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "read"}}])
def test_forced_calls_follow_the_schema(real, choice):
    reply = ask(real, tools=TOOLS, tool_choice=choice, seed=1, temperature=1.0, max_tokens=300).choices[0]
    assert reply.message.tool_calls, reply
    arguments = json.loads(reply.message.tool_calls[0].function.arguments)
    assert reply.message.tool_calls[0].function.name == "read"
    if reply.finish_reason == "tool_calls":
        assert isinstance(arguments["path"], str) and isinstance(arguments.get("lines", 0), int)


def prompt_tokens(message):
    return message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


def test_the_anthropic_client(real):
    """Messages whole and streamed, a forced tool and its result, as an agent would go on."""
    client = Anthropic(base_url=real.url, api_key="EMPTY", max_retries=0)
    asked = {"model": "tiny", "max_tokens": 300, "messages": CODE, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        streamed = "".join(stream.text_stream)
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens
    assert streamed == whole.content[0].text and whole.stop_reason in ("end_turn", "max_tokens")
    tool = {"name": "read", "input_schema": TOOLS[0]["function"]["parameters"]}
    called = client.messages.create(**asked, tools=[tool], tool_choice={"type": "tool", "name": "read"})
    use = called.content[-1]
    assert use.type == "tool_use" and use.name == "read" and isinstance(use.input, dict)
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "1 + 1"}]}
    history = [*CODE, {"role": "assistant", "content": called.to_dict()["content"]}, result]
    again = client.messages.create(**{**asked, "messages": history}, tools=[tool])
    assert prompt_tokens(again) > prompt_tokens(called) > prompt_tokens(whole)
    assert client.messages.count_tokens(model="tiny", messages=CODE).input_tokens == prompt_tokens(whole)


def test_a_schema_binds_the_answer(real):
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"}},
              "required": ["name", "ok"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    for seed in range(3):
        reply = ask(real, response_format=wanted, seed=seed, temperature=1.5, max_tokens=200).choices[0]
        value = json.loads(reply.message.content)
        assert reply.finish_reason == "stop" and set(value) == {"name", "ok"} and isinstance(value["ok"], bool)
    text = ask(real, extra_body={"regex": "[a-c]{3}-[0-9]{2}"}, temperature=1.5).choices[0].message.content
    assert re.fullmatch("[a-c]{3}-[0-9]{2}", text)


def test_logprobs_are_the_models(real):
    reply = client(real).completions.create(model="tiny", prompt="def f(", max_tokens=4, temperature=0, logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert "".join(logprobs.tokens) == reply.choices[0].text
    assert logprobs.token_logprobs == [max(top.values()) for top in logprobs.top_logprobs]
    assert all(value <= 0 for value in logprobs.token_logprobs)
