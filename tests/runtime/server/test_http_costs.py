"""What a streamed token costs in the HTTP layer, and the templates that make it little."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qcn_compile.runtime.server.sse import TextEvent, event

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))


TEXTS = ["", "plain", 'quotes " and \\ and \n\t\x01', "Grüße 你好 🙂", "\ud83d", "\x00text\x00", "</s>"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_event_is_the_event_with_its_text(text):
    data = {"id": "x", "choices": [{"index": 0, "delta": {"content": TextEvent.TEXT}}], "model": 'na"me'}
    data["choices"][0]["delta"]["content"] = TextEvent.TEXT
    made = TextEvent(data)(text)
    data["choices"][0]["delta"]["content"] = text
    assert made == event(data)
    if text != "\ud83d":
        assert json.loads(made.removeprefix(b"data: "))["choices"][0]["delta"]["content"] == text


@pytest.mark.slow
def test_64_streams_cost_at_most_15_percent_of_a_core_per_1000_tokens_a_second():
    from http_overhead import main

    assert min(main(64, 0.02, 200) for _ in range(2)) <= 150  # microseconds of CPU a token
