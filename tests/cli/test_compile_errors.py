"""Bad input to qcn-compile: one clear message, a meaningful exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qcn_compile
from qcn_compile.cli import main
from qcn_compile.flags import pass_names
from qcn_compile.frontend.checkpoint import locate

ROOT = Path(qcn_compile.__file__).parents[1]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the bundled checkpoint that a test may damage."""
    source = locate(None, "cpu").path
    assert source is not None
    shutil.copytree(source, tmp_path / "model")
    return tmp_path / "model"


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit code and message of a run that must fail; the message is one paragraph without a traceback."""
    code = main([*argv])
    error = capsys.readouterr().err
    assert code != 0
    assert error.startswith("qcn-compile: ")
    assert "Traceback" not in error
    return code, error


@pytest.mark.parametrize(("argv", "code", "words"), [
    (["--target", "tpu"], 2, ["--target tpu", "unknown"]),
    (["--tp", "3"], 2, ["--tp 3", "4 attention heads"]), (["--tp", "4", "--ep", "3"], 2, ["--ep 3", "the 4 of --tp"]),
    (["--model", "no/such/dir"], 3, ["no/such/dir"]),
    (["--quant", "fp8"], 2, ["--quant fp8"]),
    (["--activations", "int8", "--quant", "none"], 2, ["--activations int8 needs --quant"]),
    (["--context-length", "999999999"], 2, ["999999999", "32768"]),
    (["--context-length", "0"], 2, ["--context-length 0"]),
    (["--disable-pass", "fuse-everything"], 2, ["fuse-everything", "known: canonicalize"]),
    (["--stop-after", "nothing"], 2, ["no pass named 'nothing'"]),
    (["--mcpu", "z80"], 2, ["z80"]),
])
def test_flags(argv: list[str], code: int, words: list[str], tmp_path: Path,
               capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    got, error = fails(capsys, *argv, "-o", str(tmp_path / "build"))
    assert all(word in error for word in words), error
    assert got == code
    assert not list(tmp_path.iterdir())


def test_a_directory_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = fails(capsys, "--model", str(tmp_path), "-o", str(tmp_path / "build"))
    assert code == 3
    assert "config.json" in error


def test_all_wrong_tensors_are_named_at_once(checkpoint: Path, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    file = checkpoint / index["model.norm.weight"]
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.surplus.weight"] = torch.zeros(3)
    wrong = next(name for name in tensors if name.endswith(("in_proj_ba.weight", "o_proj.weight")))
    tensors[wrong] = torch.zeros(5, 7)
    save_file(tensors, file)
    index = {k: v for k, v in index.items() if k != "model.norm.weight"} | {"model.surplus.weight": file.name}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    code, error = fails(capsys, "--model", str(checkpoint), "-o", str(tmp_path / "build"))
    assert code == 3
    for name in ("model.norm.weight", "model.surplus.weight", wrong):
        assert name in error, error


@pytest.mark.parametrize("keep", [0, 5, 1000, -64])
def test_truncated_safetensors(checkpoint: Path, tmp_path: Path, keep: int, capsys: pytest.CaptureFixture[str]) -> None:
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:keep])
    code, error = fails(capsys, "--model", str(checkpoint), "-o", str(tmp_path / "build"))
    assert code == 3
    assert file.name in error
    assert not (tmp_path / "build").exists()


def test_damaged_config(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    code, error = fails(capsys, "--model", str(checkpoint), "-o", str(tmp_path / "build"))
    assert code == 3
    assert "llama" in error
    (checkpoint / "config.json").write_text("{not json")
    assert "config.json" in fails(capsys, "--model", str(checkpoint), "-o", str(tmp_path / "build"))[1]


def test_output_that_is_no_build_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("keep me")
    code, error = fails(capsys, "-o", str(tmp_path / "precious"))
    assert code == 2
    assert "is no build of ours" in error
    assert (tmp_path / "precious" / "file").read_text() == "keep me"


def test_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = fails(capsys, "-o", "/proc/nowhere/build")
    assert code == 4
    assert "cannot write /proc/nowhere/build" in error


def test_full_disk_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real, small file system that fills up while weights are written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], capture_output=True,
                             check=False).returncode == 0
    if not mounted:
        pytest.skip("mounting a file system needs more rights than this process has")
    try:
        code, error = fails(capsys, "-o", str(disk / "build"))
        assert code == 4
        assert "cannot write" in error
        assert "No space left" in error
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_failed_build_keeps_the_old_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = tmp_path / "build"
    assert main(["--target", "null", "-o", str(build), "--json"]) == 0
    before = (build / "manifest.json").read_bytes()
    fails(capsys, "--mcpu", "z80", "-o", str(build))
    assert (build / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["build"]


EARLY = [
    (["--target", "tpu"], 2, "--target tpu: unknown"), (["--target", "mi300x", "--dtype", "fp32"], 2, "--"),
    (["--quant", "fp8"], 2, "fp8 is a GPU format"), (["--activations", "int8", "--quant", "none"], 2, "needs --quant"),
    (["--context-length", "40000"], 2, "at most 32768"), (["--stop-after", "nothing"], 2, "known: canonicalize, fold-"),
    (["--plugin", "gone.py"], 2, "gone.py: no such file"), (["--model", "./gone"], 3, "'./gone' is no directory"),
    (["--model", "."], 3, "config.json"), (["-o", "/usr"], 2, "/usr exists and is no build of ours"),
    (["--emit", "onnx", "--quant", "int4"], 2, "use --emit onnx-fused"),
]


@pytest.mark.parametrize(("argv", "code", "words"), EARLY, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_wrong_flags_answer_before_the_compiler_is_imported(argv: list[str], code: int, words: str,
                                                            tmp_path: Path) -> None:
    hide_the_compiler(tmp_path)
    run = subprocess.run([sys.executable, "-m", "qcn_compile.cli", *argv], capture_output=True, text=True, check=False,
                         cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert run.returncode == code and words in run.stderr, run.stderr
    assert "pip install" not in run.stderr


def test_wrong_flags_of_qcn_opt_too(tmp_path: Path) -> None:
    hide_the_compiler(tmp_path)
    (tmp_path / "a.qir").write_text("graph")
    for argv, words in ((["a.qir", "-p", "nope"], "known: canonicalize, fold-"), (["b.qir"], "cannot read b.qir")):
        run = subprocess.run([sys.executable, "-m", "qcn_compile.opt", *argv], capture_output=True, text=True,
                             check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"})
        assert run.returncode == 2 and words in run.stderr, run.stderr


def test_names_of_passes_are_those_that_register() -> None:
    from qcn_compile.passes.base import REGISTRY

    ours = {name for name, made in REGISTRY.items() if made.__module__.startswith("qcn_compile.passes")}
    assert pass_names() == sorted(ours)


def hide_the_compiler(tmp_path: Path) -> None:
    """torch hidden by an import hook: what a `pip install .` without [compile] looks like."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Hide:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'tvm'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n")


def test_without_the_compiler_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    hide_the_compiler(tmp_path)
    run = subprocess.run([sys.executable, "-m", "qcn_compile.cli", "-o", str(tmp_path / "b")], capture_output=True,
                         text=True, check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert run.returncode == 2
    assert "pip install 'qcn-compile[compile]'" in run.stderr
    assert "Traceback" not in run.stderr


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    import signal
    import time

    run = subprocess.Popen([sys.executable, "-m", "qcn_compile.cli", "-o", str(tmp_path / "build")],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.iterdir()) and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130, error
    assert "interrupted" in error
    assert not list(tmp_path.iterdir())


def test_what_a_killed_build_left_is_cleared_away(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    for process in (gone.pid, os.getppid()):
        (tmp_path / f".build.partial-{process}").mkdir()
    assert main(["--target", "null", "-o", str(tmp_path / "build"), "--json"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".build.partial-{os.getppid()}", "build"]
