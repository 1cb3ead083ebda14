"""Agent sessions of a real trace's shape: what is computed over what is new."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_replay import read, replay

TRACE = read(Path(__file__).parents[2] / "data" / "agent_sessions.jsonl")


@pytest.mark.parametrize("setting", [{}, {"strip": True}, {"pages": 9000, "snapshots": 30},
                                     {"pages": 9000, "snapshots": 20, "host": 0}], ids=str)
def test_agent_sessions_compute_little_twice(setting):
    computed, new, total, engine = replay(TRACE[:24], **setting)
    assert computed <= 1.2 * new and computed < total / 4
    assert engine.prefixes.counts.hits >= 20
