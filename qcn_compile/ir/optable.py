"""The op table: one row an op, holding signature, shape rule, effects, cost and a plain reference.

Verifier, interpreter, cost model, documentation and parity tests all read the same row. A row is made by decorating
its reference:

    @op("rms_norm", "x, w", eps=float, infer=like("x"))
    def rms_norm(x, w, *, eps):
        "y = x / sqrt(mean(x^2) + eps) * w"
        return ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qcn_compile.errors import IRError
from qcn_compile.ir.types import DType, StateRef, TensorType, Type, size_of

Infer = Callable[..., TensorType | tuple[TensorType, ...]]


@dataclass(frozen=True)
class Cost:
    """Work of one op at given sizes: flops (floating point operations), bytes read and bytes written."""

    flops: int
    read: int
    written: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class AttrSpec:
    """Type of an attribute and, when it may be left out, its default."""

    type: type
    required: bool
    default: Any = None


@dataclass(frozen=True)
class OpSpec:
    """A row of the op table.

    operands: names in order; `name?` may be absent, a last `*name` takes any number.
    infer(*types, **attrs): result type or tuple of types, from operand types (None for an absent operand).
    effects: for each attribute that names a state, what the op does to it: "r", "w" or "rw".
    flops(types, result_types, attrs, sizes): FLOPs; the default counts one per result element.
    touched(types, sizes): share of an operand that is read, by index, where it is not all of it (a table, experts).
    collective: all ranks take part; the reference maps the list of their operands to the list of their results.
    attrs: type and default of each attribute. commutative: operands may be exchanged. doc: formula, shapes, dtypes.
    reference(*operands, **attrs): plain torch, of tensors (a `Batch` for a batch, None for an absent operand).
    """

    name: str
    operands: tuple[str, ...]
    attrs: dict[str, AttrSpec]
    infer: Infer
    reference: Callable[..., Any]
    effects: dict[str, str] = field(default_factory=dict)
    flops: Callable[..., int] | None = None
    commutative: bool = False
    doc: str = ""
    touched: Callable[[list[Type | None], dict[str, int]], dict[int, float]] | None = None
    collective: bool = False

    def cost(self, operands: list[Type | None], results: list[Type], attrs: dict[str, Any],
             sizes: dict[str, int]) -> Cost:
        """FLOPs and bytes, every operand (or the part that is touched) read once and every result written once."""
        share = self.touched(operands, sizes) if self.touched else {}
        read = sum(int(share.get(i, 1.0) * t.bytes(sizes)) for i, t in enumerate(operands) if isinstance(t, TensorType))
        written = sum(t.bytes(sizes) for t in results if isinstance(t, TensorType))
        if self.flops is not None:
            return Cost(self.flops(operands, results, attrs, sizes), read, written)
        return Cost(sum(size_of(t.shape, sizes) for t in results if isinstance(t, TensorType)), read, written)

    def arity(self) -> tuple[int, int | None]:
        """Least and greatest number of operands (None: no limit)."""
        if self.operands and self.operands[-1].startswith("*"):
            return len(self.operands) - 1, None
        return sum(not n.endswith("?") for n in self.operands), len(self.operands)


TABLE: dict[str, OpSpec] = {}


def row(name: str) -> OpSpec:
    """The row of an op, or an error that lists near names."""
    if name in TABLE:
        return TABLE[name]
    near = [n for n in TABLE if n[:3] == name[:3]]
    raise IRError(f"no op named {name!r} in the table" + (f"; did you mean {', '.join(near)}?" if near else "")
                  + " Register it with @qcn_compile.register_op")


_REQUIRED = (int, float, bool, str, tuple, DType, StateRef)


def op(name: str, operands: str, /, *, infer: Infer, effects: dict[str, str] | None = None,
       flops: Callable[..., int] | None = None, commutative: bool = False,
       touched: Callable[..., dict[int, float]] | None = None, collective: bool = False,
       **attrs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the reference of a new row.

    An attribute given as a type is required; given as a value it is optional with that default
    (`None` means an optional attribute of any type). The other arguments are fields of `OpSpec`; the docstring of the
    function gives the formula, shapes and dtypes, and stands in the IR reference.
    Raises IRError for a name that is taken.
    """
    specs = {key: AttrSpec(value, True) if isinstance(value, type) else AttrSpec(type(value), False, value)
             for key, value in attrs.items()}

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        if name in TABLE:
            raise IRError(f"op {name!r} is in the table already; choose another name")
        names = tuple(part.strip() for part in operands.split(",") if part.strip())
        TABLE[name] = OpSpec(name, names, specs, infer, reference, effects or {}, flops, commutative,
                             (reference.__doc__ or "").strip(), touched, collective)
        return reference

    return register


def same(index: int = 0) -> Infer:
    """Shape rule: the result has the type of operand `index`."""
    return lambda *types, **_: types[index]
