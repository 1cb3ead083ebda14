"""Builds for 64-bit Arm, made here and run by QEMU; and what is said where no compiler links for it."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import Program, Ragged, Trial, assert_close
from test_attention import PROGRAMS as ATTENTION
from test_cpu_emit import SAMPLE
from test_deltanet import PROGRAMS as DELTANET
from test_linear import DECODING, PREFILLING

from qcn_compile.errors import LoweringError
from qcn_compile.runtime.device import usable
from qcn_compile.targets.cpu import CpuTarget
from qcn_compile.targets.tvm.emit import compiler

GCC, QEMU = "aarch64-linux-gnu-gcc", ("qemu-aarch64-static", "qemu-aarch64")
LIBC = "/usr/aarch64-linux-gnu"  # where Debian's cross packages have it
RUN = [PREFILLING["int4", "int8", 40, 100], DECODING["int8", "int8", 17, 33], DECODING["bf16", "f32", 17, 33],
       ATTENTION[0], DELTANET[0]]
emulator = next(filter(None, map(shutil.which, QEMU)), None)
runs = pytest.mark.skipif(not shutil.which(GCC) or emulator is None or not Path(LIBC).is_dir(),
                          reason=f"needs {GCC} and {QEMU[0]}")


def test_no_compiler_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("qcn_compile.targets.tvm.emit.find_spec", lambda name: None)
    with pytest.raises(LoweringError, match=r"links for aarch64; install aarch64-linux-gnu-gcc .*apt install gcc-aar.*"
                                            r"pip install ziglang.*set CC"):
        CpuTarget("graviton3").emit(SAMPLE[1:2], tmp_path / "out")
    monkeypatch.setattr("qcn_compile.targets.tvm.emit.find_spec", lambda name: object())
    assert compiler("aarch64") == [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu"]


def test_the_dot_product_is_taken_where_the_processor_has_it() -> None:
    paths = [f"kernels/{name}" for name in ("libqcnhost.so", "libkernels-dotprod.so", "libkernels.so")]
    target = CpuTarget("arm64").describe()
    assert target == {"mcpu": "generic", "features": "neon", "variants": {"dotprod": "neon dotprod"}}
    assert usable(paths, target, frozenset({"asimd", "asimddp"})) == paths
    assert usable(paths, target, frozenset({"asimd"})) == [paths[0], paths[2]]
    assert CpuTarget("graviton3").describe() == {"mcpu": "neoverse-v1", "features": "neon dotprod"}


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the libraries of RUN for any 64-bit Arm, and the program that runs them."""
    folder, target = tmp_path_factory.mktemp("arm"), CpuTarget("arm64")
    libraries = target.emit([call.kernel for program in RUN for _, call in program.lower(target)], folder)
    assert libraries == ["libqcnhost.so", "libkernels-dotprod.so", "libkernels.so"]
    subprocess.run([GCC, "-O1", "-o", folder / "run", Path(__file__).with_name("run_kernels.c"), "-ldl"], check=True)
    return folder


def launched(folder: Path, trial: Trial, libraries: list[str]) -> None:
    """Run a trial's kernels under QEMU, each from the first of the libraries that has it, on the trial's buffers."""
    calls = [(call.kernel, [trial.address(op, ref) for ref in call.args])
             for op, call in trial.program.lower(trial.target)]
    views = {view.ctypes.data: view for _, view, _ in trial.buffers.values()}
    numbers, file = {at: i for i, at in enumerate(views)}, folder / "buffers"
    for kernel, addresses in calls:
        file.write_bytes(b"".join(struct.pack("<q", view.nbytes) + view.tobytes() for view in views.values()))
        integer = dict(kernel.params).get("act") == "int8"
        library = folder / libraries[0 if integer else -1]
        arguments = [kernel.symbol, ",".join(str(numbers[at]) for at in addresses)]
        command = [emulator, "-L", LIBC, folder / "run", folder / "libqcnhost.so", library, file, *arguments]
        subprocess.run([str(word) for word in command], check=True)
        data, at = np.frombuffer(file.read_bytes(), np.uint8), 0
        for view in views.values():
            view[...] = data[at + 8:at + 8 + view.nbytes].view(view.dtype).reshape(view.shape)
            at += 8 + view.nbytes


@runs
@pytest.mark.parametrize("program", RUN, ids=lambda p: p.name)
def test_kernels_under_qemu(arm: Path, program: Program) -> None:
    results = []
    for libraries in (["libkernels-dotprod.so", "libkernels.so"], ["libkernels.so"]):
        trial = Trial(program, Ragged((5,)), CpuTarget("arm64"), np.random.default_rng(3))
        launched(arm, trial, libraries)
        done = trial.outcome()
        for got, want in [*zip(done.got, done.want, strict=True), *((g, w) for _, g, w in done.states)]:
            assert_close(got, want, 2e-5, program.name)
        results.append(done.got[-1])
    assert np.array_equal(*results)
