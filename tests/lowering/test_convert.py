"""A conversion that is killed goes on where it stopped and makes the same bytes; one that fails leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qcn_compile.errors import ArtifactError
from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.text import parse_graph
from qcn_compile.lowering import convert as module
from qcn_compile.lowering import weights
from qcn_compile.lowering.convert import convert, key_of, resumable
from qcn_compile.lowering.rows import Tensors
from qcn_compile.lowering.weights import BlobKey, name_blobs, plan_files
from qcn_compile.targets.cpu import CpuTarget

COUNT = 24
TARGET = CpuTarget("x86-64-v3")


class Slow(Tensors):
    """A checkpoint whose reads take a while."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        time.sleep(float(os.environ.get("TEST_SLEEP", "0")))
        return super().rows(name, start, stop)


def plan() -> tuple[list[weights.WeightFile], Slow]:
    lines = "".join(f'  %w{i} : f32[64,96] = weight() {{name="w{i}", dtype=f32, shape=(64,96)}}\n'
                    for i in range(COUNT))
    graph = parse_graph(f"graph @g(%x: f32[T,4]) {{\n{lines}  return %x\n}}\n")
    keys = [BlobKey(op.result, "tiles", Encoding("int4")) for op in graph.ops]
    generator = torch.Generator().manual_seed(0)
    table = {f"w{i}": torch.randn(64, 96, generator=generator).bfloat16() for i in range(COUNT)}
    weights.FILE_BYTES = 7000
    return plan_files(name_blobs(keys), TARGET), Slow(table)


def work(output: Path) -> None:
    """What the subprocess does: convert into the folder that survives it, then into place."""
    files, source = plan()
    with resumable(output, key_of(files, TARGET, "here")) as folder:
        module.take(convert(files, source, TARGET, folder), folder, output)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FILE_BYTES", 7000)


def start(output: Path, pause: float) -> subprocess.Popen[bytes]:
    code = f"from pathlib import Path; from test_convert import work; work(Path({str(output)!r}))"
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, "-c", code],
                            env={**os.environ, "PYTHONPATH": paths, "TEST_SLEEP": str(pause)})


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed_is_the_same(tmp_path: Path, kind: signal.Signals,
                                        capfd: pytest.CaptureFixture[str]) -> None:
    work(tmp_path / "whole")
    output, kept = tmp_path / "output", tmp_path / ".output.weights"
    process = start(output, 0.05)
    while len(list(kept.glob("files/*.sha256"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(kind)
    process.wait(timeout=60)
    assert not output.exists()
    finished = {p: p.stat().st_mtime_ns for p in kept.glob("files/*.safetensors")}
    assert 3 <= len(finished) < len(contents(tmp_path / "whole"))
    asked: list[str] = []
    files, source = plan()

    class Counted(Slow):
        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            asked.append(name)
            return super().rows(name, start, stop)

    with resumable(output, key_of(files, TARGET, "here")) as folder:
        module.take(convert(files, Counted(source.table), TARGET, folder), folder, output)
    assert len(asked) < COUNT
    assert contents(output) == contents(tmp_path / "whole")
    assert not kept.exists()
    capfd.readouterr()


def test_another_checkpoint_starts_anew(tmp_path: Path) -> None:
    files, source = plan()
    with pytest.raises(KeyboardInterrupt), resumable(tmp_path / "out", key_of(files, TARGET, "one")) as folder:
        convert(files, source, TARGET, folder)
        raise KeyboardInterrupt
    assert len(list((tmp_path / ".out.weights/files").glob("*.safetensors"))) == len(files)
    with resumable(tmp_path / "out", key_of(files, TARGET, "two")) as folder:
        assert not folder.exists()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    files, source = plan()
    broken = Slow({name: tensor for name, tensor in source.table.items() if name != f"w{COUNT - 1}"})
    with pytest.raises(KeyError), resumable(tmp_path / "out", "key") as folder:
        convert(files, broken, TARGET, folder)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    files, source = plan()
    whole = convert(files, source, TARGET, tmp_path)
    (tmp_path / files[1].name).write_bytes(b"short")
    (tmp_path / f"{files[2].name}.sha256").write_text("")
    assert convert(files, source, TARGET, tmp_path) == whole
    for file in files:
        assert module.file_sha256(tmp_path / file.name) == whole.sha256[file.name]


def test_two_builds_of_one_output(tmp_path: Path) -> None:
    with resumable(tmp_path / "out", "key"), pytest.raises(ArtifactError, match="another qcn-compile is writing"), \
            resumable(tmp_path / "out", "key"):
        pass


def test_too_small_a_disk_is_told_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = plan()
    big = [weights.WeightFile(f.name, f.keys, f.header, f.offsets, 1 << 60) for f in files]
    with pytest.raises(ArtifactError, match=r"No space left for the weights: they need .* GB more, .* GB are free"):
        convert(big, Slow({}), TARGET, tmp_path / "out")


def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    """A stack of experts many times larger than what the workers may hold."""
    code = """
import resource, sys, torch
from pathlib import Path
from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.text import parse_graph
from qcn_compile.lowering.convert import convert
from qcn_compile.lowering.weights import BlobKey, name_blobs, plan_files
from qcn_compile.targets.cpu import CpuTarget

class Made:
    def rows(self, name, start, stop):
        return torch.full((stop - start, 512, 1024), 0.5, dtype=torch.bfloat16)

text = ('graph @g(%x: f32[T,4]) {\\n'
        '  %e : f32[512,512,1024] = weight() {name="e", dtype=f32, shape=(512,512,1024)}\\n  return %x\\n}\\n')
key = BlobKey(parse_graph(text).ops[0].result, "gate_up", Encoding("int4"))
target = CpuTarget("x86-64-v3")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(plan_files(name_blobs([key]), target), Made(), target, Path(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 200 << 10  # KiB; the stack is 512 MiB in bf16 and 1 GiB in f32
