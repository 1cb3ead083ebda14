"""Who runs when: order, fairness, limits of the plans, preemption. No device, no text."""

from __future__ import annotations

import random

import pytest

from qcn_compile.errors import CapacityError
from qcn_compile.runtime.batch import Capacity
from qcn_compile.runtime.kv_cache import PageAllocator
from qcn_compile.runtime.request import FinishReason, Request, SamplingParams
from qcn_compile.runtime.scheduler import Scheduler, SchedulerLimits
from qcn_compile.runtime.state_slots import SlotAllocator

PLANS = (Capacity(1, 1, 1), Capacity(8, 8, 8), Capacity(64, 4, 4))


def scheduler(pages=100, slots=8, chunk=64, plans=PLANS):
    limits = SchedulerLimits(max_running=slots, prefill_chunk=chunk, page_size=4, context_length=200)
    return Scheduler(limits, plans, PageAllocator(pages), SlotAllocator(slots))


def request(arrival, prompt, max_tokens=10):
    return Request(f"r{arrival}", [1] * prompt, SamplingParams(), max_tokens, arrival)


def run_step(s):
    """One step with a made-up token wherever one is sampled; returns {id: count}."""
    chunks = s.schedule()
    sizes = {chunk.request.id: chunk.count for chunk in chunks}
    for chunk in chunks:
        s.advance(chunk)
        if chunk.samples:
            chunk.request.tokens.append(2)
            if chunk.request.generated >= chunk.request.max_tokens:
                s.finish(chunk.request, FinishReason.length)
    s.check_integrity()
    return sizes


def test_a_long_prompt_alone_takes_the_whole_step():
    s = scheduler()
    s.add(request(0, 150))
    assert [run_step(s) for _ in range(4)] == [{"r0": 64}, {"r0": 64}, {"r0": 22}, {"r0": 1}]


def test_a_short_prompt_need_not_wait_for_a_long_one():
    s = scheduler()
    s.add(request(0, 150))
    s.add(request(1, 10))
    assert run_step(s) == {"r0": 54, "r1": 10}
    assert run_step(s) == {"r0": 63, "r1": 1}
    s.add(request(2, 100))
    assert run_step(s) == {"r0": 32, "r1": 1, "r2": 31}  # the oldest has half, rounded up


def test_decoding_goes_first_and_the_prompt_chunk_is_limited():
    s = scheduler(chunk=16)
    s.add(request(0, 3))
    run_step(s)
    s.add(request(1, 60))
    assert [run_step(s) for _ in range(5)] == [{"r0": 1, "r1": 16}] * 3 + [{"r0": 1, "r1": 12}, {"r0": 1, "r1": 1}]


def test_plans_bound_a_mixed_step():
    """The plan of 64 tokens holds four sequences: a prompt gets it, and the decoding ones take turns meanwhile."""
    s = scheduler()
    for i in range(4):
        s.add(request(i, 2, max_tokens=50))
    assert run_step(s) == {"r0": 2, "r1": 2, "r2": 2, "r3": 2}
    s.add(request(4, 100, max_tokens=50))
    assert run_step(s) == {"r0": 1, "r1": 1, "r2": 1, "r4": 61}
    assert run_step(s) == {"r3": 1, "r0": 1, "r1": 1, "r4": 39}
    assert run_step(s) == {"r2": 1, "r4": 1, "r3": 1, "r0": 1, "r1": 1}


def test_plans_of_one_sequence_alternate():
    s = scheduler(plans=(Capacity(1, 1, 1), Capacity(64, 1, 1)))
    s.add(request(0, 2))
    s.add(request(1, 150))
    seen = [run_step(s) for _ in range(8)]
    assert [next(iter(step)) for step in seen] == ["r0", "r1", "r0", "r1", "r0", "r1", "r0", "r1"]
    assert all(len(step) == 1 for step in seen)


def test_more_decoders_than_a_plan_holds_take_turns():
    plans = (Capacity(1, 1, 1), Capacity(2, 2, 2), Capacity(64, 2, 2))
    s = scheduler(plans=plans)
    for i in range(5):
        s.add(request(i, 1, max_tokens=40))
    served = dict.fromkeys((f"r{i}" for i in range(5)), 0)
    for _ in range(60):
        for name in run_step(s):
            served[name] += 1
    assert max(served.values()) - min(served.values()) <= 2


def test_first_come_first_served_when_slots_are_few():
    s = scheduler(slots=2)
    for i in range(5):
        s.add(request(i, 4, max_tokens=3))
    order = []
    while s.unfinished:
        order += [name for name in run_step(s) if name not in order]
    assert order == [f"r{i}" for i in range(5)]


def test_the_last_arrival_is_preempted_and_the_first_finishes_undisturbed():
    s = scheduler(pages=12)
    requests = [request(i, 15, max_tokens=20) for i in range(3)]
    for r in requests:
        s.add(r)
    finished = []
    for _ in range(300):
        run_step(s)
        finished += [r.id for r in requests if r.finished and r.id not in finished]
    assert finished[0] == "r0" and len(finished) == 3
    assert requests[0].preemptions == 0 and requests[2].preemptions > 0
    assert all(r.generated == 20 for r in requests)


def test_a_prompt_larger_than_all_pages_is_refused():
    with pytest.raises(CapacityError, match="needs 13 KV pages, there are 12"):
        scheduler(pages=12).add(request(0, 50))


def test_abort_while_waiting_and_while_running():
    s = scheduler(slots=1)
    first, second = request(0, 100), request(1, 5)
    s.add(first)
    s.add(second)
    run_step(s)
    s.finish(second, FinishReason.abort)
    s.finish(first, FinishReason.abort)
    s.check_integrity()
    assert s.unfinished == 0 and s.schedule() == []


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_finishes_and_leaks_nothing(seed):
    rng = random.Random(seed)
    s = scheduler(pages=rng.randint(20, 60), slots=rng.randint(1, 8), chunk=rng.choice([1, 5, 16, 64]))
    live, arrivals, steps = [], 0, 0
    while arrivals < 40 or s.unfinished:
        if arrivals < 40 and rng.random() < 0.5:
            r = request(arrivals, rng.randint(1, 60), rng.randint(1, 20))
            s.add(r)
            live.append(r)
            arrivals += 1
        live = [r for r in live if not r.finished]
        if live and rng.random() < 0.05:
            s.finish(rng.choice(live), FinishReason.abort)
        sizes = run_step(s)
        tokens, width = sum(sizes.values()), len(sizes)
        assert not sizes or any(c.holds(tokens, width, width) for c in PLANS)
        steps += 1
        assert steps < 5000, "traffic does not finish"
