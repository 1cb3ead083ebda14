"""Layouts: what follows from the degrees, and asks that cannot work fail with the number that breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcn_compile.errors import UsageError
from qcn_compile.targets.layout import Layout, layout_for

ASSETS = Path(__file__).parents[2] / "qcn_compile/assets"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((ASSETS / "qwen3-coder-next/config.json").read_text())


def test_tp_8_repeats_key_value_heads(config: dict[str, Any]) -> None:
    layout = layout_for(config, tp=8)
    assert (layout.kv_replication, layout.expert_tp, layout.shared_expert) == (4, 8, "split")
    assert (layout.ranks, layout.gpus, str(layout)) == (8, 8, "tp 8")
    assert layout_for(config, tp=2).kv_replication == 1


def test_block_fp8_at_tp_8(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"--tp 8: 512 / 8 = 64 columns .* 128-blocks of FP8; add --ep 2 or more"):
        layout_for(config, tp=8, fp8_blocks=True)
    layout = layout_for(config, tp=8, ep=2, fp8_blocks=True)
    assert (layout.expert_tp, layout.shared_expert) == (4, "replicated")
    assert layout_for(config, tp=4, fp8_blocks=True).shared_expert == "split"


def test_who_holds_which_expert() -> None:
    layout = Layout(tp=8, ep=4)
    assert [layout.expert_group(rank) for rank in range(8)] == [(e, s) for e in range(4) for s in range(2)]
    assert [layout.expert_group(rank) for rank in range(2)] == [(0, 0), (0, 1)]


def test_stages_cover_all_layers() -> None:
    layout = Layout(pp=5)
    stages = [layout.stage(i, 48) for i in range(5)]
    assert [layer for stage in stages for layer in stage] == list(range(48))
    assert [len(stage) for stage in stages] == [10, 10, 10, 9, 9]


@pytest.mark.parametrize(("degrees", "message"), [
    ({"tp": 3}, "16 attention heads can neither be shared nor repeated evenly by 3 ranks; choose a divisor"),
    ({"tp": 24}, "16 attention heads"),
    ({"tp": 0}, "--tp 0: must be at least 1"),
    ({"tp": 4, "ep": 3}, "--ep 3: the ranks that share experts are the 4 of --tp"),
    ({"ep": 2}, "--ep 2: the ranks that share experts are the 1 of --tp"),
    ({"pp": 49}, "the model has 48 layers"),
])
def test_impossible(config: dict[str, Any], degrees: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layout_for(config, **degrees)


def test_json() -> None:
    layout = Layout(tp=8, ep=2, pp=2, replicas=3, kv_replication=4, shared_expert="replicated")
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    assert (layout.gpus, str(layout)) == (48, "tp 8 x ep 2 x pp 2 x 3 replicas")
