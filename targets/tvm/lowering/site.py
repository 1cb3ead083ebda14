"""What a lowering sees: one op with its operands, and short ways to name kernel arguments. Imports no TVM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from qcn_compile.errors import LoweringError, UsageError
from qcn_compile.ir.encoding import Encoding, check
from qcn_compile.ir.graph import Op
from qcn_compile.ir.types import Dim, DType, StateRef, Sym, TensorType
from qcn_compile.targets.base import Bucket, Call, Kernel, Operand, Param, Ref

DECODE_TOKENS = 8  # buckets up to this many tokens get kernels tuned for reading weights once
COUNTS = Ref("input", name="counts")
BATCH = tuple(Ref("input", name=n) for n in ("token_seq", "cu_seqlens", "context_lens", "block_table", "counts"))
SPANS = tuple(Ref("input", name=n) for n in ("cu_seqlens", "context_lens", "slots", "counts"))


def result(index: int = 0) -> Ref:
    """The buffer of a result."""
    return Ref("result", index=index)


def scratch(name: str, size: int) -> Ref:
    """Temporary memory of this op, `size` bytes."""
    return Ref("scratch", name=name, bytes=max(64, -(-size // 64) * 64))


def state(attr: str, part: str = "") -> Ref:
    """The cache that an attribute names."""
    return Ref("state", name=attr, part=part)


@dataclass(frozen=True)
class Site:
    """One op to lower, with what the target knows of its operands and of the machine."""

    op: Op
    operands: Sequence[Operand | None]
    results: Sequence[TensorType]
    bucket: Bucket
    page: int
    avx2: bool

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

    def float_type(self, index: int) -> TensorType:
        """The type of an f32 operand."""
        type_ = self.operand(index).type
        if type_.dtype is not DType.f32:
            raise self.fail(f"operand {index} is {type_}, CPU kernels compute in f32", "cast the graph to f32 first")
        return type_

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
        """f32 data of an operand: a small weight as a vector blob, anything else as it is."""
        self.float_type(index) if self.operand(index).encoding is None else None
        if self.operand(index).encoding is not None:
            return Ref("blob", index=index, layout="vector", part="w")
        return Ref("operand", index=index)

    def blob(self, index: int, layout: str, part: str = "w") -> Ref:
        """A part of a packed weight."""
        return Ref("blob", index=index, layout=layout, part=part)

    def encoding(self, index: int) -> Encoding:
        """How a large weight is stored."""
        found = self.operand(index).encoding
        if found is None:
            raise self.fail(f"operand {index} is no weight", "only weights of the checkpoint can be multiplied with")
        try:
            check(found)
        except UsageError as error:
            raise self.fail(f"operand {index}", str(error)) from None
        if found.activations == "int8" and not self.avx2:
            raise self.fail("int8 activations need AVX2, which this processor level lacks",
                            "encode the weight with activations=f32 or choose x86-64-v3 or newer")
        return found

    def rows(self, shape: Sequence[Dim]) -> dict[str, Param]:
        """Kernel parameters `rows` and `times` of a leading axis: a symbol and its factor, or a number."""
        size = shape[0]
        if isinstance(size, Sym):
            if size.offset:
                raise self.fail(f"leading size {size}", "only multiples of T, S and R are supported")
            return {"rows": size.name, "times": size.scale}
        return {"rows": str(size), "times": 1}

    def capacity(self, shape: Sequence[Dim]) -> int:
        """Greatest number of rows in this bucket."""
        size = shape[0]
        return size if isinstance(size, int) else size.at(self.bucket.sizes)

    def stride(self, index: int) -> int:
        """Distance between rows of an operand, 0 when dense."""
        found = self.operand(index)
        return 0 if found.stride in (0, inner(found.type.shape)) else found.stride


def inner(shape: Sequence[Dim]) -> int:
    """Elements of a row: the product of all axes but the first."""
    sizes: list[int] = [int(d) for d in shape[1:]]  # type: ignore[arg-type]
    return prod(sizes)


def call(family: str, args: Sequence[Ref], **params: Param) -> Call:
    """One launch."""
    return Call(Kernel.make(family, **params), tuple(args))
