"""Speculating engines give the tokens of plain ones: greedy and sampled, batched, preempted, cached, aborted."""

from __future__ import annotations

import random

import numpy as np
import pytest
from prefix_harness import VOCAB, answer, collect, engine, finish, roll, row_of

from qcn_compile.errors import UsageError
from qcn_compile.runtime.batch import Capacity
from qcn_compile.runtime.cli import main, parser
from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.request import SamplingParams
from qcn_compile.runtime.speculation.ngram import NgramDrafter
from qcn_compile.runtime.speculation.options import SpeculationOptions, speculation_options


class Oracle:
    """Knows the greedy continuation, and says something else with some probability."""

    def __init__(self, wrong, seed=0):
        self._wrong, self._random = wrong, random.Random(seed)

    def draft(self, tokens, count):
        state, drafts = 0, []
        for token in tokens:
            state = roll(state, token)
        for _ in range(self._random.randint(0, count)):
            token = int(row_of(state).argmax())
            token = self._random.randrange(VOCAB) if self._random.random() < self._wrong else token
            drafts.append(token)
            state = roll(state, token)
        return drafts


GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SETTINGS = [{}, {"slots": 2}, {"prefill_chunk": 3}, {"pages": 61, "slots": 5}, {"snapshots": 3, "host": 500},
            {"snapshots": None}, {"plans": (Capacity(1, 1, 1), Capacity(7, 2, 7))},
            {"plans": (Capacity(1, 1, 1), Capacity(5, 1, 1))}, {"pages": 64, "snapshots": 2, "host": 0}]


def jobs_of(rng, count):
    stem = [rng.randrange(1, VOCAB) for _ in range(20)]
    for i in range(count):
        prompt = stem[:rng.randint(0, 20)] + [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 60))]
        yield prompt, SamplingParams(temperature=rng.choice([0, 0, 0.2]), seed=i, max_tokens=rng.randint(1, 50),
                                     repetition_penalty=rng.choice([1.0, 1.0, 1.2]))


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_random_requests_get_the_tokens_of_a_plain_engine(setting, wrong):
    rng = random.Random(3)
    e, plain = engine(drafter=lambda: Oracle(wrong), **setting), engine(snapshots=None)
    got, jobs, aborted = {}, {}, set()
    for i, job in enumerate(jobs_of(rng, 20)):
        jobs[e.add_request(*job, f"job-{i}")] = job
        while rng.random() < 0.8:
            collect(e.step(), got)
            e.check_integrity()
        if rng.random() < 0.1:
            name = rng.choice(list(jobs))
            aborted |= {name} if e.abort(name) else set()
    finish(e, got)
    for name, job in jobs.items():
        want, mine = answer(plain, *job)[0], got.get(name, ([],))[0]
        assert mine == (want[:len(mine)] if name in aborted else want)
    assert e.pages.used == 0 and e.slots.free == e.slots.total and not e.speculation._requests


def test_accepted_drafts_save_steps():
    runs = []
    for drafter in (None, lambda: Oracle(0.0)):
        e = engine(drafter=drafter, eos=frozenset())
        if drafter is not None:
            e.speculation.times.ratio = lambda sequences: 1.3  # not this machine's
        e.add_request([5, 6, 7], GREEDY)
        outputs = []
        while e.unfinished:
            outputs += e.step()
        runs.append((e.runner.steps, sum((o.token_ids for o in outputs), ()), outputs[-1].timing))
    (plain, want, _), (fast, got, timing) = runs
    assert got == want and fast < plain / 2
    assert timing.accepted == timing.drafted > 20


def test_drafting_that_never_pays_stops():
    e = engine(drafter=lambda: Oracle(1.0), eos=frozenset())
    e.add_request([5, 6, 7], SamplingParams(temperature=0, max_tokens=200))
    e.speculation.times.ratio = lambda sequences: 1.5
    finish(e)
    assert e.speculation.drafted < 150 and "drafts accepted" in str(e.speculation)


def test_a_finished_request_keeps_only_what_was_accepted():
    e = engine(drafter=lambda: Oracle(0.2))
    plain = engine(snapshots=None)
    history = [63, 5, 6, 7]
    for _ in range(5):
        got, _ = answer(e, history, GREEDY)
        assert got == answer(plain, history, GREEDY)[0]
        history += [*got, 63, 9, 9]
    assert e.prefixes.counts.hits == 4


def test_sampled_tokens_have_the_models_distribution():
    """Chi-squared over the second token of many requests, whose first row is verified with a likely draft."""
    params = [SamplingParams(temperature=0.7, seed=seed, max_tokens=3, logit_bias=dict.fromkeys((1, 2, 3), 4.0))
              for seed in range(1200)]
    e = engine(drafter=lambda: Oracle(0.0), slots=8, eos=frozenset(), snapshots=None)
    names = [e.add_request([5, 6, 7], p) for p in params]
    got = finish(e, check=False)
    state = 0
    for token in (5, 6, 7):
        state = roll(state, token)
    counts, expected = np.zeros((4, VOCAB)), np.zeros((4, VOCAB))
    for name in names:
        tokens = got[name][0]
        if tokens[0] in (1, 2, 3):
            row = row_of(roll(state, tokens[0])).astype(np.float64)
            row[[1, 2, 3]] += 4.0
            p = np.exp((row - row.max()) / 0.7)
            expected[tokens[0]] += p / p.sum()
            counts[tokens[0], tokens[1]] += 1
    large = expected > 5
    chi = ((counts - expected)[large] ** 2 / expected[large]).sum()
    freedom = int(large.sum())
    assert e.speculation.drafted > 500 and freedom >= 6
    assert chi < freedom + 4 * np.sqrt(2 * freedom)


