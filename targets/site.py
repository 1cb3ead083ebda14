"""What every lowering sees: one op with its operands, and short ways to name kernel arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from qcn_compile.errors import LoweringError
from qcn_compile.ir.graph import Op
from qcn_compile.ir.types import Dim, StateRef, TensorType
from qcn_compile.targets.base import Bucket, Operand, Param, Ref

DECODE_TOKENS = 8  # buckets up to this many tokens take kernels that read weights once
COUNTS = Ref("input", name="counts")
BATCH = tuple(Ref("input", name=n) for n in ("token_seq", "cu_seqlens", "context_lens", "block_table", "counts"))
SPANS = tuple(Ref("input", name=n) for n in ("cu_seqlens", "context_lens", "slots", "counts"))


def result(index: int = 0) -> Ref:
    """The buffer of a result."""
    return Ref("result", index=index)


def state(attr: str, part: str = "") -> Ref:
    """The cache that an attribute names."""
    return Ref("state", name=attr, part=part)


def inner(shape: Sequence[Dim]) -> int:
    """Elements of a row: the product of all axes but the first."""
    sizes: list[int] = [int(d) for d in shape[1:]]  # type: ignore[arg-type]
    return prod(sizes)


@dataclass(frozen=True)
class BaseSite:
    """One op to lower, with what a target knows of its operands."""

    op: Op
    operands: Sequence[Operand | None]
    results: Sequence[TensorType]
    bucket: Bucket
    page: int

    @property
    def decode(self) -> bool:
        """Whether the bucket is small: then little work is split over threads."""
        return self.bucket.tokens <= DECODE_TOKENS

    def fail(self, problem: str, cure: str) -> LoweringError:
        """The error to raise: op, place, problem, cure."""
        where = f" at {self.op.loc}" if str(self.op.loc) else ""
        return LoweringError(f"{self.op.name}{where}: {problem}; {cure}")

    def operand(self, index: int) -> Operand:
        """An operand that must be there."""
        found = self.operands[index]
        if found is None:
            raise self.fail(f"operand {index} is missing", "give the op all operands of its table row")
        return found

    def has(self, index: int) -> bool:
        """Whether an optional operand is given."""
        return index < len(self.operands) and self.operands[index] is not None

    def attr(self, name: str) -> Param:
        """A number, string or flag among the attributes."""
        value = self.op.attrs[name]
        if not isinstance(value, int | float | str | bool):
            raise self.fail(f"attribute {name}={value!r} is no plain value", "give a number")
        return value

    def integer(self, name: str) -> int:
        """A whole number among the attributes."""
        return int(self.attr(name))

    def real(self, name: str) -> float:
        """A number among the attributes."""
        return float(self.attr(name))

    def stated(self, attr: str) -> None:
        """Raises unless the attribute names a cache."""
        if not isinstance(self.op.attrs.get(attr), StateRef):
            raise self.fail(f"attribute {attr} names no cache", "bind states before lowering")

    def ref(self, index: int) -> Ref:
        """Data of an operand: a small weight as an f32 vector, anything else as it is."""
        if self.operand(index).encoding is not None:
            return Ref("blob", index=index, layout="vector", part="w")
        return Ref("operand", index=index)

    def frequencies(self, index: int) -> Ref:
        """Rotary frequencies: when static, a blob that a run may replace, with a factor of the table behind them."""
        if self.operand(index).encoding is not None:
            return Ref("blob", index=index, layout="rope", part="w")
        return Ref("operand", index=index)

    def capacity(self, shape: Sequence[Dim]) -> int:
        """Greatest number of rows in this bucket."""
        size = shape[0] if shape else 1
        return size if isinstance(size, int) else size.at(self.bucket.sizes)
