"""Every bad input gets its own status, names its field, and never reaches the engine."""

from __future__ import annotations

import httpx
import pytest
from fake_engine import FakeEngine
from serving import LiveServer

from qcn_compile.runtime.server.config import Limits, ServerConfig
from qcn_compile.runtime.server.service import Service

USER = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def deep(levels):
    value = {}
    for _ in range(levels):
        value = {"properties": {"a": value}, "type": "object"}
    return value


def call(arguments):
    return {"role": "assistant", "tool_calls": [{"id": "c", "type": "function",
                                                 "function": {"name": "f", "arguments": arguments}}]}


def schema(value):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}}


CHAT = [
    ({"messages": None}, "messages"), ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"), ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "odd"}]}]}, "messages[0].content[0].type"),
    ({"messages": [USER, call("{bad")]}, "messages[1].tool_calls[0].function.arguments"),
    ({"messages": [USER, call("[1]")]}, "messages[1].tool_calls[0].function.arguments"),
    ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages"),
    ({"temperature": -1}, "temperature"), ({"temperature": 3}, "temperature"), ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.5}, "top_p"), ({"top_k": -2}, "top_k"), ({"min_p": 2}, "min_p"), ({"seed": 1.5}, "seed"),
    ({"n": 0}, "n"), ({"n": 100}, "n"), ({"n": 1000}, "n"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -4}, "max_completion_tokens"), ({"max_tokens": "many"}, "max_tokens"),
    ({"frequency_penalty": 3}, "frequency_penalty"), ({"presence_penalty": -3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"stop": ["x"] * 99}, "stop"), ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"), ({"stop": 5}, "stop"), ({"stop_token_ids": [99999]}, "stop_token_ids[0]"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"), ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"stream": "yes"}, "stream"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"), ({"tools": [{"type": "web"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
    ({"tools": [TOOL] * 600}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "often"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"functions": []}, "functions"), ({"function_call": "auto"}, "function_call"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    (schema(deep(40)), "response_format.json_schema.schema"),
    (schema({"type": "object", "description": "x" * 300_000}), "response_format.json_schema.schema"),
    (schema({"type": "nonsense"}), "response_format.json_schema.schema"),
    (schema({"$ref": "#/$defs/none"}), "response_format.json_schema.schema"),
    ({"regex": "("}, "regex"), ({"ebnf": "start: ("}, "ebnf"), ({"json_schema": "{"}, "json_schema"),
    ({"regex": "a", "ebnf": 'start: "b"'}, "ebnf"), ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
]


@pytest.fixture(scope="module")
def quiet(module_server):
    yield module_server
    assert module_server.engine.seen == []


@pytest.fixture(scope="module")
def module_server(tokenizer):
    engine = FakeEngine(tokenizer, lambda prompt, params: "ok")
    service = Service(ServerConfig(("tiny",)), tokenizer, engine, vocab_size=4096, sampling={}, context_length=4096,
                      occupancy=engine.occupancy)
    with LiveServer(service) as server:
        server.engine = engine
        yield server


