"""What a GPU lowering sees: one op with its operands and the card. Imports no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.types import Dim, DType, Sym, TensorType
from qcn_compile.targets.base import Call, Kernel, Param, Ref
from qcn_compile.targets.site import BATCH, COUNTS, SPANS, BaseSite, inner, result, state
from qcn_compile.targets.triton.choices import Cuts
from qcn_compile.targets.triton.families import ITEMSIZE

__all__ = ["BATCH", "COUNTS", "FEW", "MOVES", "SPANS", "TOKEN_SEQ", "Site", "call", "cdiv", "inner", "power", "result",
           "result_kind", "results", "scratch", "state"]
TOKEN_SEQ = Ref("input", name="token_seq")
MOVES = (*SPANS[:-1], Ref("input", name="into"), COUNTS)
FEW = 4  # tokens for which kernels go through the experts pair by pair and keep activations in bf16
COUNT = {"T": 0, "S": 1, "R": 2}


def scratch(name: str, elements: int, dtype: str) -> Ref:
    """Temporary memory of this op."""
    return Ref("scratch", name=name, bytes=max(64, -(-elements * ITEMSIZE[dtype] // 64) * 64))


def power(n: int, least: int = 1) -> int:
    """The next power of two: block sizes."""
    return max(least, 1 << (n - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def call(family: str, args: Sequence[Ref], grid: Sequence[int], **params: Param) -> Call:
    """One launch."""
    return Call(Kernel.make(family, **params), tuple(args), tuple(grid))


def results(site: Site) -> list[Ref]:
    """The buffers of an activation that a kernel makes: bf16, or codes and scales."""
    return [result(0), result(1)] if site.narrowing else [result(0)]


def result_kind(site: Site) -> dict[str, Param]:
    """What a kernel is told of its `results`."""
    return {"Y": "fp8" if site.narrowing else "bf16", "NARROW": site.narrowing}


@dataclass(frozen=True)
class Site(BaseSite):
    """One op to lower, with what the target knows of its operands and of the card."""

    ring: int
    narrow: bool  # the card multiplies e4m3
    cuts: Cuts  # how launches of plans of one token may be cut

    @property
    def decode(self) -> bool:
        """Whether the bucket is one of few tokens."""
        return self.bucket.tokens <= FEW

    @property
    def narrowing(self) -> bool:
        """Whether the op takes or gives codes and scales in place of a bf16 activation (`narrow.py`)."""
        return self.op.name.startswith("narrow_")

    @property
    def cached(self) -> str:
        """The type that the op's keys and values are cached in, as kernels name it."""
        return "fp8" if self.op.attrs.get("stored") == "f8e4m3" else "bf16"

    @property
    def held(self) -> str:
        """The type that the op's DeltaNet state is kept in."""
        return "bf16" if self.op.attrs.get("rounds") == "bf16" else "f32"

    def activation(self, index: int) -> TensorType:
        """The type of a bf16 operand."""
        type_ = self.operand(index).type
        if type_.dtype is not DType.bf16:
            raise self.fail(f"operand {index} is {type_}, GPU kernels take bf16", "trace the model in bf16")
        return type_

    def matrix(self, index: int) -> tuple[Encoding, list[Ref]]:
        """A large weight: its encoding and its parts, codes and (fp8) scales."""
        encoding = self.operand(index).encoding
        if encoding is None:
            raise self.fail(f"operand {index} is no weight", "only weights of the checkpoint can be multiplied with")
        if encoding.format not in ("bf16", "fp8"):
            raise self.fail(f"operand {index} is stored in {encoding.format}",
                            "GPU kernels read bf16 and fp8, those of experts int4 and nvfp4 too")
        parts = ("w", "s") if encoding.format == "fp8" else ("w",)
        return encoding, [Ref("blob", index=index, layout="matrix", part=part) for part in parts]

    def four(self, index: int) -> list[Ref]:
        """The parts of a weight of four bits: codes, scales and, with NVFP4, the scale of a matrix."""
        encoding, first = self.operand(index).encoding, self.operand(3).encoding
        if encoding is None or first is None or encoding.format != first.format:
            raise self.fail(f"operand {index} is not stored as operand 3 is", "store both weights of the experts alike")
        parts = ("w", "s", "g") if encoding.format == "nvfp4" else ("w", "s")
        return [Ref("blob", index=index, layout="matrix", part=part) for part in parts]

    def rows(self, shape: Sequence[Dim]) -> dict[str, Param]:
        """Kernel parameters ROWS and TIMES of a leading axis."""
        size = shape[0] if shape else 1
        if isinstance(size, Sym):
            if size.offset:
                raise self.fail(f"leading size {size}", "only multiples of T, S and R are supported")
            return {"ROWS": COUNT[size.name], "TIMES": size.scale}
        return {"ROWS": -1, "TIMES": size}

    def stride(self, index: int) -> int:
        """Distance between rows of an operand, in elements."""
        found = self.operand(index)
        return found.stride or inner(found.type.shape)
