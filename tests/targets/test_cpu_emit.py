"""Emission: repeatable bytes, no heap in kernels, readable sources, other processors, clear failures."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness import PREFILL, Lab, Program
from test_attention import PROGRAMS as ATTENTION

from qcn_compile.errors import LoweringError
from qcn_compile.ir.encoding import Encoding
from qcn_compile.runtime.device import usable
from qcn_compile.targets.base import Kernel
from qcn_compile.targets.cpu import CpuTarget
from qcn_compile.targets.spec import Hardware, hardware
from qcn_compile.targets.tvm.emit import compiled, kernel_function

SAMPLE = [
    Kernel.make("linear", n=40, k=100, fmt="int4", act="int8", rows="T", times=1, stride=0, many=False, add="",
                stride_r=0),
    Kernel.make("rms_norm", rows="T", times=1, heads=1, width=100, stride=0, eps=1e-6, threads=True),
    Kernel.make("rope_table", rows="T", width=8, scaling=1.0, threads=False, factor=True),
]


def test_builds_are_byte_for_byte_equal(tmp_path: Path) -> None:
    target = CpuTarget()
    names = [target.emit(order, tmp_path / name) for name, order in (("a", SAMPLE), ("b", SAMPLE[::-1]))]
    assert names[0] == names[1] == ["libqcnhost.so", "libkernels.so"]
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 5 + len(SAMPLE)  # two libraries, the C of the host, its memory and ranks, a source a kernel
    _, different, missing = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", [str(f) for f in files], shallow=False)
    assert (different, missing) == ([], [])
    assert str(tmp_path).encode() not in (tmp_path / "a" / "libkernels.so").read_bytes()


def test_equal_in_another_process(tmp_path: Path) -> None:
    """Hash seeds and memory addresses leave no trace."""
    code = ("import sys; from pathlib import Path; from test_cpu_emit import SAMPLE;"
            "from qcn_compile.targets.cpu import "
            "CpuTarget; CpuTarget().emit(SAMPLE, Path(sys.argv[1]))")
    for name, seed in (("a", "1"), ("b", "2")):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True,
                       env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"})
    assert filecmp.cmp(tmp_path / "a" / "libkernels.so", tmp_path / "b" / "libkernels.so", shallow=False)


def test_sources_are_readable(lab: Lab) -> None:
    kernels = {call.kernel for calls in lab.launches.values() for _, call in calls}
    files = {p.stem: p.read_text() for p in (lab.folder / "source").glob("*.py")}
    assert set(files) == {k.symbol for k in kernels}
    assert all("@T.prim_func" in text for text in files.values())
    assert (lab.folder / "host.c").is_file()


def test_no_kernel_takes_memory_from_the_heap(lab: Lab) -> None:
    """Stack arrays that grow past TVM's limit would become heap calls in inner loops."""
    text = subprocess.run(["nm", "-D", lab.folder / "libkernels.so"], capture_output=True, text=True, check=True).stdout
    assert "AllocWorkspace" not in text


@pytest.mark.parametrize("mcpu", ["x86-64-v2", "x86-64-v3", "x86-64-v4", "znver3", "sapphirerapids", "cascadelake"])
def test_other_processors_compile(mcpu: str) -> None:
    target = CpuTarget(mcpu)
    program = ATTENTION[0]
    kernels = [call.kernel for _, call in program.lower(target)] + SAMPLE[1:]
    if "avx2" in target.hardware.features:
        kernels.append(SAMPLE[0])
    functions = [kernel_function(kernel, target.hardware) for kernel in kernels]
    assembly = compiled(functions, target.hardware).inspect_source("asm")
    assert ("vfmadd" in assembly) == ("avx2" in target.hardware.features)
    assert "AllocWorkspace" not in assembly


@pytest.mark.parametrize(("chip", "instruction", "registers"), [
    (replace(hardware("x86-64-v3"), features=("avx2", "avxvnni")), "vpdpbusd", "%ymm"),
    (replace(hardware("x86-64-v4"), features=("avx2", "avx512", "vnni")), "vpdpbusd", "%zmm"),
    (hardware("neoverse-n1"), "sdot", ".4s"),
], ids=["avxvnni", "avx512vnni", "arm"])
@pytest.mark.parametrize("form", ["int4", "int8"])
def test_dot_product_instructions(chip: Hardware, instruction: str, registers: str, form: str) -> None:
    """They cannot run everywhere, but they compile: one instruction for each 4 products of all lanes."""
    kernel = Kernel.make("linear", **{**dict(SAMPLE[0].params), "fmt": form})
    assembly = compiled([kernel_function(kernel, chip)], chip).inspect_source("asm")
    found = [line for line in assembly.splitlines() if instruction in line.split()[:2]]  # perhaps after {vex}
    assert len(found) >= 16 and registers in assembly
    assert all("%zmm" not in line for line in found) or registers == "%zmm"
    assert "AllocWorkspace" not in assembly


def test_a_portable_build_has_the_integer_kernels_several_times(tmp_path: Path) -> None:
    target = CpuTarget("portable")
    libraries = target.emit(SAMPLE, tmp_path)
    assert libraries == ["libqcnhost.so", "libkernels-avx512vnni.so", "libkernels-avxvnni.so", "libkernels.so"]
    symbols = [subprocess.run(["nm", "-D", tmp_path / name], capture_output=True, text=True, check=True).stdout
               for name in libraries[1:]]
    assert [SAMPLE[0].symbol in text for text in symbols] == [True] * 3
    assert [SAMPLE[1].symbol in text for text in symbols] == [False, False, True]
    paths, base = [f"kernels/{name}" for name in libraries], {"avx2", "fma", "f16c"}
    wide = base | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    for flags, chosen in ((base, []), (base | {"avx_vnni"}, [2]), (wide | {"avx512_vnni", "avx_vnni"}, [1]),
                          (wide, [])):
        wanted = [paths[i] for i in (0, *chosen, 3)]
        assert usable(paths, target.describe(), frozenset(flags)) == wanted


def test_int8_activations_need_avx2() -> None:
    p = Program("int8 activations", PREFILL)
    p.op("linear", [p.input("x", "f32[T,64]"), p.weight("w", (32, 64), Encoding("int4", 32, "int8"))])
    with pytest.raises(LoweringError, match=r"linear at test.int8 activations: int8 .* AVX2.*activations=f32"):
        p.lower(CpuTarget("x86-64-v2"))
    p.lower(CpuTarget("x86-64-v3"))


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LoweringError, match=r"no C compiler found.*install gcc or clang, or set CC"):
        CpuTarget().emit(SAMPLE[1:2], tmp_path / "out")
    monkeypatch.setenv("CC", "/nowhere/gcc -m64")
    with pytest.raises(LoweringError, match="cannot run the C compiler /nowhere/gcc"):
        CpuTarget().emit(SAMPLE[1:2], tmp_path / "out")


def test_progress_counts_kernels(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    CpuTarget().emit(SAMPLE, tmp_path, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
