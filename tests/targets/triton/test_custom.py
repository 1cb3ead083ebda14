"""Triton kernels of plugins: compiled to a cubin without a GPU, equal to their reference, blamed by file and op."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import MANY, ONE
from harness_gpu import DECODE_1, PREFILL, Case, Ragged, check
from interpreter import Interpreter

import qcn_compile as qcn
from qcn_compile.errors import LoweringError, UsageError
from qcn_compile.ir.optable import TABLE
from qcn_compile.plugins import load_plugins
from qcn_compile.targets.triton.emit import emit
from qcn_compile.targets.triton.families import FAMILIES
from qcn_compile.targets.triton.lowering import LOWERINGS
from qcn_compile.targets.triton.target import GpuTarget

EXAMPLE = Path(__file__).parents[3] / "docs/examples/hard_silu.py"
TARGET = GpuTarget("h100")
PLUGIN = '''
import triton
import triton.language as tl
import qcn_compile as qcn
from qcn_compile.ir.optable import same

@qcn.register_op("scaled", "x, w", by=float, infer=same())
def scaled(x, w, *, by):
    "by * x * w."
    return by * x * w

@qcn.register_kernel("scaled", target="gpu")
@triton.jit
def scaled_kernel(x, w, y, counts, by: tl.constexpr, ROWS: tl.constexpr, TIMES: tl.constexpr, WIDTH: tl.constexpr,
                  BLOCK: tl.constexpr, STRIDE_0: tl.constexpr, STRIDE_1: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    if row < tl.load(counts) * TIMES:
        v = tl.load(x + row * STRIDE_0 + i, mask=i < WIDTH).to(tl.float32)
        tl.store(y + row * WIDTH + i, (v * tl.load(w + i, mask=i < WIDTH) * by).to(tl.bfloat16), mask=i < WIDTH)
'''


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    for name in ("scaled", "hard_silu_mul"):
        LOWERINGS.pop(name, None)
        FAMILIES.pop(f"custom_{name}", None)
    TABLE.pop("scaled", None)


def hard_silu(bucket: object = PREFILL, width: int = 70) -> Case:
    module = load_plugins([EXAMPLE], installed=False)[0].module  # loaded once a process, registered for every test
    qcn.register_kernel("hard_silu_mul", target="gpu")(module.hard_silu_mul_gpu)
    case = Case("hard_silu_mul", bucket)
    case.op("hard_silu_mul", [case.input("gate", f"bf16[T,{width}]", more=width),
                              case.input("up", f"bf16[T,{width}]", more=2)])
    return case


def scaled(folder: Path, text: str = PLUGIN, name: str = "mine.py") -> Case:
    (folder / name).write_text(text)
    load_plugins([folder / name], installed=False)
    case = Case("scaled")
    case.op("scaled", [case.input("x", "bf16[T,20]"), case.weight("w", (20,), scale=1.0)], by=0.5)
    return case


@pytest.mark.parametrize(("width", "batches"), [(70, MANY), (1030, ONE)])
def test_the_example_equals_its_reference(interpreter: Interpreter, width: int, batches: list[Ragged]) -> None:
    case = hard_silu(PREFILL if batches is MANY else DECODE_1, width)
    for seed, ragged in enumerate(batches):
        check(interpreter, TARGET, case, ragged, seed)


def test_a_kernel_with_attributes_and_a_weight(interpreter: Interpreter, tmp_path: Path) -> None:
    check(interpreter, TARGET, scaled(tmp_path), Ragged((13,)))


@pytest.mark.parametrize("card", ["a100", "h100", "b200"])
def test_cubins_without_a_gpu(card: str, tmp_path: Path) -> None:
    cases = [hard_silu(), scaled(tmp_path)]
    kernels = [call.kernel for case in cases for _, call in case.lower(GpuTarget(card))]
    emit(kernels, tmp_path / "kernels", GpuTarget(card).hardware, workers=1)
    index = json.loads((tmp_path / "kernels/kernels.json").read_text())
    example, mine = (index[kernel.symbol] for kernel in kernels)
    assert (tmp_path / "kernels" / example["file"]).read_bytes()[:4] == b"\x7fELF"
    assert (tmp_path / "kernels" / example["source"]).read_text() == EXAMPLE.read_text()
    assert example["stack"] == mine["stack"] == 0
    assert example["pdl"] is (card != "a100") and mine["pdl"] is False  # it has no parameter PDL
    assert example["pointers"] == 4 and example["loose"] == [0, 1, 2]


def test_failures_name_the_plugin_and_the_op(tmp_path: Path) -> None:
    case = scaled(tmp_path, PLUGIN.replace("tl.load(w + i", "nothing(w + i"), "broken.py")
    with pytest.raises(LoweringError, match=r"kernel custom_scaled_\w+ of plugin .*broken.py: Triton cannot compile it "
                                            r"for h100-80: [\s\S]*nothing"):
        emit([c.kernel for _, c in case.lower(TARGET)], tmp_path / "kernels", TARGET.hardware, workers=1)


@pytest.mark.parametrize(("old", "new", "message"), [
    ("STRIDE_0: tl.constexpr, STRIDE_1: tl.constexpr", "STRIDE_0: tl.constexpr",
     r"scaled at test.scaled: its kernel scaled_kernel \(in .*mine.py\) takes no STRIDE_1; add it as a tl.constexpr"),
    ("BLOCK: tl.constexpr", "BLOCK: tl.constexpr, MORE: tl.constexpr", "wants MORE, which its lowering does not give")])
def test_parameters_are_checked_at_once(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        scaled(tmp_path, PLUGIN.replace(old, new)).lower(TARGET)


def test_what_cannot_be_a_kernel() -> None:
    with pytest.raises(UsageError, match=r"target='h100'\): choose cpu \(TVM\) or gpu \(Triton, all cards\)"):
        qcn.register_kernel("scaled", target="h100")
    with pytest.raises(UsageError, match="is no Triton kernel; decorate it with @triton"):
        qcn.register_kernel("scaled", target="gpu")(lambda x: x)
    with pytest.raises(UsageError, match="needs signature= too"):
        qcn.register_kernel("scaled", target="gpu", lower=lambda site: [])


def test_a_kernel_typed_into_a_prompt_is_refused() -> None:
    code = ("import triton, qcn_compile as qcn\nclass F:\n  arg_names = ['x']\n  __name__ = 'f'\n"
            "  __module__ = '__main__'\nqcn.register_kernel('scaled', target='gpu')(F())\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert "f is in no file; put it into one" in done.stderr
