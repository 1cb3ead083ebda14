"""Expert statistics: counted at the routers, the same whatever the plan, and no step is changed by it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import qcn_compile as qcn
from qcn_compile.artifact import Route
from qcn_compile.errors import UsageError
from qcn_compile.runtime import cli
from qcn_compile.runtime.profile import Profile
from qcn_compile.runtime.routing import Routing, read

TOKENS = list(range(100, 141))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qcn.compile(None, "cpu", tmp_path_factory.mktemp("routing") / "build", dtype="fp32", quant="none").path


def test_shared_experts_are_left_out() -> None:
    routing, route = Routing("m"), Route(3, "layer", 0, slots=3, top_k=2, experts=5)
    routing.add(route, np.array([[1, 4, 5], [1, 0, 5]], np.int32))
    routing.add(route, np.array([[4, 1, 5]], np.int32))
    assert routing.to_json()["layers"] == {"layer": [1, 3, 0, 0, 2]}


def test_counting_changes_no_bit_and_no_plan_changes_the_counts(build: Path, tmp_path: Path) -> None:
    with qcn.load(build, threads=1) as model:
        want = model.logits(TOKENS)
    with qcn.load(build, threads=1) as model:
        model.count_experts(tmp_path / "whole.json")
        model.executable.profile = Profile()
        assert np.array_equal(model.logits(TOKENS), want)
        assert all(row.seconds > 0 for row in model.executable.profile.rows("prefill-64"))
    with qcn.load(build, threads=1) as model:
        routing = model.count_experts()
        rows = [model.step([("a", [token])])[0] for token in TOKENS]
        assert np.array_equal(np.concatenate(rows), want)
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert routing.to_json() == whole
    assert whole["model"] == "tiny-coder" and whole["tokens"] == len(TOKENS)
    assert list(whole["layers"]) == [f"model.layers.{i}.mlp" for i in range(8)]
    assert all(sum(counts) == 4 * len(TOKENS) and len(counts) == 16 for counts in whole["layers"].values())


def test_qcn_run_writes_the_file(build: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "routing.json"
    flags = [str(build), "--prompt", "def f", "--max-tokens", "3", "--threads", "1", "--expert-statistics", str(file)]
    assert cli.main(flags) == 0
    assert len(read(file)) == 8
    assert json.loads(file.read_text())["tokens"] >= 4
    assert cli.main([*flags[:-1], str(tmp_path / "none" / "x.json")]) == 2
    assert "cannot write expert statistics to" in capfd.readouterr().err


def test_builds_without_routers_say_so(toy_build: Path) -> None:
    with qcn.load(toy_build, threads=1) as model, pytest.raises(UsageError, match="names no routers in its plans"):
        model.count_experts()


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(UsageError, match="no expert statistics"):
        read(tmp_path / "x.json")
