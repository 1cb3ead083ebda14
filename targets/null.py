"""The null target: it lowers and packs like the CPU, and compiles everything to nothing. For looking at plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qcn_compile.ir.encoding import Encoding, Weight
from qcn_compile.ir.graph import Op
from qcn_compile.ir.types import StateType, TensorType
from qcn_compile.targets.base import Bucket, Call, Kernel, Operand
from qcn_compile.targets.cpu import CpuTarget


class NullTarget:
    """Every launch is planned, none can run; weights take no bytes."""

    name = "null"
    kind = "null"
    dtype = "f32"

    def __init__(self) -> None:
        self._cpu = CpuTarget("x86-64-v3")

    def describe(self) -> dict[str, object]:
        """What the manifest records of the machine."""
        return {}

    def lower(self, op: Op, operands: Sequence[Operand | None], results: Sequence[TensorType],
              bucket: Bucket) -> list[Call]:
        """The CPU's launches."""
        return self._cpu.lower(op, operands, results, bucket)

    def pack(self, layout: str, encoding: Encoding, weight: Weight) -> dict[str, np.ndarray]:
        """The CPU's blobs."""
        return self._cpu.pack(layout, encoding, weight)

    def row_block(self, layout: str, encoding: Encoding) -> int:
        """As on the CPU."""
        return self._cpu.row_block(layout, encoding)

    def packed_sizes(self, layout: str, encoding: Encoding, shape: tuple[int, ...]) -> dict[str, tuple[str, int]]:
        """As on the CPU."""
        return self._cpu.packed_sizes(layout, encoding, shape)

    def cache_unit(self, state: StateType, page_size: int) -> tuple[tuple[int, ...], int]:
        """The CPU's layout."""
        return self._cpu.cache_unit(state, page_size)

    def emit(self, kernels: Sequence[Kernel], folder: Path,
             progress: Callable[[int, int], None] | None = None) -> list[str]:
        """No libraries: the runtime says that such a build runs nothing."""
        if progress is not None:
            progress(len(kernels), len(kernels))
        return []
