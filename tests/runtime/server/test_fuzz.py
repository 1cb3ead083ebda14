"""No body, however odd, gets a 5xx: from the OpenAPI document, and by damaging good requests.

QCN_FUZZ=100 in the environment tries as many bodies of each operation, in place of 10.
"""

from __future__ import annotations

import json
import os

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chat_api import TOOLS

schemathesis = pytest.importorskip("schemathesis")

TRIES = int(os.environ.get("QCN_FUZZ", "10"))
QUICK = settings(max_examples=TRIES, deadline=None, derandomize=True, database=None,
                 suppress_health_check=list(HealthCheck))
PART = {"type": "text", "text": "a"}
GOOD = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": [PART]}], "tools": TOOLS,
                             "tool_choice": "auto", "stop": ["x"], "logit_bias": {"5": 1}, "n": 1,
                             "stream": False, "max_tokens": 3, "response_format": {"type": "text"}},
    "/v1/completions": {"model": "tiny", "prompt": ["a"], "max_tokens": 3, "suffix": "b", "logprobs": 1},
    "/v1/responses": {"model": "tiny", "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}],
                      "tools": [{"type": "function", **TOOLS[0]["function"]}], "text": {"format": {"type": "text"}}},
    "/v1/messages": {"model": "tiny", "max_tokens": 3, "messages": [{"role": "user", "content": "a"}],
                     "system": [{"type": "text", "text": "s"}], "tools": [{"name": "f", "input_schema": {}}]},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": [{"role": "user", "content": "a"}]},
    "/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [1]},
}
ODD = st.sampled_from([None, True, -1, 0, 1, 2**70, 1e308, "", "x", "\x00", "\U0001f600" * 50, [], [[]], [None], {},
                       {"": 0}, {"type": "function"}, {"$ref": "#"}, [{"role": "user"}],
                       ["a"] * 200, {"type": ["string", 5]}])


def places(value, path=()):
    """Every place in a body."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@pytest.fixture(scope="module")
def client(real):
    with httpx.Client(base_url=real.url, timeout=30) as client:
        yield client


@pytest.mark.parametrize("path", GOOD)
def test_damaged_requests(client, path):
    assert client.post(path, json=GOOD[path]).status_code == 200

    @settings(QUICK, max_examples=25 * TRIES // 10)
    @given(st.sampled_from(list(places(GOOD[path]))), ODD)
    def damage(where, odd):
        body = replaced(GOOD[path], where, odd)
        if isinstance(body, dict) and body.get("n", 1) not in (1, None):
            return
        response = client.post(path, content=json.dumps(body))
        assert response.status_code < 500, (body, response.text)

    damage()


def test_generated_requests(real):
    """Schemathesis' bodies, of every operation of the document."""
    document = schemathesis.openapi.from_url(real.url + "/openapi.json").exclude(path_regex="^/(docs)?$")
    tried = 0
    for result in document.get_all_operations():
        operation = result.ok()

        @QUICK
        @given(operation.as_strategy())
        def generated(case):
            nonlocal tried
            tried += 1
            if isinstance(case.body, dict):
                case.body |= {"max_tokens": 2, "max_output_tokens": 2, "n": 1}
            response = case.call()
            assert response.status_code < 500, response.text

        generated()
    assert tried > 50
