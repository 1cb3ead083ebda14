"""Completions, responses, Anthropic's messages and the small endpoints, with the real clients."""

from __future__ import annotations

import json

import anthropic
import httpx
import pytest
from openai import OpenAI
from test_chat_api import CALL, TOOLS, prompt_of

FLAT = [{"type": "function", **TOOLS[0]["function"]}]
ANTHROPIC = [{"name": "read", "description": "Read a file", "input_schema": TOOLS[0]["function"]["parameters"]}]
HELLO = [{"role": "user", "content": "hello"}]


def openai(server):
    return OpenAI(base_url=server.url + "/v1", api_key="EMPTY", max_retries=0)


def claude(server):
    return anthropic.Anthropic(base_url=server.url, api_key="EMPTY", max_retries=0)


def complete(server, prompt, **fields):
    return openai(server).completions.create(model="tiny", prompt=prompt, **fields)


def test_completions(serve):
    server = serve("a b c d e f g h i j k l m n o p q r s t")
    reply = complete(server, "def f():")
    assert reply.usage.completion_tokens == 16 and reply.choices[0].finish_reason == "length"
    echoed = complete(server, "def f():", echo=True, max_tokens=4)
    assert echoed.choices[0].text == "def f():" + complete(server, "def f():", max_tokens=4).choices[0].text
    streamed = complete(server, "def f():", echo=True, max_tokens=4, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == echoed.choices[0].text
    logprobs = complete(server, "x", logprobs=1, max_tokens=3).choices[0].logprobs
    assert len(logprobs.tokens) == 3 and logprobs.token_logprobs == [-0.5] * 3 and logprobs.text_offset[0] == 0


def test_prompts_of_every_kind(serve):
    server = serve(lambda prompt, params: f"{len(prompt)} tokens")
    ids = server.service.tokenizer.encode("def f(): return 1")
    for prompt, sizes in (("def f(): return 1", [len(ids)]), (ids, [len(ids)]), ([ids, [5]], [len(ids), 1]),
                          (["def f(): return 1", "x"], [len(ids), 1])):
        reply = complete(server, prompt)
        assert [choice.text for choice in reply.choices] == [f"{size} tokens" for size in sizes]
    twice = complete(server, ["x", "def f(): return 1"], n=2)
    assert [c.index for c in twice.choices] == [0, 1, 2, 3] and twice.choices[2].text == f"{len(ids)} tokens"


def test_fill_in_the_middle(serve):
    server = serve("x")
    complete(server, "def f(", suffix="return 1")
    assert prompt_of(server) == "<|fim_prefix|>def f(<|fim_suffix|>return 1<|fim_middle|>"


def test_responses(serve):
    server = serve(CALL)
    reply = openai(server).responses.create(model="tiny", input="hello", instructions="Be short.", tools=FLAT)
    assert reply.output_text == "Let me look.\n" and reply.status == "completed"
    call = reply.output[1]
    assert call.type == "function_call" and json.loads(call.arguments) == {"path": "src/a.py", "lines": 12}
    assert prompt_of(server).startswith("<|im_start|>system\nBe short.")
    again = openai(server).responses.create(model="tiny", tools=FLAT, input=[
        *HELLO, {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]},
        {"type": "function_call", "call_id": call.call_id, "name": "read", "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "data"}])
    assert again.usage.input_tokens > reply.usage.input_tokens
    seen = prompt_of(server)
    assert "Let me look.\n\n<tool_call>\n<function=read>" in seen and "<tool_response>\ndata" in seen
    short = openai(server).responses.create(model="tiny", input="hello", max_output_tokens=2)
    assert short.status == "incomplete" and short.incomplete_details.reason == "max_output_tokens"


def test_responses_streamed_equal_unstreamed(serve, thinking_tokenizer):
    text = 'hm\n</think>\n\nSo.\n<tool_call>\n{"name": "read", "arguments": {"path": "a"}}\n</tool_call>'
    server = serve(text, tokens=thinking_tokenizer)
    whole = openai(server).responses.create(model="tiny", input="hello", tools=FLAT)
    with openai(server).responses.stream(model="tiny", input="hello", tools=FLAT) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    for kind in ("response.output_item.added", "response.content_part.added", "response.output_text.delta",
                 "response.output_text.done", "response.content_part.done", "response.function_call_arguments.delta",
                 "response.function_call_arguments.done", "response.reasoning_text.delta", "response.output_item.done"):
        assert kind in kinds, kind
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output_text == whole.output_text == "So.\n"
    assert final.output[2].arguments == whole.output[2].arguments
    assert final.output[0].content[0].text == whole.output[0].content[0].text == "hm"


def test_anthropic_messages(serve):
    server = serve(CALL)
    reply = claude(server).messages.create(model="tiny", max_tokens=200, messages=HELLO, system="Be short.",
                                           tools=ANTHROPIC)
    text, call = reply.content
    assert text.text == "Let me look.\n" and call.input == {"path": "src/a.py", "lines": 12}
    assert reply.stop_reason == "tool_use" and reply.usage.output_tokens > 0
    use = {"type": "tool_use", "id": call.id, "name": "read", "input": call.input}
    claude(server).messages.create(model="tiny", max_tokens=200, tools=ANTHROPIC, messages=[
        *HELLO, {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": ""},
                                                  {"type": "text", "text": "Let me look."}, use]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "data"}]},
            {"type": "text", "text": "go on", "cache_control": {"type": "ephemeral"}}]}])
    seen = prompt_of(server)
    assert "<tool_response>\ndata\n</tool_response>" in seen and "<|im_start|>user\ngo on<|im_end|>" in seen
    stopped = claude(server).messages.create(model="tiny", max_tokens=200, messages=HELLO, stop_sequences=["look", "@"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "look")
    assert claude(server).messages.create(model="tiny", max_tokens=2, messages=HELLO).stop_reason == "max_tokens"


def test_anthropic_stream(serve, thinking_tokenizer):
    text = 'hm\n</think>\n\nSo.\n<tool_call>\n{"name": "read", "arguments": {"path": "a"}}\n</tool_call>'
    server = serve(text, tokens=thinking_tokenizer)
    fields = {"model": "tiny", "max_tokens": 200, "messages": HELLO, "tools": ANTHROPIC}
    whole = claude(server).messages.create(**fields)
    with claude(server).messages.stream(**fields) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
    assert final.content[0].thinking == whole.content[0].thinking == "hm"
    assert final.content[1].text == whole.content[1].text == "So.\n"
    assert final.content[2].input == whole.content[2].input == {"path": "a"}
    assert final.stop_reason == whole.stop_reason == "tool_use"
    assert final.usage.output_tokens == whole.usage.output_tokens
    with httpx.stream("POST", server.url + "/v1/messages", json={**fields, "stream": True}) as response:
        names = [line.removeprefix("event: ") for line in response.iter_lines() if line.startswith("event: ")]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    assert names.count("content_block_start") == names.count("content_block_stop") == 3


def test_anthropic_counts_what_it_would_read(serve):
    server = serve()
    fields = {"model": "tiny", "messages": HELLO, "tools": ANTHROPIC}
    counted = claude(server).messages.count_tokens(**fields).input_tokens
    assert counted == claude(server).messages.create(**fields, max_tokens=5).usage.input_tokens


def test_models(serve):
    server = serve()
    assert [m.id for m in openai(server).models.list()] == ["tiny"]
    assert openai(server).models.retrieve("tiny").max_model_len == 4096
    assert httpx.get(server.url + "/v1/models/none").status_code == 404


def test_any_model(serve):
    server = serve(accept_any_model=True)
    reply = openai(server).chat.completions.create(model="Qwen/Any-Thing", messages=HELLO)
    assert reply.model == "Qwen/Any-Thing"


def test_tokenize_and_back(serve, post):
    server = serve()
    reply = post(server, "/tokenize", {"prompt": "naïve <|im_end|>"}).json()
    assert reply["count"] == len(reply["tokens"]) and reply["max_model_len"] == 4096
    assert post(server, "/detokenize", {"tokens": reply["tokens"][:-1]}).json()["text"] == "naïve "
    chat = post(server, "/tokenize", {"messages": HELLO}).json()["tokens"]
    openai(server).chat.completions.create(model="tiny", messages=HELLO)
    assert server.engine.seen[-1][0] == chat


def test_metrics_and_state(serve):
    server = serve("one two three")
    reply = openai(server).chat.completions.create(model="tiny", messages=HELLO)
    text = httpx.get(server.url + "/metrics").text
    assert f"qcn_generation_tokens_total {float(reply.usage.completion_tokens)}" in text
    assert f"qcn_prompt_tokens_total {float(reply.usage.prompt_tokens)}" in text
    assert "qcn_time_to_first_token_seconds_count 1.0" in text and "qcn_requests_running 0.0" in text
    assert "qcn_inter_token_seconds_bucket" in text and "qcn_kv_usage_ratio 0.0" in text
    assert 'qcn_http_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
    state = httpx.get(server.url + "/state").json()
    assert state["generated_tokens"] == reply.usage.completion_tokens and state["tokens_per_second"] > 0


def test_cached_tokens_are_reported(serve):
    server = serve("one two three")
    server.engine.cached = 3
    reply = openai(server).chat.completions.create(model="tiny", messages=HELLO)
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    usage = claude(server).messages.create(model="tiny", max_tokens=9, messages=HELLO).usage
    assert usage.cache_read_input_tokens == 3 and usage.input_tokens == reply.usage.prompt_tokens - 3
    assert openai(server).responses.create(model="tiny", input="x").usage.input_tokens_details.cached_tokens == 3
    assert "qcn_cached_tokens_total 9.0" in httpx.get(server.url + "/metrics").text


def test_pages_need_no_other_server(serve):
    server = serve()
    for path in ("/", "/docs"):
        page = httpx.get(server.url + path)
        assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
        assert "http://" not in page.text and "https://" not in page.text
    document = httpx.get(server.url + "/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
            "/v1/models", "/tokenize", "/detokenize", "/health", "/metrics"} <= set(document["paths"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/completions"])
def test_a_failure_inside_a_stream_is_told(serve, path):
    server = serve("one two three four five", fail_at=3)
    body = {"model": "tiny", "stream": True, "max_tokens": 50, "messages": HELLO, "input": "x", "prompt": "x"}
    with httpx.stream("POST", server.url + path, json=body, timeout=10) as response:
        text = "".join(response.iter_text())
    assert "kernel moe_experts failed" in text and response.status_code == 200
    assert httpx.post(server.url + path, json={**body, "stream": False}).status_code == 500
    assert httpx.get(server.url + "/health").json() == {"status": "failed"}
