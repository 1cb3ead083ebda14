"""The cost model against measured times: within 25 % at every point."""

from __future__ import annotations

from tests.bench.cost_model import points


def test_predictions_are_near_what_was_measured() -> None:
    found = list(points())
    assert sum(p.name.startswith("CPU") for p in found) >= 12 and sum(p.name.startswith("H100") for p in found) >= 12
    assert {p.name: f"{p.error:+.0%}" for p in found if abs(p.error) > 0.25} == {}
