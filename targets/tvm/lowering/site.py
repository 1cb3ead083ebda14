"""What a CPU lowering sees: one op with its operands and the machine's features. Imports no TVM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcn_compile.errors import UsageError
from qcn_compile.ir.encoding import Encoding, check
from qcn_compile.ir.types import Dim, DType, Sym, TensorType
from qcn_compile.targets.base import Call, Kernel, Param, Ref
from qcn_compile.targets.site import BATCH, COUNTS, SPANS, BaseSite, inner, result, state

__all__ = ["BATCH", "COUNTS", "SPANS", "Site", "call", "inner", "result", "scratch", "state"]


def scratch(name: str, size: int) -> Ref:
    """Temporary memory of this op, `size` bytes."""
    return Ref("scratch", name=name, bytes=max(64, -(-size // 64) * 64))


@dataclass(frozen=True)
class Site(BaseSite):
    """One op to lower, with what the target knows of its operands and of the machine."""

    int8: bool  # products with int8 activations have kernels

    def float_type(self, index: int) -> TensorType:
        """The type of an f32 operand."""
        type_ = self.operand(index).type
        if type_.dtype is not DType.f32:
            raise self.fail(f"operand {index} is {type_}, CPU kernels compute in f32", "cast the graph to f32 first")
        return type_

    def ref(self, index: int) -> Ref:
        """f32 data of an operand: a small weight as a vector blob, anything else as it is."""
        if self.operand(index).encoding is None:
            self.float_type(index)
        return super().ref(index)

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
        if found.activations == "int8" and not self.int8:
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

    def stride(self, index: int) -> int:
        """Distance between rows of an operand, 0 when dense."""
        found = self.operand(index)
        return 0 if found.stride in (0, inner(found.type.shape)) else found.stride


def call(family: str, args: Sequence[Ref], **params: Param) -> Call:
    """One launch."""
    return Call(Kernel.make(family, **params), tuple(args))
