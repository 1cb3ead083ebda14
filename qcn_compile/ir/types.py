"""Types of the Graph IR: dtypes, symbolic dimensions, tensors, the batch token and cache states."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from math import prod

from qcn_compile.errors import IRError


class DType(Enum):
    """Element types. The value is the text form."""

    f32 = "f32"
    bf16 = "bf16"
    f16 = "f16"
    f8e4m3 = "f8e4m3"
    i64 = "i64"
    i32 = "i32"
    i8 = "i8"
    u8 = "u8"
    i4 = "i4"
    i1 = "bool"

    @property
    def bits(self) -> int:
        """Storage bits of one element."""
        return _BITS[self]

    @property
    def is_float(self) -> bool:
        return self.value in ("f32", "bf16", "f16", "f8e4m3")


DTYPES = {dtype.value for dtype in DType}
_BITS = {DType.f32: 32, DType.bf16: 16, DType.f16: 16, DType.f8e4m3: 8, DType.i64: 64, DType.i32: 32,
         DType.i8: 8, DType.u8: 8, DType.i4: 4, DType.i1: 8}


@dataclass(frozen=True)
class Sym:
    """A symbolic size `scale * name + offset`: T tokens, S sequences, R rows whose logits are wanted."""

    name: str
    scale: int = 1
    offset: int = 0

    def __str__(self) -> str:
        head = self.name if self.scale == 1 else f"{self.scale}*{self.name}"
        return head + (f"+{self.offset}" if self.offset > 0 else str(self.offset) if self.offset < 0 else "")

    def at(self, bindings: dict[str, int]) -> int:
        """The size for given values of the symbols."""
        return self.scale * bindings[self.name] + self.offset


Dim = int | Sym
T, S, R = Sym("T"), Sym("S"), Sym("R")
_SYM = re.compile(r"(?:(\d+)\*)?([A-Z][A-Za-z0-9_]*)([+-]\d+)?$")


def parse_dim(text: str) -> Dim:
    """Inverse of `str(dim)`."""
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if found := _SYM.match(text):
        return Sym(found[2], int(found[1] or 1), int(found[3] or 0))
    raise IRError(f"{text!r} is no dimension: write an int or a symbol such as T, 32*T, S+1")


def size_of(shape: tuple[Dim, ...], bindings: dict[str, int] | None = None) -> int:
    """Number of elements; symbols take their value from `bindings` (missing bindings raise KeyError)."""
    return prod(d if isinstance(d, int) else d.at(bindings or {}) for d in shape)


def product_dim(shape: tuple[Dim, ...]) -> Dim:
    """Product of dimensions, at most one of which may be symbolic."""
    number = prod(d for d in shape if isinstance(d, int))
    symbols = [d for d in shape if isinstance(d, Sym)]
    if not symbols:
        return number
    if len(symbols) > 1:
        raise IRError(f"product of two symbolic sizes in {shape}")
    return Sym(symbols[0].name, symbols[0].scale * number, symbols[0].offset * number)


@dataclass(frozen=True)
class TensorType:
    """A dense tensor: dtype and shape over ints and symbols."""

    dtype: DType
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype.value}[{','.join(str(d) for d in self.shape)}]"

    @property
    def rank(self) -> int:
        return len(self.shape)

    def bytes(self, bindings: dict[str, int] | None = None) -> int:
        """Storage bytes, rounded up to whole bytes."""
        return -(-size_of(self.shape, bindings) * self.dtype.bits // 8)


@dataclass(frozen=True)
class BatchType:
    """The ragged batch of one step: cumulative lengths, context lengths, state slots and block tables."""

    def __str__(self) -> str:
        return "batch"


Type = TensorType | BatchType


class StateKind(Enum):
    """What a cache holds. `kv`: per token; `conv` and `delta`: per sequence."""

    kv = "kv"
    conv = "conv"
    delta = "delta"


@dataclass(frozen=True)
class StateType:
    """One cache of one layer: its kind, element dtype and shape. Shape per token for `kv` ([heads, dim], keys and
    values each), per sequence for `conv` ([channels, width-1]) and `delta` ([value heads, key dim, value dim])."""

    kind: StateKind
    dtype: DType
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind.value} {self.dtype.value}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class StateRef:
    """An attribute that names a state of the graph; printed `@name`."""

    name: str

    def __str__(self) -> str:
        return f"@{self.name}"


def parse_type(text: str) -> Type:
    """Inverse of `str(type)`."""
    text = text.strip()
    if text == "batch":
        return BatchType()
    found = re.fullmatch(r"(\w+)\[([^\]]*)\]", text)
    if not found or found[1] not in DTYPES:
        raise IRError(f"{text!r} is no type: write for example f32[T,2048]")
    dims = tuple(parse_dim(part.strip()) for part in found[2].split(",")) if found[2].strip() else ()
    return TensorType(DType(found[1]), dims)
