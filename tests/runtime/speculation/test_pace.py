"""Whether drafts pay is decided from measured times: near the better of drafting and not, whatever they cost."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from qcn_compile.runtime.speculation.pace import StepTimes
from qcn_compile.runtime.speculation.speculation import Speculation


def seconds_per_token(drafts: int, cost: float, rate: float, tokens: int = 4000) -> float:
    """A request decoded by the pace, where a plain step takes 1 and one with drafts `cost`, and each draft comes true
    at `rate` when those before it did."""
    speculation = Speculation(1, drafts, SimpleNamespace(left=lambda request: None))  # type: ignore[arg-type]
    request = SimpleNamespace(id="a", lag=0, max_tokens=tokens + 99, generated=0, drafted=0, accepted=0)
    dice, spent = random.Random(0), 0.0
    while request.generated < tokens:
        wanted = speculation.wanted(request, 99)  # type: ignore[arg-type]
        taken = 1
        while taken <= wanted and dice.random() < rate:
            taken += 1
        seconds = (cost if wanted else 1.0) * dice.uniform(0.9, 1.1)
        speculation.verified(request, wanted, taken, 0, 1)  # type: ignore[arg-type]
        speculation.times.add(1, wanted > 0, seconds)
        request.generated, spent = request.generated + taken, spent + seconds
    return spent / request.generated


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize(("drafts", "cost"), [(1, 1.53), (3, 3.0), (3, 1.3), (1, 1.9)])
def test_drafts_only_where_they_pay(drafts: int, cost: float, rate: float) -> None:
    drafting = cost / sum(rate ** n for n in range(drafts + 1))
    assert seconds_per_token(drafts, cost, rate) <= 1.1 * min(1.0, drafting)


def test_a_plain_step_is_measured_soon_and_now_and_then() -> None:
    times = StepTimes()
    for _ in range(8):
        assert not times.plain_due and times.ratio(1) == 1.3
        times.add(1, True, 3.0)
    assert times.plain_due
    times.add(1, False, 2.0)
    for _ in range(128):
        assert not times.plain_due
        times.add(1, True, 3.0)
    assert times.plain_due and times.ratio(1) == times.ratio(8) == pytest.approx(1.5)
    times.add(8, False, 4.0)
    times.add(8, True, 8.0)
    assert not times.plain_due and times.ratio(6) == 2 and times.ratio(2) == pytest.approx(1.5)
