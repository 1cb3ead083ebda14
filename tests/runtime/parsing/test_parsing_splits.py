"""However a text is cut into pieces, the message is the same."""

from __future__ import annotations

import json
import random

import pytest
from parsing_texts import Sample, parse, samples

from qcn_compile.runtime.parsing.events import ToolCallArguments, ToolCallFinished, ToolCallStarted

COUNT, SHARDS = 504, 12
SAMPLES = list(samples(seed=20261123, count=COUNT))


def random_pieces(text: str, rng: random.Random) -> list[str]:
    cuts = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(2, 12)))
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def check(sample: Sample, rng: random.Random) -> None:
    text = sample.text
    want = parse(sample.make(), text)
    if sample.want is not None:
        assert want == sample.want, text
    for call in want.tool_calls:
        assert isinstance(json.loads(call.arguments), dict), text
    assert parse(sample.make(), *text) == want, text
    for cut in range(1, len(text)):
        assert parse(sample.make(), text[:cut], text[cut:]) == want, (text, cut)
    for _ in range(200):
        pieces = random_pieces(text, rng)
        assert parse(sample.make(), *pieces) == want, pieces


@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_split_gives_the_same_message(shard):
    rng = random.Random(shard)
    for sample in SAMPLES[shard::SHARDS]:
        check(sample, rng)


def test_samples_cover_what_they_should():
    messages = [(sample, parse(sample.make(), sample.text)) for sample in SAMPLES]
    assert sum(sample.want is not None for sample, _ in messages) >= 80
    assert sum(len(message.tool_calls) > 1 for _, message in messages) >= 25
    assert sum(any(not call.complete for call in message.tool_calls) for _, message in messages) >= 25
    assert sum(bool(message.reasoning and message.tool_calls) for _, message in messages) >= 40
    assert sum(not message.tool_calls for _, message in messages) >= 80


def test_events_are_well_formed():
    for sample in SAMPLES:
        parser = sample.make()
        events = [event for character in sample.text for event in parser.feed(character)] + parser.finish()
        open_call, calls = None, 0
        for event in events:
            if isinstance(event, ToolCallStarted):
                assert open_call is None and event.index == calls and event.name
                open_call, calls = event.index, calls + 1
            elif isinstance(event, ToolCallArguments):
                assert event.index == open_call and event.text
            elif isinstance(event, ToolCallFinished):
                assert event.index == open_call
                open_call = None
            else:
                assert event.text
        assert open_call is None