def error_of(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"} and set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


@pytest.mark.parametrize(("fields", "param"), CHAT, ids=lambda value: str(value)[:60])
def test_chat(quiet, post, fields, param):
    error = error_of(post(quiet, "/v1/chat/completions", {"model": "tiny", "messages": [USER], **fields}), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["code"] and error["message"]


@pytest.mark.parametrize(("path", "fields", "param"), [
    ("/v1/completions", {}, "prompt"), ("/v1/completions", {"prompt": ""}, "prompt"),
    ("/v1/completions", {"prompt": []}, "prompt"), ("/v1/completions", {"prompt": [["a"]]}, "prompt"),
    ("/v1/completions", {"prompt": [1, 99999]}, "prompt"), ("/v1/completions", {"prompt": [-1]}, "prompt"),
    ("/v1/completions", {"prompt": ["x", ""]}, "prompt[1]"), ("/v1/completions", {"prompt": ["x"] * 99}, "prompt"),
    ("/v1/completions", {"prompt": "x", "best_of": 3}, "best_of"),
    ("/v1/completions", {"prompt": "x", "echo": True, "logprobs": 1}, "logprobs"),
    ("/v1/completions", {"prompt": "x", "logprobs": 99}, "logprobs"),
    ("/v1/completions", {"prompt": "word " * 9000}, "prompt"),
    ("/v1/responses", {}, "input"), ("/v1/responses", {"input": ""}, "input"),
    ("/v1/responses", {"input": []}, "input"),
    ("/v1/responses", {"input": "x", "previous_response_id": "r"}, "previous_response_id"),
    ("/v1/responses", {"input": "x", "background": True}, "background"),
    ("/v1/responses", {"input": [{"type": "computer_call"}]}, "input[0].type"),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ("/v1/responses", {"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
    ("/v1/responses", {"input": "x", "tools": [{"type": "function"}]}, "tools[0].name"),
    ("/v1/responses", {"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
    ("/v1/responses", {"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
    ("/detokenize", {"tokens": [99999]}, "tokens[0]"), ("/detokenize", {"tokens": "abc"}, "tokens"),
])
def test_other_paths(quiet, post, path, fields, param):
    assert error_of(post(quiet, path, fields), 400)["param"] == param


@pytest.mark.parametrize(("fields", "words"), [
    ({"max_tokens": None}, "max_tokens"), ({"messages": []}, "messages"), ({"temperature": 2}, "temperature"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "images"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
    ({"tools": [{"type": "computer_20250124", "name": "computer"}]}, "tools[0].type"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"), ({"tool_choice": {"type": "any"}}, "tool_choice"),
])
def test_anthropic(quiet, post, fields, words):
    response = post(quiet, "/v1/messages", {"model": "tiny", "max_tokens": 5, "messages": [USER], **fields})
    assert response.status_code == 400
    body = response.json()
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert words in body["error"]["message"]


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b"[" * 100_000, b'{"messages":' + b"[" * 5000])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/tokenize"])
def test_bodies_that_are_no_requests(quiet, path, body):
    assert httpx.post(quiet.url + path, content=body).status_code == 400


def test_models_paths_and_methods(quiet, post):
    for path, fields in (("/v1/chat/completions", {"messages": [USER]}), ("/v1/completions", {"prompt": "x"}),
                         ("/v1/responses", {"input": "x"}), ("/tokenize", {"prompt": "x"})):
        error = error_of(post(quiet, path, {"model": "gpt-9", **fields}), 404)
        assert error["param"] == "model" and error["code"] == "model_not_found"
    assert error_of(httpx.get(quiet.url + "/v2/none"), 404)["code"] == "not_found"
    refused = httpx.get(quiet.url + "/v1/chat/completions")
    assert error_of(refused, 405)["code"] == "method_not_allowed" and refused.headers["allow"] == "POST"


def test_bodies_that_are_too_large(serve):
    server = serve(limits=Limits(body_bytes=1000))
    url = server.url + "/v1/chat/completions"
    assert error_of(httpx.post(url, content=b"x" * 1001), 413)["code"] == "request_too_large"
    assert error_of(httpx.post(url, content=(b"x" * 300 for _ in range(9))), 413)["code"] == "request_too_large"


def test_keys(serve, post):
    server = serve(api_keys=("first", "second"))
    body = {"messages": [USER]}
    refused = post(server, "/v1/chat/completions", body)
    assert error_of(refused, 401)["code"] == "invalid_api_key" and refused.headers["www-authenticate"] == "Bearer"
    for headers, status in (({"authorization": "Bearer second"}, 200), ({"x-api-key": "first"}, 200),
                            ({"authorization": "Bearer firs"}, 401), ({"authorization": "Basic first"}, 401)):
        assert post(server, "/v1/chat/completions", body, **headers).status_code == status
    assert post(server, "/v1/messages", {}).json()["error"]["type"] == "authentication_error"
    for path, status in (("/health", 200), ("/", 200), ("/docs", 200), ("/v1/models", 401), ("/metrics", 401),
                         ("/state", 401)):
        assert httpx.get(server.url + path).status_code == status


def test_other_origins(serve):
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    closed = httpx.options(serve().url + "/v1/chat/completions", headers=ask)
    assert "access-control-allow-origin" not in closed.headers
    opened = httpx.options(serve(cors_origins=("https://a.example",)).url + "/v1/chat/completions", headers=ask)
    assert opened.headers["access-control-allow-origin"] == "https://a.example"
