"""The cost model against measured times: within 25 % at every point."""

from __future__ import annotations

from tests.bench.cost_model import points
from tests.bench.predictions import rows


def test_predictions_are_near_what_was_measured() -> None:
    found = list(points())
    assert sum(p.name.startswith("CPU") for p in found) >= 12 and sum("h100" in p.name.lower() for p in found) >= 12
    assert {p.name: f"{p.error:+.0%}" for p in found if abs(p.error) > 0.25} == {}


def test_every_point_that_waits_for_a_card_is_predicted() -> None:
    """H200, int4, ranks and Blackwell beside what has run; what is measured is measured once."""
    found = list(rows())
    assert all(row.predicted > 0 for row in found) and len({row.name for row in found}) == len(found)
    assert {name for row in found for name in ("h200", "int4-experts", "tp 2", "nvfp4") if name in row.name} == {
        "h200", "int4-experts", "tp 2", "nvfp4"}
