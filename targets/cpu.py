"""The CPU target: x86-64 and 64-bit Arm through TVM and LLVM, fp32 activations, weights in f32, bf16, int8 or int4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import numpy as np

from qcn_compile.errors import LoweringError
from qcn_compile.ir.encoding import Encoding, Weight
from qcn_compile.ir.graph import Op
from qcn_compile.ir.types import StateKind, StateType, TensorType
from qcn_compile.targets.base import Bucket, Call, Kernel, Operand
from qcn_compile.targets.spec import Hardware
from qcn_compile.targets.tvm import lowering, packing, processor
from qcn_compile.targets.tvm.lowering.site import Site
from qcn_compile.targets.tvm.sizes import KEYS, state_columns

PAGE = 32  # tokens of a KV page


class CpuTarget:
    """Compiles for the processor it runs on, or for a named one (`mcpu`: an entry of data/cpu.toml or LLVM's name)."""

    name = "cpu"
    kind = "cpu"
    dtype = "f32"

    def __init__(self, mcpu: str | None = None, page_size: int = PAGE) -> None:
        if page_size % KEYS:
            raise LoweringError(f"page size {page_size}: the CPU kernels need a multiple of {KEYS}")
        self.hardware: Hardware = processor.resolve(mcpu)
        self.page_size = page_size

    def describe(self) -> dict[str, object]:
        """What the manifest records of the machine."""
        others = {name: " ".join(chip.features) for name, chip in processor.variants(self.hardware).items()}
        return {"mcpu": processor.llvm_name(self.hardware), "features": " ".join(self.hardware.features),
                **({"variants": others} if others else {})}

    def lower(self, op: Op, operands: Sequence[Operand | None], results: Sequence[TensorType],
              bucket: Bucket) -> list[Call]:
        """The kernel calls that compute `op`. Raises LoweringError naming the op, its location and the cure."""
        int8 = not {"avx2", "neon"}.isdisjoint(self.hardware.features)
        return lowering.lower(Site(op, operands, results, bucket, self.page_size, int8))

    def pack(self, layout: str, encoding: Encoding, weight: Weight) -> dict[str, np.ndarray]:
        """A weight in the kernel's layout: part name -> 1-D array."""
        return packing.pack(layout, encoding, weight)

    def row_block(self, layout: str, encoding: Encoding) -> int:
        """How many rows of a matrix are packed at a time."""
        return packing.row_block(layout)

    def packed_sizes(self, layout: str, encoding: Encoding, shape: tuple[int, ...]) -> dict[str, tuple[str, int]]:
        """Part name -> (element type, bytes) of what `pack` makes of a weight of that shape."""
        return packing.sizes(layout, encoding, shape)

    def cache_unit(self, state: StateType, page_size: int) -> tuple[tuple[int, ...], int]:
        """kv: [heads, dim, page], bytes of keys and values; conv: [W-1, C]; delta: [Hv, Dv/c, Dk, c] in f32 or bf16."""
        if state.kind is StateKind.kv:
            if page_size != self.page_size:
                raise LoweringError(f"page size {page_size}: this target was made for {self.page_size}; "
                                    f"use CpuTarget(page_size={page_size})")
            heads, dim = state.shape
            return (heads, dim, page_size), 2 * 4 * heads * dim * page_size
        if state.kind is StateKind.conv:
            channels, past = state.shape
            return (past, channels), 4 * channels * past
        heads, depth, width = state.shape
        columns = state_columns(width)
        return (heads, width // columns, depth, columns), state.dtype.bits // 8 * prod(state.shape)

    def emit(self, kernels: Sequence[Kernel], folder: Path,
             progress: Callable[[int, int], None] | None = None) -> list[str]:
        """libqcnhost.so, libkernels.so, and their sources beside them; returns the libraries, the host first."""
        from qcn_compile.targets.tvm.emit import emit

        return emit(kernels, folder, self.hardware, progress)
