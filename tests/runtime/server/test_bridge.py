"""Between asyncio and the engine: cancelling, queue limit, deadlines, draining, failures, mixing."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import httpx
import pytest

CHAT = "/v1/chat/completions"
LONG = "one two three four five six seven eight nine ten " * 40


def body(text="hello", **fields):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 400, **fields}


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def raw_request(server, fields):
    """A request over a bare socket, which can be cut at any time."""
    data = json.dumps(fields).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request_within_a_step(serve, stream):
    server = serve(LONG, delay=0.05)
    connection = raw_request(server, body(stream=stream))
    until(lambda: server.engine.steps >= 3)
    connection.close()
    left_at = server.engine.steps
    until(lambda: server.engine.aborted)
    assert server.engine.aborted[0][1] <= left_at + 1
    until(lambda: not server.engine.unfinished and not server.service.bridge.live)


def test_a_client_that_leaves_while_waiting_never_runs(serve):
    server = serve(LONG, delay=0.01, slots=1)
    first = raw_request(server, body("first", stream=True))
    until(lambda: server.engine.unfinished == 1)
    second = raw_request(server, body("second"))
    until(lambda: server.engine.unfinished == 2)
    second.close()
    until(lambda: server.engine.unfinished == 1)
    first.close()
    until(lambda: not server.service.bridge.live)


def test_too_many_requests(serve, post):
    server = serve(LONG, delay=0.01, slots=1, max_queued=1)
    held = [raw_request(server, body(stream=True)) for _ in range(2)]
    until(lambda: server.service.bridge.live == 2)
    refused = post(server, CHAT, body())
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "overloaded"
    refused = post(server, "/v1/messages", {"model": "tiny", **body()})
    assert refused.status_code == 503 and refused.json()["error"]["type"] == "overloaded_error"
    for connection in held:
        connection.close()
    until(lambda: not server.service.bridge.live)
    assert post(server, CHAT, body(n=3)).status_code == 503
    assert post(server, CHAT, body(max_tokens=3)).status_code == 200


def test_deadlines(serve, post):
    server = serve(LONG, delay=0.02, request_timeout=0.2)
    late = post(server, CHAT, body())
    assert late.status_code == 504 and late.json()["error"]["code"] == "request_timeout"
    streamed = post(server, CHAT, body(stream=True))
    assert streamed.status_code == 200 and "request_timeout" in streamed.text
    assert streamed.text.endswith("data: [DONE]\n\n")
    until(lambda: not server.engine.unfinished)


def test_a_quiet_stream_is_kept_alive(serve, monkeypatch):
    monkeypatch.setattr("qcn_compile.runtime.server.sse.PING_SECONDS", 0.1)
    server = serve("done", delay=0.35)
    with httpx.stream("POST", server.url + CHAT, json=body(stream=True)) as response:
        text = "".join(response.iter_text())
    assert text.count(": waiting\n\n") >= 2 and '"content":"' in text and text.endswith("data: [DONE]\n\n")


def test_draining_lets_requests_end(serve, post):
    server = serve("one two three four", delay=0.05)
    held = raw_request(server, body())
    until(lambda: server.engine.unfinished)
    drained = asyncio.run_coroutine_threadsafe(server.service.bridge.drain(10), server.loop)
    until(lambda: server.service.bridge.draining)
    assert post(server, CHAT, body()).status_code == 503
    assert httpx.get(server.url + "/health").json() == {"status": "draining"}
    drained.result(10)
    held.settimeout(5)
    answer = b""
    while b'"content":"one two three four"' not in answer:
        piece = held.recv(65536)
        assert piece, answer
        answer += piece
    held.close()


def test_draining_ends_requests_that_take_too_long(serve):
    server = serve(LONG, delay=0.05)
    held = raw_request(server, body())
    until(lambda: server.engine.unfinished)
    asyncio.run_coroutine_threadsafe(server.service.bridge.drain(0.1), server.loop).result(10)
    held.settimeout(5)
    assert b"503" in held.recv(65536)
    held.close()
    until(lambda: not server.engine.unfinished)


def test_an_engine_that_fails_ends_everything(serve, post):
    server = serve(LONG, delay=0.02, fail_at=5)
    failed = []
    server.call(lambda: setattr(server.service.bridge, "on_failure", lambda: failed.append(1)))
    connections = [raw_request(server, body(stream=stream)) for stream in (True, False)]
    until(lambda: failed)
    for connection in connections:
        connection.settimeout(5)
        text = b""
        while b"moe_experts" not in text:
            piece = connection.recv(65536)
            assert piece, text
            text += piece
        connection.close()
    assert post(server, CHAT, body()).status_code == 500
    assert httpx.get(server.url + "/health").status_code == 503


def test_64_streams_do_not_mix(serve):
    server = serve(lambda prompt, params: f"answer {params.seed} " * 12, slots=64)

    async def one(client, seed):
        text = ""
        async with client.stream("POST", server.url + CHAT, json=body(stream=True, seed=seed)) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    text += choices[0]["delta"].get("content", "")
        assert text == f"answer {seed} " * 12

    async def all_of_them():
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=64)) as client:
            await asyncio.gather(*(one(client, seed) for seed in range(64)))

    asyncio.run(all_of_them())
    assert not server.service.bridge.live and not server.engine.unfinished


def test_a_slow_reader_gets_everything(serve):
    server = serve("0123456789 " * 300)
    connection = raw_request(server, body(stream=True, max_tokens=4000))
    connection.settimeout(5)
    until(lambda: server.engine.seen and not server.engine.unfinished)
    data = b""
    while b"[DONE]" not in data:
        data += connection.recv(4096)
    pieces = [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: {")]
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in pieces) == "0123456789 " * 300
    connection.close()
