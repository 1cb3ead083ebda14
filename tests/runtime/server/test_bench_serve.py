"""qcn-bench serve: what it sends, what it measures, and that it always ends."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from itertools import islice, pairwise

import pytest
from test_process import running

from qcn_compile.errors import UsageError
from qcn_compile.runtime.bench.cli import main
from qcn_compile.runtime.bench.client import HttpError, Server
from qcn_compile.runtime.bench.conversation import Chat, Reply
from qcn_compile.runtime.bench.report import percentile, spread
from qcn_compile.runtime.bench.workload import Texts, Turn, poisson, read_trace, synthetic


@pytest.fixture
def bench(capsys):
    """bench(url, *flags) -> the JSON result; the exit code must be as told."""
    def go(url, *flags, code=0):
        assert main(["serve", "--url", url, "--json", *map(str, flags)]) == code
        return json.loads(capsys.readouterr().out)
    return go


def test_counts_and_times(serve, bench):
    server = serve(" value" * 200, delay=0.005)
    result = bench(server.url, "--limit", 9, "--concurrency", 3, "--input-tokens", 200, "--output-tokens", 12)
    assert result["requests"] == {"completed": 9, "failed": 0, "errors": {}, "not_sent": {}, "most_sessions_at_once": 3}
    assert result["tokens"]["output"] == 9 * 12 and 9 * 180 < result["tokens"]["prompt"] < 9 * 240
    assert 4 < result["itl_ms"]["p50"] < 100 and result["e2e_ms"]["p50"] > 55
    assert result["ttft_ms"]["p50"] < result["e2e_ms"]["p50"]
    assert result["throughput"]["output_tokens_per_s"] == pytest.approx(108 / result["seconds"])
    assert all(params.ignore_eos and params.max_tokens == 12 for _, params in server.engine.seen)
    assert len({tuple(prompt) for prompt, _ in server.engine.seen}) == 9
    assert result["prefix_cache"]["computed_per_new"] == 1


def test_the_same_seed_sends_the_same(serve, bench):
    server = serve("x")
    for seed in (1, 1, 2):
        bench(server.url, "--limit", 2, "--concurrency", 1, "--spread", 0.5, "--seed", seed)
    prompts = [prompt for prompt, _ in server.engine.seen]
    assert prompts[:2] == prompts[2:4] != prompts[4:]


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_sessions_grow(serve, bench, api):
    server = serve("the answer")
    server.engine.cached = 7
    result = bench(server.url, "--limit", 2, "--turns", 3, "--input-tokens", 100, "--turn-tokens", 30, "--api", api,
                   "--concurrency", 1)
    lengths = [len(prompt) for prompt, _ in server.engine.seen]
    assert lengths[0] < lengths[1] < lengths[2] and lengths[3] < lengths[2]
    start = server.engine.seen[0][0][:-8]
    assert all(prompt[:len(start)] == start for prompt, _ in server.engine.seen[:3])
    assert not any(params.ignore_eos for _, params in server.engine.seen)
    cache = result["prefix_cache"]
    assert cache["cached_tokens"] == 6 * 7 and cache["hit_rate"] == 42 / sum(lengths)
    assert cache["new_tokens"] < lengths[2] + lengths[5] < cache["computed_tokens"]


def test_tool_calls_are_answered_by_tools(serve, bench):
    call = "<tool_call>\n<function=run>\n<parameter=command>\nls\n</parameter>\n</function>\n</tool_call>"
    server = serve(call)
    bench(server.url, "--limit", 1, "--turns", 2, "--output-tokens", 100)
    second = server.service.tokenizer.decode(server.engine.seen[1][0])
    assert "<function=run>" in second and "<tool_response>" in second


def test_rejected_and_failed_requests_are_counted(serve, bench):
    full = serve("x" * 50, slots=1, delay=0.02, max_queued=0)
    errors = bench(full.url, "--limit", 4, "--concurrency", 4)["requests"]
    assert errors["completed"] >= 1 and errors["errors"]["HTTP 503"] == errors["failed"] >= 1
    broken = serve("abc " * 40, fail_at=5)
    errors = bench(broken.url, "--limit", 1, "--turns", 4, code=1)["requests"]
    assert errors["failed"] == 1 and errors["not_sent"] == {"after a failed turn": 3}


def test_it_ends_in_time(serve, bench):
    slow = serve("x " * 3000, delay=0.05, context_length=8192)
    started = time.perf_counter()
    result = bench(slow.url, "--limit", 50, "--concurrency", 2, "--output-tokens", 3000, "--timeout", 0.5, "--duration",
                   0.8, code=1)
    assert time.perf_counter() - started < 3
    assert result["requests"]["errors"] == {"timeout": 4} and result["requests"]["not_sent"] == {"no time left": 46}
    assert slow.engine.aborted


def test_too_long_for_the_context_is_not_sent(serve, bench):
    server = serve("x", context_length=700)
    result = bench(server.url, "--limit", 1, "--turns", 9, "--turn-tokens", 100, "--input-tokens", 100)
    assert result["requests"]["failed"] == 0 and result["requests"]["not_sent"]["longer than the context"] > 2


def test_poisson_arrivals(serve, bench):
    starts = [s.start for s in islice(poisson(synthetic(1, 1, 1, 1, 0, 0), 5.0, 3), 4000)]
    gaps = [b - a for a, b in pairwise(starts)]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.1) == pytest.approx(statistics.stdev(gaps), rel=0.1)
    result = bench(serve("x").url, "--rate", 20, "--limit", 10)
    assert result["requests"]["completed"] == 10 and 0.1 < result["seconds"] < 3


AZURE = ("TIMESTAMP,ContextTokens,GeneratedTokens\n"
         "2023-11-16 18:17:03.9799600,480,10\n2023-11-16 18:17:04.9799600,34,8\n")
MOONCAKE = "".join(json.dumps({"timestamp": at, "input_length": 1000, "output_length": 5, "hash_ids": ids}) + "\n"
                   for at, ids in ((500, [0, 1]), (1500, [0, 2])))
AIPERF = "".join(json.dumps(row) + "\n" for row in (
    {"session_id": "a", "input_length": 1100, "output_length": 8, "hash_ids": [0, 1, 9], "timestamp": 0.0},
    {"session_id": "a", "input_length": 60, "output_length": 9, "hash_ids": [20], "delay": 2000.0},
    {"session_id": "b", "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 10], "timestamp": 0.0}))


def test_traces(tmp_path):
    def read(text, limit=9, time_scale=1.0, token_scale=1.0):
        path = tmp_path / "trace"
        path.write_text(text)
        return read_trace(path, limit, time_scale, token_scale)

    first, second = read(AZURE)
    assert (first.start, second.start, second.turns) == (0.0, pytest.approx(1.0), (Turn(34, 8),))
    first, second = read(MOONCAKE, time_scale=0.5)
    assert second.start == 0.5 and second.turns == (Turn(1000, 5, 0.0, (0, 2)),)
    texts = Texts(1.0, 0)
    one, two = texts.of(first.turns[0], "1").split(), texts.of(second.turns[0], "2").split()
    assert len(one) == len(two) == 1000 and one[:512] == two[:512] and one[512:] != two[512:]
    sessions = read(AIPERF, time_scale=2.0, token_scale=0.1)
    assert [len(s.turns) for s in sessions] == [2, 1]
    assert sessions[0].turns == (Turn(110, 1, 0.0, (0, 1, 9), 51), Turn(6, 1, 4.0, (), 51))
    assert len(read(AIPERF, limit=1)) == 1
    for wrong in ("", "{}\n", "nonsense\n", "TIMESTAMP,x\n1,2\n", '{"input_length": -1, "output_length": 1}\n'):
        with pytest.raises(UsageError, match="trace"):
            read(wrong)


def test_replay(serve, bench, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(AIPERF)
    server = serve("fine")
    result = bench(server.url, "--trace", path, "--time-scale", 0.1, "--concurrency", 1)
    assert result["requests"]["completed"] == 3 and result["seconds"] > 0.2
    cache, prompts = result["prefix_cache"], [len(prompt) for prompt, _ in server.engine.seen]
    assert cache["new_tokens"] < sum(prompts) - prompts[0] - 900  # the second session's blocks were sent before


@pytest.mark.parametrize(("flags", "words"), [
    (["--url", "ftp://x"], "give http://HOST:PORT"), (["--url", "http://x:99999"], "port must be"), ([], "--url"),
    (["--url", "x", "--limit", "0"], "--limit 0"), (["--url", "x", "--rate", "0"], "--rate 0"),
    (["--url", "x", "--spread", "1"], "--spread 1"), (["--url", "x", "--trace", "/nowhere"], "/nowhere"),
    (["--url", "x", "--trace", "f", "--rate", "1"], "exclude"), (["--url", "http://127.0.0.1:9"], "does not answer"),
])
def test_mistakes_give_one_line(capsys, flags, words):
    assert main(["serve", *flags]) in (2, 7)
    error = capsys.readouterr().err
    assert error.startswith("qcn-bench: ") and words in error and error.count("\n") == 1


def answered(*pieces):
    """The events of a server that says `pieces` with pauses between."""
    async def run():
        async def handle(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            writer.close()

        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            there = Server.at(f"127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/")
            async with there.request("POST", "/x", {}) as answer:
                await answer.check()
                return [event async for event in answer.events()]

    return asyncio.run(run())


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def test_events_in_any_pieces():
    text = b'data: {"a": 1}\r\n\r\n: waiting\n\ndata: {"b": "\xc3\xa4"}\n\ndata: [DONE]\n\n'
    for size in (1, 7, 1000):
        chunks = [b"%x\r\n%b\r\n" % (len(text[i:i + size]), text[i:i + size]) for i in range(0, len(text), size)]
        assert answered(HEAD + b"".join(chunks) + b"0\r\n\r\n") == [{"a": 1}, {"b": "ä"}]
    assert answered(b"HTTP/1.1 200 OK\r\n\r\n", text[:20], text[20:]) == [{"a": 1}, {"b": "ä"}]


@pytest.mark.parametrize(("pieces", "error"), [
    ((b"",), ConnectionError), ((HEAD, b"5\r\ndat"), ConnectionError), ((HEAD, b"zz\r\n"), ConnectionError),
    ((HEAD, b"0\r\n\r\n"), ConnectionError), ((b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}",), HttpError),
])
def test_broken_answers(pieces, error):
    with pytest.raises(error):
        answered(*pieces)


def test_percentiles():
    assert [percentile(list(range(1, 101)), p) for p in (1, 50, 90, 99)] == [1, 50, 90, 99]
    assert percentile([5.0], 50) == 5 and spread([]) is None
    assert spread([3, 1, 2]) == {"mean": 2, "p50": 2, "p90": 3, "p99": 3, "max": 3}


def test_streamed_calls_are_put_together():
    reply, talk = Reply(), Chat(True)
    for delta in ({"content": "a"}, {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "run"}}]},
                  {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}):
        assert reply.add(delta)
    assert not reply.add({"role": "assistant", "content": ""})
    talk.ask("go")
    talk.answered(reply)
    assert talk.ask("done")["messages"][1:] == [
        {"role": "assistant", "content": "a", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "run", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "done"}]


def test_sessions_on_the_real_model_compute_only_what_is_new(build, bench):
    with running(build, "--cache-memory", "0.5") as (_, url):
        result = bench(url, "--turns", 6, "--limit", 3, "--input-tokens", 600, "--turn-tokens", 150, "--concurrency", 2)
        assert result["requests"]["completed"] == 18 and result["requests"]["failed"] == 0
        assert result["prefix_cache"]["hit_rate"] > 0.6 and result["prefix_cache"]["computed_per_new"] <= 1.2
    with running(build, "--disable-radix-cache") as (_, url):
        result = bench(url, "--turns", 4, "--limit", 1, "--input-tokens", 600)
        assert result["prefix_cache"]["cached_tokens"] == 0 and result["prefix_cache"]["computed_per_new"] > 1.5
