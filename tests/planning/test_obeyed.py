"""A build does what the planner says: its table comes first, its choices are built, what cannot be ends it at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import qcn_compile as qcn
from qcn_compile.artifact import read_manifest
from qcn_compile.cli import main
from qcn_compile.errors import UsageError
from qcn_compile.inspect import cli as inspect_cli
from qcn_compile.lowering.weight_errors import weight_errors
from qcn_compile.planning.command import ask_of
from qcn_compile.planning.errors import relative_errors
from qcn_compile.planning.verdict import decide_plan
from qcn_compile.targets.spec import hardware

ASSETS = Path(qcn.__file__).parent / "assets"
BUNDLED, CODER = ASSETS / "tiny-coder", ASSETS / "qwen3-coder-next/config.json"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A build in the mixed scheme, and what qcn-compile printed."""
    folder = tmp_path_factory.mktemp("obeyed")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert main(["-o", str(folder / "build"), "--quant", "int4-experts"]) == 0
    return folder / "build", "\n".join(printed)


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    main(["--plan-only", "--json", *flags])
    return json.loads(capsys.readouterr().out)


def test_the_verdict_comes_first(build: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["--plan-only", "--quant", "int4-experts"])
    table = capsys.readouterr().out.strip()
    assert build[1].startswith(table) and "built " in build[1][len(table):]


def test_what_was_planned_was_built(build: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = build
    plan = planned(capsys, "--quant", "int4-experts")
    manifest = read_manifest(folder)
    assert manifest.decisions["formats"] == {"experts": "int4", "dense": "int8", "head": "int8"}
    assert manifest.decisions["layout"] == plan["layout"] and manifest.decisions["format"] == plan["quant"]
    files = sum((folder / name).stat().st_size for name in manifest.weights["files"])
    assert files == pytest.approx(plan["memory"]["weights"], rel=0.02)
    rows = inspected(capsys, folder)["weights"]
    stored = {row["format"]: row["weights"] for row in rows if row["reason"] == "as asked"}
    assert len(stored["int4"]) == 2 * 8 and len(stored["int8"]) == 6 * 2 + 2 * 4 + 1


def inspected(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, Any]:
    inspect_cli.main(["decisions", str(folder), "--json"])
    return json.loads(capsys.readouterr().out)


def test_errors_are_measured_on_the_checkpoint(tmp_path: Path) -> None:
    """Weights with outliers make four bits worse than the table says, and an automatic choice obeys that."""
    model = tmp_path / "model"
    shutil.copytree(BUNDLED, model)
    usual = weight_errors(model)
    assert {name: pytest.approx(error, rel=0.1) for name, error in usual.items()} == {
        name: error for name, error in relative_errors().items() if name in usual}
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        for tensor in tensors.values():
            if tensor.dim() > 1:
                tensor[..., ::16] *= 20
        save_file(tensors, file)
    worse = weight_errors(model)
    assert worse["int4-g128"] > worse["int4"] > 1.2 * usual["int4"]
    assert worse["fp8"] == pytest.approx(usual["fp8"], rel=0.2)
    config = {**json.loads(CODER.read_text()), "quantization_config": {}}
    chosen = [decide_plan(ask_of("coder", config, hardware("znver5"), "auto", "bf16", None, memory=512, errors=errors))
              for errors in (usual, {**worse, "int4": 0.2})]
    assert [verdict.chosen.scheme.name for verdict in chosen] == ["int4", "int8"]
    assert ("int4, tp 1", "int4 would take") in {(title, reason[:15]) for title, reason in chosen[1].rejected}


def test_blocks_of_an_fp8_checkpoint_bind_a_build_too(tmp_path: Path) -> None:
    config = json.loads(CODER.read_text())
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": blocks}))
    with pytest.raises(UsageError, match=r"512 / 8 = 64 columns .* add --ep 2 or more"):
        qcn.compile(tmp_path, "h100", tmp_path / "build", tp=8, weights="late")


def test_it_runs(build: tuple[Path, str]) -> None:
    with qcn.load(build[0]) as model:
        assert "".join(p.text for p in model.generate("def fib(n):", max_tokens=8, temperature=0)).strip()


def test_every_rejected_candidate_is_on_record(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--target", "h100", "--weights", "dummy", "--model", str(tiny()), "--quant", "auto", "--json",
                 "-o", str(tmp_path / "build"), "--gpus", "1"]) == 0
    capsys.readouterr()
    plan = planned(capsys, "--target", "h100", "--model", str(tiny()), "--gpus", "1")
    report = json.loads((tmp_path / "build/report.json").read_text())["decision"]
    assert report["rejected"] == plan["rejected"] and len(plan["rejected"]) == 6
    assert report["verdict"]["memory"] == plan["memory"]
    inspect_cli.main(["decisions", str(tmp_path / "build")])
    text = capsys.readouterr().out
    assert all(f"not chosen: {row['what']}: {row['reason']}" in text for row in plan["rejected"])


def tiny() -> Path:
    return Path(qcn.__file__).parent / "assets/tiny-coder"


@pytest.mark.parametrize(("flags", "words"), [
    ({"target": "h100", "quant": "none", "tp": 1}, "weights 159.4 GB a chip; 82.5 GB of 85.0 are free for them"),
    ({"target": "cpu", "memory": 0.01}, "weights 0.0 GB a chip; 0.0 GB of 0.0 are free for them"),
    ({"target": "h100", "quant": "fp8", "tp": 1, "context_length": 262144}, "room for 42368 tokens each"),
    ({"target": "b200", "quant": "mxfp4"}, "fits b200 as mxfp4, tp 1, but no kernels are written"),
    ({"target": "cpu", "quant": "experts=fp8"}, "--quant experts=fp8: a cpu has auto, none, int8"),
    ({"target": "a100", "quant": "mxfp4"}, "a100-80 has no mxfp4"),
])
def test_what_cannot_be_ends_it_before_any_work(flags: dict[str, object], words: str, tmp_path: Path) -> None:
    stages: list[str] = []
    with pytest.raises(UsageError, match=words):
        qcn.compile(None, output=tmp_path / "build", report=lambda stage, *_: stages.append(stage), **flags)
    assert not stages and not list(tmp_path.iterdir())
