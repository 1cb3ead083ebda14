"""How each ATen op of a trace becomes rows of the op table.

A traced tensor that mentions T loses its leading axes of size one (the batch of one, and axes made for broadcasting);
so does a leading axis that only repeats (`expand`). What is left broadcasts as before, since that aligns last axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcn_compile.errors import IRError
from qcn_compile.frontend.builder import DTYPES, Builder
from qcn_compile.ir.graph import Value
from qcn_compile.ir.types import Dim, Sym, T


@dataclass(frozen=True)
class Strided:
    """Every `step`-th row of a value: known only as the source or the place of a copy."""

    of: Value
    place: tuple[int, ...]


Result = Value | Strided | Sequence["Result"]


def dims(traced: Tensor) -> tuple[Dim, ...]:
    """Sizes of a traced tensor over T. Raises IRError for a size that is not a multiple of T plus a number."""
    return tuple(size if isinstance(size, int) else _symbolic(size) for size in traced.shape)


def _symbolic(size: torch.SymInt) -> Dim:
    expression = size.node.expr
    symbols = list(expression.free_symbols)
    if not symbols:
        return int(expression)
    scale = expression.diff(symbols[0])
    if len(symbols) > 1 or not scale.is_Integer:
        raise IRError(f"size {expression} is not a multiple of the number of tokens")
    return Sym(T.name, int(scale), int(expression.subs(symbols[0], 0)))


def stripped(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The shape without its leading ones, when it mentions T."""
    if any(isinstance(d, Sym) for d in shape):
        while shape[0] == 1:
            shape = shape[1:]
    return shape


class Call:
    """One traced call: its arguments by name, the values they became, and the builder."""

    def __init__(self, node: fx.Node, build: Builder, lookup: Callable[[fx.Node], Result]) -> None:
        self.node, self.build, self._lookup = node, build, lookup
        self.args: dict[str, Any] = {}
        for i, spec in enumerate(node.target._schema.arguments):
            given = node.args[i] if i < len(node.args) else node.kwargs.get(spec.name, spec.default_value)
            self.args[spec.name] = given

    def result(self, argument: fx.Node) -> Result:
        """What an argument became."""
        return self._lookup(argument)

    def value(self, argument: fx.Node) -> Value:
        """The value an argument became."""
        found = self._lookup(argument)
        if not isinstance(found, Value):
            raise IRError("a strided slice may only be copied onto the same place of an equal tensor")
        return found

    def self(self, name: str = "self") -> Value:
        """The value of the operand `name`."""
        return self.value(self.args[name])

    def shape(self, name: str = "self") -> tuple[Dim, ...]:
        """The traced shape of the operand `name`."""
        return dims(self.args[name].meta["val"])

    def axis(self, argument: int, operand: fx.Node | None = None) -> int:
        """An axis of the traced operand as an axis of its value; negative when that axis was dropped."""
        source: fx.Node = operand or self.args["self"]
        rank: int = source.meta["val"].dim()
        return argument % rank - (rank - self.value(source).tensor.rank)

    def kept_axis(self, argument: int, operand: fx.Node | None = None) -> int:
        """As `axis`; raises IRError when the axis was dropped."""
        axis = self.axis(argument, operand)
        if axis < 0:
            raise IRError(f"axis {argument} is the batch axis: nothing may mix or reduce it")
        return axis

    def batchless(self, name: str) -> Value:
        """The operand `name` with its batch axis dropped and every other axis present."""
        shape = self.shape(name)
        if shape[0] != 1:
            raise IRError(f"operand {name} has batch size {shape[0]}; only a batch of one is traced")
        return self.build.reshape(self.self(name), shape[1:])

    def want(self, **expected: Any) -> None:
        """Raise IRError unless the arguments have these values."""
        for name, value in expected.items():
            if self.args.get(name, value) != value:
                raise IRError(f"{name}={self.args[name]!r} is not supported, only {value!r}")


Rule = Callable[[Call], Result]
RULES: dict[str, Rule] = {}


