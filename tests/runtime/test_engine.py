"""The engine on a stand-in runner: batching, chunking and preemption change no token; nothing leaks; endings."""

from __future__ import annotations

import random

import numpy as np
import pytest

from qcn_compile.errors import CapacityError, UsageError
from qcn_compile.runtime.batch import Capacity
from qcn_compile.runtime.engine import Engine, EngineConfig
from qcn_compile.runtime.request import FinishReason, SamplingParams

VOCAB, PAGE = 64, 4
PLANS = (Capacity(1, 1, 1), Capacity(8, 8, 8), Capacity(32, 6, 6))
GREEDY = SamplingParams(temperature=0)


class Caching:
    """A runner whose caches are Python lists: each page and slot remembers tokens, and logits hash all of them.

    A wrong page, slot, position or context gives other logits than the sequence alone would.
    """

    def __init__(self, capacities):
        self.capacities = capacities
        self.pages, self.slots, self.steps = {}, {}, 0

    def run(self, spans):
        self.steps += 1
        rows = []
        assert any(c.holds(sum(len(s.tokens) for s in spans), len(spans), sum(s.wanted for s in spans))
                   for c in self.capacities)
        for span in spans:
            history = self.slots.get(span.slot, ()) if span.context else ()
            assert len(history) == span.context
            for place, token in enumerate(span.tokens, span.context):
                self.pages[int(span.pages[place // PAGE]), place % PAGE] = token
                history += (token,)
                if place - span.context >= len(span.tokens) - span.wanted:
                    cached = tuple(self.pages[int(span.pages[p // PAGE]), p % PAGE] for p in range(place + 1))
                    assert cached == history
                    rows.append(row_of(history))
            self.slots[span.slot] = history
        return np.array(rows, np.float32).reshape(len(rows), VOCAB)


def row_of(history):
    return np.random.default_rng(abs(hash(history))).normal(size=VOCAB).astype(np.float32)


def spell(token):
    return bytes([97 + token % 26])


def engine(pages=200, slots=8, plans=PLANS, eos=frozenset({0}), **fields):
    return Engine(Caching(plans), spell, EngineConfig(VOCAB, PAGE, 100, pages, slots, eos, **fields))


def finish(e, collect=None):
    """Run to the end: {id: (tokens, text, reason)}."""
    got = {} if collect is None else collect
    for _ in range(20000):
        if not e.unfinished:
            return got
        for output in e.step():
            tokens, text, _ = got.get(output.request_id, ([], "", None))
            got[output.request_id] = (tokens + list(output.token_ids), text + output.text, output.finish_reason)
        e.check_integrity()
    raise AssertionError("the engine does not finish")


def alone(prompt, params):
    e = engine()
    name = e.add_request(prompt, params)
    return finish(e)[name]


def prompt_of(rng):
    return [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 70))]


@pytest.mark.parametrize("setting", [{}, {"slots": 2}, {"prefill_chunk": 3}, {"pages": 26}, {"pages": 40, "slots": 5},
                                     {"plans": (Capacity(1, 1, 1), Capacity(5, 1, 1))}])
def test_batching_chunking_and_preemption_change_no_token(setting):
    rng = random.Random(1)
    jobs = [(prompt_of(rng), SamplingParams(temperature=rng.choice([0, 1]), seed=i, max_tokens=rng.randint(1, 30),
                                            repetition_penalty=rng.choice([1.0, 1.3]))) for i in range(12)]
    e = engine(**setting)
    got, names = {}, []
    for i, (prompt, params) in enumerate(jobs):
        names.append(e.add_request(prompt, params, f"job-{i}"))
        for output in e.step() if rng.random() < 0.7 else []:
            tokens, text, _ = got.get(output.request_id, ([], "", None))
            got[output.request_id] = (tokens + list(output.token_ids), text + output.text, output.finish_reason)
    finish(e, got)
    assert [got[name] for name in names] == [alone(*job) for job in jobs]
    assert e.pages.used == 0 and e.slots.free == e.slots.total


def test_few_pages_do_preempt():
    e = engine(pages=26, eos=frozenset())
    for i in range(4):
        e.add_request([i + 1] * 20, SamplingParams(temperature=0, max_tokens=30))
    preempted = set()
    while e.unfinished:
        e.step()
        preempted |= {live.request.id for live in e._live.values() if live.request.preemptions}
    assert preempted and "request-0" not in preempted


@pytest.mark.parametrize("seed", range(6))
def test_random_adds_and_aborts_leak_nothing(seed):
    rng = random.Random(seed)
    e = engine(pages=rng.randint(26, 60), slots=rng.randint(1, 6))
    live = []
    for _ in range(150):
        action = rng.random()
        if action < 0.3:
            live.append(e.add_request(prompt_of(rng), SamplingParams(max_tokens=rng.randint(1, 40), seed=1)))
        elif action < 0.4 and live:
            name = live.pop(rng.randrange(len(live)))
            output = e.abort(name)
            assert output is None or output.finish_reason is FinishReason.abort
        else:
            e.step()
        e.check_integrity()
    finish(e)
    assert e.pages.used == 0 and e.slots.free == e.slots.total and e.step() == []


def test_ends():
    plain, text, reason = alone([5, 6, 7], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert len(plain) == 8 and reason is FinishReason.length and text == b"".join(map(spell, plain)).decode()
    stop = SamplingParams(temperature=0, max_tokens=8, stop_token_ids=(plain[3],), ignore_eos=True)
    first = plain.index(plain[3])
    assert alone([5, 6, 7], stop) == (plain[:first + 1], text[:first], FinishReason.stop)
    e = engine(eos=frozenset({plain[2]}))
    name = e.add_request([5, 6, 7], GREEDY)
    first = plain.index(plain[2])
    assert finish(e)[name] == (plain[:first + 1], text[:first], FinishReason.stop)
    words = SamplingParams(temperature=0, max_tokens=8, stop=(text[2:5],), ignore_eos=True)
    assert alone([5, 6, 7], words) == (plain[:5], text[:text.index(text[2:5])], FinishReason.stop)


def test_text_held_back_for_a_stop_is_shown_at_the_end():
    tokens, text, _ = alone([5, 6], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert alone([5, 6], SamplingParams(temperature=0, max_tokens=4, stop=(text[-2:] + "?",), ignore_eos=True)) == (
        tokens, text, FinishReason.length)


def test_the_context_clips_max_tokens_and_refuses_longer_prompts():
    tokens, _, reason = alone([3] * 95, SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    assert len(tokens) == 5 and reason is FinishReason.length
    for length in (100, 101):
        with pytest.raises(CapacityError, match=f"{length} tokens, the context holds 100 .*shorten"):
            engine().add_request([3] * length, GREEDY)


def test_bad_requests():
    e = engine()
    for prompt, words in [([], "empty"), ([64], "outside the vocabulary"), (["x"], "whole numbers")]:
        with pytest.raises(UsageError, match=words):
            e.add_request(prompt, GREEDY)
    e.add_request([1], GREEDY, "same")
    with pytest.raises(UsageError, match="in use"):
        e.add_request([1], GREEDY, "same")
    assert e.abort("other") is None and e.unfinished == 1


def test_requests_that_can_never_run_are_told():
    e = engine(slots=1)
    e.slots.acquire()
    e.add_request([1], GREEDY)
    with pytest.raises(CapacityError, match="held by sequences of step"):
        e.step()


def test_logprobs_and_timing():
    e = engine(eos=frozenset())
    e.add_request([1, 2, 3], SamplingParams(logprobs=2, max_tokens=3))
    outputs = [output for _ in range(3) for output in e.step()]
    assert all(len(o.samples[0].top_logprobs) == 2 and o.samples[0].logprob <= 0 for o in outputs)
    timing = outputs[-1].timing
    assert (timing.prompt_tokens, timing.new_tokens) == (3, 3) and timing.prefill_rate > 0 and timing.decode_rate > 0
