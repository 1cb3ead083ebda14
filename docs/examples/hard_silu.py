"""A pass that replaces SiLU by an op of your own, with kernels of your own: one for CPUs (TVM), one for GPUs (Triton).

    qcn-compile --plugin docs/examples/hard_silu.py -o build
    qcn-compile --plugin docs/examples/hard_silu.py --target h100 -o build-gpu

SiLU is x * sigmoid(x). Its piecewise-linear relative x * clip(x / 6 + 1/2, 0, 1) needs no exponential. A model that was
trained with SiLU gets worse by it: run this file to see by how much.
"""

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from tvm.tirx.script.builder import ir as T

import qcn_compile as qcn
from qcn_compile.ir.optable import same
from qcn_compile.targets.triton.kernels.common import begin, true_rows
from qcn_compile.targets.tvm.kernels.core import Function, Machine, f32
from qcn_compile.targets.tvm.kernels.loops import count, each, sweep


@qcn.register_op("hard_silu_mul", "gate, up", infer=same())
def hard_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate * clip(gate / 6 + 1/2, 0, 1) * up. Both [T, I]. This is the reference that kernels are tested against."""
    return gate * torch.clamp(gate / 6 + 0.5, 0, 1) * up


@qcn.register_kernel("hard_silu_mul", target="cpu")
def hard_silu_mul_kernel(symbol: str, m: Machine, *, rows: str, times: int, width: int, stride_0: int, stride_1: int,
                         threads: bool) -> Function:
    """One row after another; `sweep` makes vectors of m.lanes elements and handles what is left over."""
    f = Function(symbol, gate="float32", up="float32", y="float32", counts="int32")
    with f as a, each("t", count(a, rows, times), threads) as t:
        def body(i: Any, n: int) -> None:
            x = a.gate[t * (stride_0 or width) + i, n]
            slope = T.max(f32(0.0, n), T.min(f32(1.0, n), x * f32(1 / 6, n) + f32(0.5, n)))
            a.y[t * width + i, n] = x * slope * a.up[t * (stride_1 or width) + i, n]

        sweep(width, m.lanes, body)
    return f


@qcn.register_kernel("hard_silu_mul", target="gpu")
@triton.jit
def hard_silu_mul_gpu(gate, up, y, counts, ROWS: tl.constexpr, TIMES: tl.constexpr, WIDTH: tl.constexpr,
                      BLOCK: tl.constexpr, STRIDE_0: tl.constexpr, STRIDE_1: tl.constexpr, PDL: tl.constexpr):
    """One program a row, BLOCK elements at a time. `begin` comes before anything another kernel wrote is read."""
    row = tl.program_id(0)
    begin(PDL)
    if row < true_rows(counts, ROWS, TIMES):
        for at in tl.static_range(0, WIDTH, BLOCK):
            i = at + tl.arange(0, BLOCK)
            x = tl.load(gate + row * STRIDE_0 + i, mask=i < WIDTH, other=0.0).to(tl.float32)
            slope = tl.minimum(tl.maximum(x / 6 + 0.5, 0.0), 1.0)
            factor = tl.load(up + row * STRIDE_1 + i, mask=i < WIDTH, other=0.0).to(tl.float32)
            tl.store(y + row * WIDTH + i, (x * slope * factor).to(y.dtype.element_ty), mask=i < WIDTH)


@qcn.register_pass
@dataclass(frozen=True)
class UseHardSilu(qcn.RulePass):
    """The pass is one equation."""

    name: ClassVar[str] = "use-hard-silu"
    after: ClassVar[tuple[str, ...]] = ("fuse-epilogue",)
    rules: ClassVar[list[qcn.Rule]] = [
        qcn.Rule("hard silu", "silu_mul(gate, up) => hard_silu_mul(gate, up)", marker="silu_mul")]


def configure(pipeline: qcn.Pipeline) -> None:
    """The shared expert must stay apart: inside `moe_experts` its SiLU is a part of the expert kernels."""
    pipeline.replace("fuse-moe", fold_shared=False)
    pipeline.insert(UseHardSilu(), after="fuse-epilogue")


def main(folder: str = "hard-silu-builds") -> None:
    """Both builds, compared on held-out text."""
    from measure import held_out, report

    qcn.compile(None, "cpu", f"{folder}/plain")
    qcn.compile(None, "cpu", f"{folder}/hard", plugins=(__file__,))
    report("SiLU", f"{folder}/plain", held_out())
    report("hard SiLU", f"{folder}/hard", held_out())


if __name__ == "__main__":
    main(*sys.argv[1:])