def rule(*targets: str) -> Callable[[Rule], Rule]:
    """Register the decorated function for ATen ops, named as `add.Tensor`."""
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def settle(call: Call, result: Result) -> Result:
    """Strip and check a result against what was traced."""
    traced = call.node.meta["val"]
    if isinstance(result, Value):
        return _settled(call, result, traced)
    if isinstance(result, Sequence):
        return [_settled(call, v, t) for v, t in zip(result, traced, strict=True) if isinstance(v, Value)]
    return result


def _settled(call: Call, value: Value, traced: Tensor) -> Value:
    shape = dims(traced)
    value = call.build.reshape(value, stripped(value.tensor.shape))
    rank = value.tensor.rank
    fits = value.tensor.shape == shape[len(shape) - rank:] and 0 not in shape
    if value.tensor.dtype is not DTYPES[traced.dtype] or not fits:
        raise IRError(f"imported as {value.type}, but traced as {DTYPES[traced.dtype].value}{list(map(str, shape))}")
    return value


@rule("clone", "contiguous", "alias", "detach", "lift_fresh_copy")
def _same(c: Call) -> Result:
    return c.result(c.args["self"])


@rule("dropout")
def _dropout(c: Call) -> Result:
    c.want(train=False)
    return c.self("input")


def _binary(row: str) -> Rule:
    def apply(c: Call) -> Result:
        c.want(alpha=1)
        a, other = c.self(), c.args["other"]
        if isinstance(other, fx.Node):
            return c.build.one(row, [a, c.value(other)])
        if row == "mul" and other == 1:
            return a
        if row not in ("add", "mul"):
            raise IRError(f"{row} of a tensor and the number {other}")
        return c.build.one(f"{row}_scalar", [a], value=float(other))

    return apply


for _row in ("add", "mul", "sub", "div"):
    rule(f"{_row}.Tensor", f"{_row}.Scalar")(_binary(_row))


def _unary(row: str) -> Rule:
    def apply(c: Call) -> Result:
        c.want(beta=1, threshold=20)
        return c.build.one(row, [c.self()])

    return apply


for _row in ("neg", "exp", "rsqrt", "sigmoid", "silu", "softplus", "cos", "sin"):
    rule(_row)(_unary(_row))


@rule("pow.Tensor_Scalar")
def _pow(c: Call) -> Result:
    return c.build.one("pow", [c.self()], exponent=float(c.args["exponent"]))


@rule("to.dtype", "to.dtype_layout", "to.device", "_to_copy", "type_as")
def _cast(c: Call) -> Result:
    return c.build.cast(c.self(), DTYPES[c.node.meta["val"].dtype])


@rule("softmax.int")
def _softmax(c: Call) -> Result:
    dtype = DTYPES[c.node.meta["val"].dtype]
    return c.build.one("softmax", [c.self()], axis=c.kept_axis(c.args["dim"]), dtype=dtype)


def _reduction(row: str) -> Rule:
    def apply(c: Call) -> Result:
        axes = c.args["dim"]
        if not axes or len(axes) != 1:
            raise IRError(f"{row} over axes {axes}; one axis is known")
        axis = c.kept_axis(axes[0])
        if isinstance(c.self().tensor.shape[axis], Sym):
            raise IRError(f"{row} over the tokens")
        return c.build.one(row, [c.self()], axis=axis, keepdim=bool(c.args["keepdim"]))

    return apply


rule("mean.dim")(_reduction("mean"))
rule("sum.dim_IntList")(_reduction("sum"))


@rule("topk")
def _topk(c: Call) -> Result:
    c.want(largest=True)
    if c.axis(c.args["dim"]) != c.self().tensor.rank - 1:
        raise IRError("topk over an axis that is not the last")
    return c.build.emit("topk", [c.self()], k=int(c.args["k"]))


@rule("embedding")
def _embedding(c: Call) -> Result:
    return c.build.one("embedding", [c.self("indices"), c.self("weight")])


@rule("linear")
def _linear(c: Call) -> Result:
    bias: list[Value | None] = [] if c.args["bias"] is None else [c.self("bias")]
    return c.build.one("linear", [c.self("input"), c.self("weight"), *bias])
