"""The contract between the compiler and a target: lowering ops to kernel calls, packing weights, emitting code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from qcn_compile.ir.encoding import Encoding, Weight
from qcn_compile.ir.graph import Op
from qcn_compile.ir.types import StateType, TensorType

Param = int | float | str | bool


@dataclass(frozen=True)
class Bucket:
    """Capacities of one plan: at most `tokens` tokens of `sequences` sequences, logits for at most `rows` of them.
    `fused`: the sums of ranks go into the norms behind them."""

    name: str
    tokens: int
    sequences: int
    rows: int
    fused: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Values of the symbols T, S, R at capacity."""
        return {"T": self.tokens, "S": self.sequences, "R": self.rows}


@dataclass(frozen=True)
class Operand:
    """What a target may know about an operand: its type, the distance between rows in elements (views of a wider
    buffer have one larger than their width), and, for a weight, its encoding."""

    type: TensorType
    stride: int = 0
    encoding: Encoding | None = None


@dataclass(frozen=True)
class Kernel:
    """A kernel as data: its family and the parameters its source is a pure function of."""

    family: str
    params: tuple[tuple[str, Param], ...]

    @staticmethod
    def make(family: str, **params: Param) -> Kernel:
        return Kernel(family, tuple(sorted(params.items())))

    @property
    def symbol(self) -> str:
        """A readable C symbol, unique per family and parameters."""
        parts = [f"{key}{value}".replace(".", "p").replace("-", "m").replace("+", "") for key, value in self.params]
        return "_".join([self.family, *parts])


@dataclass(frozen=True)
class Ref:
    """A kernel argument before memory is planned.

    operand `index` | result `index` | scratch `name` of `bytes` | blob: weight operand `index`, packed as `layout`,
    `part` of it | state: the cache named by attribute `name`, `part` (k, v or "") | input: runtime array `name`
    """

    kind: str
    index: int = 0
    name: str = ""
    part: str = ""
    layout: str = ""
    bytes: int = 0


@dataclass(frozen=True)
class Call:
    """One launch: the kernel, its arguments in order, and on a GPU its grid for the bucket's capacity; `others` do the
    same, and the card chooses among them for all launches of a `role` at once."""

    kernel: Kernel
    args: tuple[Ref, ...]
    grid: tuple[int, ...] = ()
    role: str = ""
    others: tuple[tuple[Kernel, tuple[int, ...]], ...] = ()


class Target(Protocol):
    """A place where artifacts run: `name` as the user wrote it, `kind` cpu, gpu or null."""

    name: str
    kind: str
    dtype: str  # of activations: "f32" on a CPU, "bf16" on a GPU

    def describe(self) -> dict[str, object]:
        """What the manifest says about the hardware beside name and kind: the architecture kernels are built for."""
        ...

    def lower(self, op: Op, operands: Sequence[Operand | None], results: Sequence[TensorType],
              bucket: Bucket) -> list[Call]:
        """The kernel calls that compute `op`. Raises LoweringError naming the op, its location and the cure."""
        ...

    def pack(self, layout: str, encoding: Encoding, weight: Weight) -> dict[str, np.ndarray]:
        """A weight in the kernel's layout: part name -> 1-D array."""
        ...

    def row_block(self, layout: str, encoding: Encoding) -> int:
        """Matrices, and experts one by one, are packed that many rows (or a multiple) at a time: the results one after
        the other are what `pack` makes of the whole. 0: rows of a matrix cannot be packed apart."""
        ...

    def packed_sizes(self, layout: str, encoding: Encoding, shape: tuple[int, ...]) -> dict[str, tuple[str, int]]:
        """Part name -> (element type, bytes) of what `pack` makes of a weight of that shape."""
        ...

    def cache_unit(self, state: StateType, page_size: int) -> tuple[tuple[int, ...], int]:
        """Shape and bytes of one KV page (keys and values together) or one state slot, as the kernels lay it out."""
        ...

    def emit(self, kernels: Sequence[Kernel], folder: Path,
             progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Compile kernels into libraries under `folder`, sources beside them; returns the file names, host first."""
        ...