def test_loaded_builds_speculate(toy_build, model):
    with load(toy_build, threads=1, speculation=SpeculationOptions(3), max_running_requests=2) as fast:
        assert fast.memory.drafts == 2 and "2 for drafts" in fast.describe()
        for prompt in ([4, 5, 6] * 8, list(range(40, 70))):
            want, got = ([t for o in m.generate(prompt, temperature=0, max_tokens=40, ignore_eos=True)
                          for t in o.token_ids] for m in (model, fast))
            assert got == want
            fast.check_integrity()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_random_requests_get_the_tokens_of_a_plain_engine_with_a_draft_head(setting):
    rng = random.Random(4)
    e, plain = engine(head=True, **setting), engine(snapshots=None)
    got, jobs, aborted = {}, {}, set()
    for i, job in enumerate(jobs_of(rng, 20)):
        jobs[e.add_request(*job, f"job-{i}")] = job
        while rng.random() < 0.8:
            collect(e.step(), got)
            e.check_integrity()
        if rng.random() < 0.1:
            name = rng.choice(list(jobs))
            aborted |= {name} if e.abort(name) else set()
    finish(e, got)
    for name, job in jobs.items():
        want, mine = answer(plain, *job)[0], got.get(name, ([],))[0]
        assert mine == (want[:len(mine)] if name in aborted else want)
    assert e.pages.used == 0 and not e.speculation._drafter._requests and e.runner.drafts > 20


@pytest.mark.parametrize("setting", [{}, {"slots": 2}, {"prefill_chunk": 3}, {"pages": 61, "slots": 5}], ids=str)
def test_the_heads_cache_holds_what_came_true(setting):
    """Every pair follows from the one before it: replays, refusals and preemptions leave no wrong one behind."""
    e = engine(head=True, snapshots=None, eos=frozenset(), **setting)
    rng = random.Random(1)
    for i in range(12):
        prompt = [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 150))]
        e.add_request(prompt, SamplingParams(temperature=rng.choice([0, 0.5]), seed=i, max_tokens=rng.randint(5, 60)))
    finish(e)
    assert e.runner.breaks == 0 and e.speculation.accepted > 50


def test_a_head_that_is_right_is_always_accepted():
    e = engine(head=True, snapshots=None, eos=frozenset(), drafts=3)
    e.speculation.times.ratio, e.speculation.times.since = lambda sequences: 1.0, -99  # no plain step between
    e.add_request([5, 6, 7], SamplingParams(temperature=0, max_tokens=41))
    finish(e)
    assert e.speculation.drafted == e.speculation.accepted == 30 and e.runner.steps == 11


def test_states_wait_while_drafting_pauses_and_are_read_later():
    e = engine(head=True, snapshots=None, eos=frozenset(), drafts=3)
    e.speculation.times.ratio, e.speculation.times.since = lambda sequences: 1.0, -99  # no plain step between
    e.add_request([5, 6, 7], SamplingParams(temperature=0, max_tokens=200))
    for _ in range(3):
        e.step()
    e.speculation._requests["request-0"].pace.pause = 90
    for _ in range(89):
        e.step()
    assert e.runner.drafts < 10
    finish(e)
    assert e.runner.breaks == 0 and e.speculation.drafted == e.speculation.accepted > 60


def test_flags(toy_build, capsys):
    def options(*flags):
        return speculation_options(parser().parse_args(["build", "--chat", *flags]))

    assert options() is None and options("--speculative-algorithm", "NGRAM") == SpeculationOptions()
    steps, tokens = "--speculative-num-steps", "--speculative-num-draft-tokens"
    for name, flags, algorithm, count in [
            ("ngram", (), "ngram", 4), ("ngram", (tokens, "7"), "ngram", 7), ("ngram", (steps, "2"), "ngram", 2),
            ("mtp", (), "mtp", 3), ("EAGLE", (steps, "3", tokens, "4"), "mtp", 3), ("NEXTN", (tokens, "3"), "mtp", 2)]:
        found = options("--speculative-algorithm", name, *flags)
        assert (found.algorithm, found.count) == (algorithm, count)
    for flags, words in [(("--speculative-algorithm", "x"), "unknown; use mtp"),
                         (("--speculative-num-draft-tokens", "3"), "need --speculative-algorithm"),
                         (("--speculative-algorithm", "mtp", "--speculative-num-draft-tokens", "1"), "from 1 to"),
                         (("--speculative-algorithm", "ngram", "--speculative-num-draft-tokens", "0"), "from 1 to")]:
        with pytest.raises(UsageError, match=words):
            options(*flags)
    assert main([str(toy_build), "--prompt", "x x x x", "--max-tokens", "9", "--speculative-algorithm", "ngram",
                 "--verbose", "--temperature", "0", "--threads", "1"]) == 0
    assert "drafts accepted" in capsys.readouterr().err
    assert main([str(toy_build), "--prompt", "x", "--speculative-algorithm", "mtp", "--threads", "1"]) == 2
    assert "has no MTP head" in capsys.readouterr().err


def test_ngrams_on_repetitive_text():
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logit_bias={9: 100.0})
    e = engine(drafter=NgramDrafter)
    e.speculation.times.ratio = lambda sequences: 1.0  # not this machine's
    assert answer(e, [1, 2, 3, 4] * 10, params)[0] == [9] * 40
    assert e.speculation.accepted == e.speculation.drafted >= 20
