"""What a lowering sees: one op with its operands, and short ways to name kernel arguments. Imports no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from qcn_compile.errors import LoweringError
from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.graph import Op
from qcn_compile.ir.types import Dim, DType, StateRef, Sym, TensorType
from qcn_compile.targets.base import Bucket, Call, Kernel, Operand, Param, Ref
from qcn_compile.targets.triton.families import ITEMSIZE

DECODE_TOKENS = 8  # buckets up to this many tokens take kernels that read weights and states once per token
COUNTS = Ref("input", name="counts")
BATCH = tuple(Ref("input", name=n) for n in ("token_seq", "cu_seqlens", "context_lens", "block_table", "counts"))
SPANS = tuple(Ref("input", name=n) for n in ("cu_seqlens", "context_lens", "slots", "counts"))
TOKEN_SEQ = Ref("input", name="token_seq")
COUNT = {"T": 0, "S": 1, "R": 2}


def result(index: int = 0) -> Ref:
    """The buffer of a result."""
    return Ref("result", index=index)


def scratch(name: str, elements: int, dtype: str) -> Ref:
    """Temporary memory of this op."""
    return Ref("scratch", name=name, bytes=max(64, -(-elements * ITEMSIZE[dtype] // 64) * 64))


def state(attr: str, part: str = "") -> Ref:
    """The cache that an attribute names."""
    return Ref("state", name=attr, part=part)


def power(n: int, least: int = 1) -> int:
    """The next power of two: block sizes."""
    return max(least, 1 << (n - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def inner(shape: Sequence[Dim]) -> int:
    """Elements of a row: the product of all axes but the first."""
    sizes: list[int] = [int(d) for d in shape[1:]]  # type: ignore[arg-type]
    return prod(sizes)


def call(family: str, args: Sequence[Ref], grid: Sequence[int], **params: Param) -> Call:
    """One launch."""
    return Call(Kernel.make(family, **params), tuple(args), tuple(grid))


@dataclass(frozen=True)
class Site:
    """One op to lower, with what the target knows of its operands and of the card."""

    op: Op
    operands: Sequence[Operand | None]
    results: Sequence[TensorType]
    bucket: Bucket
    page: int
    ring: int

    @property
    def decode(self) -> bool:
        """Whether the bucket is small."""
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

    def activation(self, index: int) -> TensorType:
        """The type of a bf16 operand."""
        type_ = self.operand(index).type
        if type_.dtype is not DType.bf16:
            raise self.fail(f"operand {index} is {type_}, GPU kernels take bf16", "trace the model in bf16")
        return type_

    def integer(self, name: str) -> int:
        """A whole number among the attributes."""
        return int(self.op.attrs[name])  # type: ignore[arg-type]

    def real(self, name: str) -> float:
        """A number among the attributes."""
        return float(self.op.attrs[name])  # type: ignore[arg-type]

    def stated(self, attr: str) -> None:
        """Raises unless the attribute names a cache."""
        if not isinstance(self.op.attrs.get(attr), StateRef):
            raise self.fail(f"attribute {attr} names no cache", "bind states before lowering")

    def ref(self, index: int) -> Ref:
        """Data of an operand: a small weight as an f32 vector, anything else as it is."""
        if self.operand(index).encoding is not None:
            return Ref("blob", index=index, layout="vector", part="w")
        return Ref("operand", index=index)

    def matrix(self, index: int) -> tuple[Encoding, list[Ref]]:
        """A large weight: its encoding and its parts, codes and (fp8) scales."""
        encoding = self.operand(index).encoding
        if encoding is None:
            raise self.fail(f"operand {index} is no weight", "only weights of the checkpoint can be multiplied with")
        if encoding.format not in ("bf16", "fp8"):
            raise self.fail(f"operand {index} is stored in {encoding.format}", "GPU kernels read bf16 and fp8")
        parts = ("w", "s") if encoding.format == "fp8" else ("w",)
        return encoding, [Ref("blob", index=index, layout="matrix", part=part) for part in parts]

    def rows(self, shape: Sequence[Dim]) -> dict[str, Param]:
        """Kernel parameters ROWS and TIMES of a leading axis."""
        size = shape[0] if shape else 1
        if isinstance(size, Sym):
            if size.offset:
                raise self.fail(f"leading size {size}", "only multiples of T, S and R are supported")
            return {"ROWS": COUNT[size.name], "TIMES": size.scale}
        return {"ROWS": -1, "TIMES": size}

    def capacity(self, shape: Sequence[Dim]) -> int:
        """Greatest number of rows in this bucket."""
        size = shape[0] if shape else 1
        return size if isinstance(size, int) else size.at(self.bucket.sizes)

    def stride(self, index: int) -> int:
        """Distance between rows of an operand, in elements."""
        found = self.operand(index)
        return found.stride or inner(found.type.shape)
