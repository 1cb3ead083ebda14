"""The engine with a prefix cache: hits change no token, little is computed twice, nothing leaks."""

from __future__ import annotations

import random

import pytest
from prefix_harness import OPEN, PAGE, VOCAB, answer, collect, engine, finish, policy

from qcn_compile.runtime.request import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def text(rng, length):
    return [rng.randrange(1, VOCAB - 1) for _ in range(length)]


def message(rng, length):
    return [OPEN, *text(rng, length)]


def test_a_hit_gives_the_tokens_of_a_miss():
    rng = random.Random(0)
    cached, plain = engine(), engine(snapshots=None)
    history = message(rng, 30)
    for turn in range(6):
        history += message(rng, rng.randint(3, 20)) + [OPEN]
        tokens, hit = answer(cached, history, GREEDY)
        assert tokens == answer(plain, history, GREEDY)[0]
        assert (hit > 0) == (turn > 0)
        history += tokens
    assert cached.pages.used == 0 and cached.slots.free == cached.slots.total


def test_a_growing_history_computes_only_what_is_new():
    rng = random.Random(1)
    e = engine()
    history, computed = message(rng, 40), 0
    for _ in range(8):
        new = message(rng, 12)
        history += new
        before = e.runner.computed
        tokens, _ = answer(e, history, GREEDY)
        if computed:
            assert e.runner.computed - before == len(new) + len(tokens)
        computed = e.runner.computed
        history += tokens


def test_a_template_that_rewrites_the_last_answer_loses_only_that():
    rng = random.Random(2)
    e = engine()
    history = message(rng, 60) + message(rng, 40)
    tokens, _ = answer(e, [*history, OPEN, 7], GREEDY)
    rewritten = [*history, OPEN, 9, *tokens[4:], *message(rng, 20)]
    assert answer(e, rewritten, GREEDY)[1] == len(history)


def test_sessions_share_their_system_prompt():
    rng = random.Random(3)
    e = engine()
    system = message(rng, 50)
    assert answer(e, system + message(rng, 20), GREEDY)[1] == 0
    assert answer(e, system + message(rng, 20), GREEDY)[1] == len(system)


def test_prompts_without_messages_share_where_they_part():
    rng = random.Random(4)
    e = engine()
    shots = text(rng, 90)
    first = [shots + text(rng, 20) for _ in range(3)]
    assert [answer(e, p, GREEDY)[1] for p in first] == [0, 64, 90]  # a chunk, then where the second one parted
    assert answer(e, first[0], GREEDY)[1] == 108  # the same again: its last whole page


def test_at_least_one_token_is_computed():
    e = engine()
    prompt = text(random.Random(5), 40)
    tokens, _ = answer(e, prompt, GREEDY)
    again, cached = answer(e, prompt + tokens[:-1], GREEDY)
    assert cached <= len(prompt) + len(tokens) - 2 and again[0] == tokens[-1]


def jobs_of(rng, count):
    """Requests of sessions that share system prompts and grow."""
    systems = [message(rng, rng.randint(10, 60)) for _ in range(3)]
    histories = [list(rng.choice(systems)) for _ in range(5)]
    for i in range(count):
        history = rng.choice(histories)
        if len(history) > 170:
            history[:] = rng.choice(systems)
        history += message(rng, rng.randint(1, 25))
        yield list(history), SamplingParams(temperature=rng.choice([0, 1]), seed=i, max_tokens=rng.randint(1, 30),
                                            repetition_penalty=rng.choice([1.0, 1.2]))


