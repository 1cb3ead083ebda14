"""Cards without measurements: builds bring kernels to choose from, the card chooses once, measured cards never do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_driver import FakeDriver
from test_cuda_executable import build

from qcn_compile.artifact import read_manifest, read_plan, seal, write_json
from qcn_compile.compile import Options, optimised
from qcn_compile.lowering.buckets import buckets_for
from qcn_compile.lowering.plan import blobs_of, make_plan
from qcn_compile.lowering.schedule import kernels_of, schedule
from qcn_compile.lowering.weights import name_blobs
from qcn_compile.runtime.cuda import choosing
from qcn_compile.runtime.cuda.executable import CudaExecutable
from qcn_compile.runtime.cuda.opening import open_cuda
from qcn_compile.targets.registry import load_target
from qcn_compile.targets.triton.choices import cuts_for, table


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    """A card whose steps take as long as their launches are wide."""
    made = FakeDriver()
    monkeypatch.setattr("qcn_compile.runtime.cuda.driver.bindings", lambda: made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    replayed: list[float] = []
    made._cuGraphLaunch = lambda graph, stream: replayed.append(sum(c.gridDimX for c, _ in graph)) or (0,)  # type: ignore[func-returns-value,attr-defined]
    monkeypatch.setattr("qcn_compile.runtime.cuda.device.CudaDevice.seconds", lambda self, a, b: replayed[-1])
    return made


def choosing_build(folder: Path) -> Path:
    """Two launches of role a, one of role b and one without a choice."""
    build(folder)
    plan, manifest = read_plan(folder, "plan/main.json"), read_manifest(folder)
    row = json.loads((folder / "kernels/kernels.json").read_text())["k"]
    write_json(folder / "kernels/kernels.json", dict.fromkeys(("k", "wide", "narrow", "other"), row))
    own = plan.launches[0]
    role_a = replace(own, grid=(9,), role="a", others=(("wide", (20,)), ("narrow", (4,))))
    role_b = replace(own, grid=(5,), role="b", others=(("other", (6,)),))
    write_json(folder / "plan/main.json", replace(plan, launches=(role_a, own, role_b, role_a)).to_json())
    seal(folder, manifest)
    return folder


def loaded(folder: Path) -> CudaExecutable:
    return open_cuda(folder, read_manifest(folder), 16, 2, None)[1]


def grids(executable: CudaExecutable) -> list[int]:
    return [config.gridDimX for config, _ in executable._graphs["main-decode-2"]]


def test_a_card_chooses_once_and_remembers(fake: FakeDriver, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    folder = choosing_build(tmp_path / "build")
    first = loaded(folder)
    assert grids(first) == [4, 3, 5, 4]
    assert [launch.kernel for launch in first._plans[0].launches] == ["narrow", "k", "k", "narrow"]
    assert "chose kernels for Fake H200" in (said := capsys.readouterr().err) and "a 2, b 0" in said
    replays = fake.calls.count("cuGraphLaunch")
    again = loaded(folder)
    assert grids(again) == [4, 3, 5, 4] and fake.calls.count("cuGraphLaunch") == replays
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["", "{}", '{"picks": {"a": 7, "b": 0}}', '{"picks": {"a": 0}}', "[1]"])
def test_what_it_cannot_use_is_chosen_again(fake: FakeDriver, tmp_path: Path, text: str) -> None:
    folder = choosing_build(tmp_path / "build")
    path = choosing.kept_in(read_manifest(folder), "Fake H200")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert grids(loaded(folder)) == [4, 3, 5, 4]
    assert json.loads(path.read_text())["picks"] == {"a": 2, "b": 0}


def test_a_cache_that_cannot_be_written_is_told(fake: FakeDriver, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache").write_text("a file")
    assert grids(loaded(choosing_build(tmp_path / "build"))) == [4, 3, 5, 4]
    assert "set XDG_CACHE_HOME" in capsys.readouterr().err


def test_measured_cards_have_one_kernel_a_launch_and_others_a_choice() -> None:
    graph = optimised(None, "h100", Options(weights="dummy", quant="fp8"))
    bucket = next(b for b in buckets_for("gpu") if b.tokens == 1)
    for card in ("h100", "a100"):
        target = load_target(card, None)
        made = schedule(graph, bucket, target)
        plan = make_plan(made, name_blobs(dict.fromkeys(blobs_of(made))))[0]
        found = choosing.roles(plan)
        if card in table()["measured"]:
            assert found == {}
            continue
        assert found == {role: len(cuts) for role, cuts in cuts_for(card).items() if role in found}
        assert {"up", "down", "delta", "attention"} <= found.keys()
        assert choosing.kernels([plan]) == {kernel.symbol for kernel in kernels_of([made])}
        for role, count in found.items():
            picked = choosing.with_picks(plan, {role: count - 1})
            assert picked != plan and not choosing.roles(picked)


def test_the_table_is_sound() -> None:
    for card, measured in table()["measured"].items():
        assert {"date", "card", "commit"} <= set(measured) <= {"date", "card", "commit", *table()["candidates"]}, card
    for role, cuts in table()["candidates"].items():
        assert 2 <= len(cuts) <= 6 and len({tuple(sorted(cut.items())) for cut in cuts}) == len(cuts), role
