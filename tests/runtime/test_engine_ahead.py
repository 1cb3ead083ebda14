"""Steps launched before the tokens of the one before are read: the same tokens, text and endings; nothing leaks."""

from __future__ import annotations

import random

import numpy as np
import pytest
from test_engine import GREEDY, PLANS, VOCAB, Caching, alone, engine, finish, prompt_of, spell

from qcn_compile.errors import DeviceError
from qcn_compile.runtime.batch import Capacity
from qcn_compile.runtime.engine import Engine, EngineConfig
from qcn_compile.runtime.request import FinishReason, SamplingParams


class Launched:
    def __init__(self, rows, picks):
        self.rows, self.picks, self.read = rows, picks, False

    def tokens(self):
        self.read = True
        chosen = [-1 if pick is None or not np.isfinite(row.max()) else row.argmax()
                  for row, pick in zip(self.rows, self.picks, strict=True)]
        return np.array(chosen, np.int32)

    def logits(self):
        self.read = True
        return self.rows


class Deferred(Caching):
    """A device: chooses greedily, remembers each slot's last token, and shows results only when they are read."""

    def __init__(self, capacities):
        super().__init__(capacities)
        self.last, self.ahead, self.recent, self.fed = {}, 0, None, 0

    def launch(self, spans, picks):
        self.ahead += self.recent is not None and not self.recent.read
        spans = [type(s)([self._token(t) for t in s.tokens], s.context, s.slot, s.pages, s.wanted) for s in spans]
        rows = self._bound(self.run(spans), picks)
        owners = [s.slot for s in spans for _ in range(s.wanted)]
        for slot, row, pick in zip(owners, rows, picks, strict=True):
            assert pick is None or (pick.request.slot == slot and pick.index == pick.request.generated)
            self.last[slot] = int(row.argmax())
        self.recent = Launched(rows, picks)
        return self.recent

    def _token(self, token):
        self.fed += token < 0
        return self.last[-1 - token] if token < 0 else token

    def _bound(self, rows, picks):
        return np.array([row if pick is None or pick.constraint is None
                         else np.where(pick.constraint.allowed(), row, -np.inf)
                         for row, pick in zip(rows, picks, strict=True)], np.float32).reshape(len(rows), VOCAB)


def ahead(pages=200, slots=8, plans=PLANS, eos=frozenset({0}), **fields):
    return Engine(Deferred(plans), spell, EngineConfig(VOCAB, PAGE, 100, pages, slots, eos, **fields))


PAGE = 4


@pytest.mark.parametrize("setting", [{}, {"slots": 2}, {"prefill_chunk": 3}, {"pages": 26}, {"pages": 40, "slots": 5},
                                     {"plans": (Capacity(1, 1, 1), Capacity(5, 1, 1))}])
def test_no_token_changes(setting):
    rng = random.Random(1)
    e = ahead(**setting)
    wanted = {}
    for number in range(25):
        params = SamplingParams(temperature=0, max_tokens=rng.randint(1, 30), stop_token_ids=(rng.randrange(VOCAB),),
                                stop=("qz",) if number % 3 else (), ignore_eos=bool(number % 2))
        prompt = prompt_of(rng)
        wanted[e.add_request(prompt, params)] = alone(prompt, params)
    assert finish(e) == wanted
    assert e._runner.ahead > 5 and e._runner.fed > 10
    assert e.pages.free == e.pages.total and e.slots.free == e.slots.total


def test_a_step_is_launched_before_the_last_is_read():
    e = ahead()
    name = e.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert e.step() == [] and e._runner.steps == 1
    sizes = []
    while e.unfinished:
        sizes.append(sum(len(o.token_ids) for o in e.step()))
    assert sizes == [1, 1, 1, 1] and e._runner.steps == 4  # the end by length is foreseen: no step in vain
    e.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), name)
    first = e.step() + e.step()
    stopper = SamplingParams(temperature=0, stop_token_ids=tuple(first[0].token_ids), ignore_eos=True)
    e.abort(name)
    e.step()
    before = e._runner.steps
    e.add_request([1, 2, 3], stopper)
    assert finish(e)["request-2"][2] is FinishReason.stop and e._runner.steps == before + 2  # one in vain


def test_aborts_at_any_time_leave_the_others_alone():
    rng = random.Random(3)
    e = ahead(pages=40, slots=5)
    wanted, got, gone = {}, {}, set()
    for _ in range(20):
        prompt = prompt_of(rng)
        params = SamplingParams(temperature=0, max_tokens=12)
        wanted[e.add_request(prompt, params)] = alone(prompt, params)
        for output in e.step():
            tokens, text, _ = got.get(output.request_id, ([], "", None))
            got[output.request_id] = tokens + list(output.token_ids), text + output.text, output.finish_reason
        if rng.random() < 0.4 and (live := [n for n in wanted if e.runs(n)]):
            gone.add(name := rng.choice(live))
            e.abort(name)
        e.check_integrity()
    finish(e, got)
    assert all(got[n] == wanted[n] for n in wanted if n not in gone) and len(gone) > 2


class Even:
    """A grammar of even tokens, three of them."""

    def __init__(self):
        self.seen = []

    def allowed(self):
        allowed = np.arange(VOCAB) % 2 == 0
        return allowed if len(self.seen) < 3 else np.arange(VOCAB) == 0

    def accept(self, token):
        self.seen.append(token)


def test_grammars_and_logprobs_are_read_at_once():
    e, plain = ahead(), engine()
    for each in (e, plain):
        each.add_request([5, 6], SamplingParams(temperature=0, max_tokens=9), "even", Even())
        each.add_request([7, 8], SamplingParams(temperature=0, max_tokens=9, logprobs=3), "probable")
        each.add_request([9, 10], GREEDY, "plain")
    assert finish(e) == finish(plain)


def test_logits_that_are_no_numbers_end_in_an_error(monkeypatch):
    e = ahead()
    e.add_request([5, 6], GREEDY)
    monkeypatch.setattr("test_engine.row_of", lambda history: np.full(VOCAB, np.nan, np.float32))
    with pytest.raises(DeviceError, match="not finite numbers"):
        finish(e)
