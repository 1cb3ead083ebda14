"""Lookup: the longest, latest match; repetitions; tokens added later; and when a request stops drafting."""

from __future__ import annotations

import random

import pytest

from qcn_compile.runtime.speculation.ngram import LONGEST, SHORTEST, NgramDrafter
from qcn_compile.runtime.speculation.pace import Pace, StepTimes


def naive(tokens, count):
    for size in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size:end] == tokens[-size:]:
                found = list(tokens[end:end + count])
                while len(found) < count:
                    found.append((tokens + found)[end + len(found)])
                return found
    return []


def test_examples():
    assert NgramDrafter().draft([1, 2, 3, 4, 9, 1, 2], 3) == [3, 4, 9]
    assert NgramDrafter().draft([1, 2, 3, 1, 2, 5, 1, 2], 1) == [5]
    assert NgramDrafter().draft([7, 1, 2, 3, 8, 1, 2, 5, 7, 1, 2], 1) == [3]  # longer beats later
    assert NgramDrafter().draft([1, 2, 3, 9, 2], 2) == []
    assert NgramDrafter().draft([4, 4, 4, 4], 3) == [4, 4, 4]
    assert NgramDrafter().draft([1, 2], 3) == [] and NgramDrafter().draft([1, 2, 1, 2], 0) == []


@pytest.mark.parametrize("seed", range(20))
def test_drafts_equal_a_naive_search_as_tokens_come(seed):
    rng = random.Random(seed)
    tokens = [rng.randrange(4) for _ in range(rng.randint(1, 20))]
    drafter = NgramDrafter()
    for _ in range(60):
        tokens += [rng.randrange(4) for _ in range(rng.randint(1, 3))]
        assert drafter.draft(tokens, 5) == naive(tokens, 5)


def test_long_texts_grow_the_buffer():
    tokens = list(range(3000))
    drafter = NgramDrafter()
    assert drafter.draft(tokens, 2) == []
    assert drafter.draft([*tokens, 10, 11, 12], 2) == [13, 14]


def test_pace_pauses_when_drafts_do_not_pay_and_tries_again():
    pace = Pace()
    for _ in range(4):
        assert not pace.pauses()
        pace.add(1, 1.5)
    assert sum(pace.pauses() for _ in range(100)) == 31
    for _ in range(2):
        pace.add(1, 1.5)
    assert sum(pace.pauses() for _ in range(100)) == 63
    for _ in range(50):
        pace.add(3, 1.5)
        assert not pace.pauses()


def test_ratio_is_measured_per_width():
    times = StepTimes()
    assert times.ratio(1) == 1.3
    times.add(1, False, 2.0)
    times.add(1, True, 3.0)
    assert times.ratio(1) == 1.5 and times.ratio(2) == 1.5  # the nearest that was measured
