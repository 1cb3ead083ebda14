"""The GPU targets: cards through Triton, bf16 activations, weights in bf16, fp8 or nvfp4, state in f32, KV in bf16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import numpy as np

from qcn_compile.errors import LoweringError
from qcn_compile.ir.encoding import Encoding, Weight
from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.types import DType, StateKind, StateType, TensorType
from qcn_compile.targets.base import Bucket, Call, Kernel, Operand
from qcn_compile.targets.spec import Hardware, hardware
from qcn_compile.targets.triton import lowering, packing
from qcn_compile.targets.triton.choices import cuts_for
from qcn_compile.targets.triton.exchange import with_norms
from qcn_compile.targets.triton.lowering.site import FEW, Site
from qcn_compile.targets.triton.narrow import narrowing
from qcn_compile.targets.triton.specialise import choice, specialise

PAGE = 32  # tokens of a KV page
RING = 16  # inputs a convolution's ring holds; see kernels/delta.py
TAPS = 4  # widest convolution the ring is large enough for


class GpuTarget:
    """Compiles for one card by name, on a machine that needs none."""

    kind = "gpu"
    dtype = "bf16"

    def __init__(self, name: str, page_size: int = PAGE) -> None:
        self.hardware: Hardware = hardware(name)
        self.name = name
        self.page_size = page_size
        self.cuts = cuts_for(name)
        nvidia = self.hardware.vendor == "nvidia"  # AMD numbers its architectures otherwise, gfx942 has another e4m3
        self.narrow = nvidia and "fp8" in self.hardware.dtypes and self.hardware.arch >= 90  # the kernels' e4m3 type
        assert RING >= FEW + TAPS

    def describe(self) -> dict[str, object]:
        """What the manifest records of the card; limits on file: GB/s, and GFLOP/s of bf16 products."""
        chip = self.hardware
        limits = {"read": chip.bandwidth.value, "flops": chip.flops.value} if chip.bandwidth and chip.flops else None
        vendor = {} if chip.vendor == "nvidia" else {"vendor": chip.vendor}
        return {"arch": chip.arch, "shared": chip.shared, "limits": limits, **vendor}

    def specialise(self, ops: Sequence[Op], outputs: Sequence[Value], bucket: Bucket) -> list[Op]:
        """The ops of a bucket: in some, ops are fused that stay apart in others; last, the choice of tokens."""
        if self.narrow and bucket.tokens > FEW:
            ops = narrowing(ops, outputs, bucket.sequences == bucket.tokens)
        if bucket.fused:
            ops = with_norms(ops, bucket.tokens == 1)
        return [*specialise(ops, outputs, bucket), *(choice(logits) for logits in outputs[:1])]

    def lower(self, op: Op, operands: Sequence[Operand | None], results: Sequence[TensorType],
              bucket: Bucket) -> list[Call]:
        """The kernel calls that compute `op`. Raises LoweringError naming the op, its location and the cure."""
        return lowering.lower(Site(op, operands, results, bucket, self.page_size, RING, self.narrow, self.cuts))

    def pack(self, layout: str, encoding: Encoding, weight: Weight) -> dict[str, np.ndarray]:
        """A weight in the kernel's layout: part name -> 1-D array."""
        return packing.pack(layout, encoding, weight)

    def row_block(self, layout: str, encoding: Encoding) -> int:
        """How many rows of a matrix are packed at a time."""
        return packing.row_block(layout, encoding)

    def packed_sizes(self, layout: str, encoding: Encoding, shape: tuple[int, ...]) -> dict[str, tuple[str, int]]:
        """Part name -> (element type, bytes) of what `pack` makes of a weight of that shape."""
        return packing.sizes(layout, encoding, shape)

    def cache_unit(self, state: StateType, page_size: int) -> tuple[tuple[int, ...], int]:
        """kv bf16 or e4m3: ([heads, page, dim], bytes of keys and values); conv bf16: [RING, C]; delta f32 or
        bf16: [Hv, Dk, Dv]."""
        if state.kind is StateKind.kv:
            heads, dim = state.shape
            return (heads, page_size, dim), 2 * heads * dim * page_size * state.dtype.bits // 8
        if state.kind is StateKind.conv:
            if state.shape[1] >= TAPS:
                raise LoweringError(f"a convolution over {state.shape[1] + 1} tokens: the GPU kernels hold {TAPS}")
            return (RING, state.shape[0]), 2 * RING * state.shape[0]
        if state.dtype not in (DType.f32, DType.bf16):
            raise LoweringError(f"a DeltaNet state in {state.dtype.value}: the GPU kernels keep it in f32 or bf16")
        return state.shape, prod(state.shape) * state.dtype.bits // 8

    def emit(self, kernels: Sequence[Kernel], folder: Path,
             progress: Callable[[int, int], None] | None = None) -> list[str]:
        """kernels.json and one cubin a kernel, sources beside them; returns the file names, kernels.json first."""
        from qcn_compile.targets.triton.emit import emit

        return emit(kernels, folder, self.hardware, progress)