SETTINGS = [{}, {"pages": 62, "slots": 3}, {"pages": 62, "snapshots": 2, "host": 200}, {"snapshots": 0, "host": 400},
            {"snapshots": 0, "host": 0}, {"pages": 70, "snapshots": 5, "host": 0}, {"slots": 1, "prefill_chunk": 5},
            {"pages": 61, "snapshots": 3, "host": 3000, "prefill_chunk": 7}]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_random_sessions_with_aborts_equal_a_run_without_cache(setting, seed):
    rng = random.Random(seed)
    e, plain = engine(**setting), engine(snapshots=None, pages=setting.get("pages", 400))
    got, jobs, aborted = {}, {}, set()
    for i, job in enumerate(jobs_of(rng, 25)):
        jobs[e.add_request(*job, f"job-{i}")] = job
        while rng.random() < 0.8:
            collect(e.step(), got)
            e.check_integrity()
        if rng.random() < 0.15:
            name = rng.choice(list(jobs))
            aborted |= {name} if e.abort(name) else set()
    finish(e, got)
    assert e.pages.used == 0 and e.slots.free == e.slots.total
    for name, job in jobs.items():
        want = answer(plain, *job)[0]
        assert got.get(name, ([],))[0] == (want if name not in aborted else want[:len(got.get(name, ([],))[0])])
    e.prefixes.clear()
    e.check_integrity()
    assert e.pages.free == e.pages.total


def test_preemption_resumes_from_its_own_prefix():
    e = engine(pages=70, slots=4, eos=frozenset())
    for i in range(4):
        e.add_request([i + 1] * 50, SamplingParams(temperature=0, max_tokens=60), f"r{i}")
    preemptions, live = 0, {name: row.request for name, row in e._live.items()}
    finish(e)
    preemptions = sum(request.preemptions for request in live.values())
    assert preemptions > 0
    assert e.runner.computed <= 4 * 109 + 8 * preemptions


def test_cached_tokens_are_reported_once_and_in_the_timing():
    e = engine()
    prompt = message(random.Random(6), 30) + message(random.Random(7), 30)
    answer(e, prompt, GREEDY)
    e.add_request([*prompt, 5, 6], GREEDY)
    outputs = [o for _ in range(40) for o in e.step()]
    assert outputs[0].cached == 31 and all(o.cached == 0 for o in outputs[1:])
    assert outputs[-1].timing.cached_tokens == 31
    assert "1 of 2 requests hit" in str(e.prefixes)


def test_chunks_end_at_messages():
    rules = policy(chunk_gap=1000)
    cuts = rules.plan([OPEN, *[1] * 19, OPEN, *[1] * 29, OPEN, *[1] * 9], 0, 0)
    assert (cuts.must, cuts.may) == ((20, 50), (20, 50))
    assert rules.cut(cuts, 0, 32, 60) == 20 and rules.cut(cuts, 20, 32, 60) == 30 and rules.cut(cuts, 50, 10, 60) == 10
    assert rules.plan([OPEN, *[1] * 19, OPEN, *[1] * 29], 48, 0).must == ()
    plain = rules.plan([1] * 50, 0, 30)
    assert plain.must == (30, 48) and rules.cut(plain, 30, 15, 50) == 14  # to the end of a page
    closers = policy(openers=frozenset(), closers=frozenset({9}))
    assert closers.plan([1, 1, 1, 1, 9, 1, 1, 1], 0, 0).must == (5,)


@pytest.mark.parametrize("setting", [{}, {"slots": 2}, {"prefill_chunk": 8}, {"pages": 100, "slots": 3}], ids=str)
def test_several_answers_to_a_prompt_compute_it_once(setting):
    rng = random.Random(7)
    prompt = [rng.randrange(1, OPEN) for _ in range(130)]
    params = [SamplingParams(temperature=0.5, seed=i, max_tokens=20, ignore_eos=True) for i in range(5)]
    e, plain = engine(**setting), engine(snapshots=None)
    e.add_request(prompt, params[0], "first")
    for i, p in enumerate(params[1:]):
        e.add_request(prompt, p, f"more-{i}", after="first")
    got = finish(e)
    assert [got[name][0] for name in ("first", *(f"more-{i}" for i in range(4)))] == [
        answer(plain, prompt, p)[0] for p in params]
    assert e.runner.computed <= 130 + 5 * (20 + PAGE)


def test_a_follower_runs_when_its_first_is_gone():
    e, params = engine(), SamplingParams(temperature=0, max_tokens=5)
    e.add_request([5] * 100, params, "first")
    e.add_request([5] * 100, params, "more", after="first")
    e.abort("first")
    assert finish(e)["more"][0] == answer(engine(snapshots=None), [5] * 100, params)[0]
    e.add_request([6] * 100, SamplingParams(max_tokens=5), "late", after="nobody")
    assert "late" in finish(e)
