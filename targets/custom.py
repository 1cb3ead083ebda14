"""Kernels of users: `@register_kernel` puts one in the place of a built-in one, for CPUs (TVM) or GPUs (Triton)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qcn_compile.errors import LoweringError, QcnError, UsageError
from qcn_compile.ir.text import format_op
from qcn_compile.targets.base import Call
from qcn_compile.targets.files import describe, home, line_of
from qcn_compile.targets.triton import custom
from qcn_compile.targets.tvm.lowering import LOWERINGS
from qcn_compile.targets.tvm.lowering.site import COUNTS, Site, call, inner, result

__all__ = ["family_of", "register_kernel", "row_by_row"]
Lowering = Callable[[Any], list[Call]]


def register_kernel(op_name: str, target: str = "cpu", lower: Lowering | None = None,
                    signature: str = "") -> Callable[..., Any]:
    """Register the decorated function as the kernel of an op, in place of a built-in one if there is one.

    target "cpu": the function is called as `f(symbol, machine, **params)` and returns a `Function`
    (`targets/tvm/kernels/core.py`), a TVM PrimFunc, or TVMScript source as text. target "gpu": it is a `@triton.jit`
    function at the top of a file, pointers first, then parameters as `tl.constexpr`; it serves all cards.
    `lower(site)` gives the launches, whose kernel family must be `custom_<op_name>`; without it the op is lowered row
    by row (`row_by_row` here, `targets/triton/custom.py` for GPUs). `signature`: types of the pointers of a GPU kernel
    with a `lower` of its own, as `targets/triton/families.py` writes them.
    Raises UsageError for another target or a function that cannot be a kernel of it.
    """
    if target not in ("cpu", "gpu"):
        raise UsageError(f"register_kernel({op_name!r}, target={target!r}): choose cpu (TVM) or gpu (Triton, all "
                         "cards)")
    if lower is not None and target == "gpu" and not signature:
        raise UsageError(f"register_kernel({op_name!r}): a GPU kernel with lower= needs signature= too, for example "
                         "'x:bf16 y:bf16 counts:i32'")

    def register(source: Callable[..., Any]) -> Callable[..., Any]:
        if target == "gpu":
            custom.register(op_name, source, lower, signature)
        else:
            LOWERINGS[op_name] = _Custom(op_name, source, lower or row_by_row)
        return source

    return register


def family_of(op_name: str) -> str:
    """Kernel family of a custom kernel."""
    return f"custom_{op_name}"


def row_by_row(site: Site) -> list[Call]:
    """One launch over the rows of the first result: arguments are operands, results, counts.

    Parameters: rows, times (see `kernels.loops.count`), width of a result row, threads, the distance between rows of
    operand i as `stride_i` (0: dense), and every plain attribute of the op.
    """
    shape = site.results[0].shape
    strides = {f"stride_{i}": site.stride(i) for i in range(len(site.operands)) if site.has(i)}
    attrs = {key: value for key, value in site.op.attrs.items() if isinstance(value, int | float | str | bool)}
    refs = [site.ref(i) for i in range(len(site.operands)) if site.has(i)]
    refs += [result(i) for i in range(len(site.results))]
    return [call(family_of(site.op.name), [*refs, COUNTS], **site.rows(shape), width=inner(shape),
                 threads=not site.decode, **strides, **attrs)]


@dataclass(frozen=True)
class _Custom:
    """A lowering that makes its kernel family known when it is first used (only then TVM is imported)."""

    op_name: str
    source: Callable[..., Any]
    lower: Lowering

    def __call__(self, site: Site) -> list[Call]:
        from qcn_compile.targets.tvm.kernels import FAMILIES

        FAMILIES[family_of(self.op_name)] = self.make
        try:
            return self.lower(site)
        except QcnError:
            raise
        except Exception as error:
            raise self.failed("its lowering", error, format_op(site.op)) from error

    def make(self, symbol: str, machine: Any, **params: Any) -> Any:
        """The kernel, in the shape that `kernels.source` wants: something with a `.result`."""
        try:
            made = self.source(symbol, machine, **params)
            return made if hasattr(made, "result") else _Made(_prim_func(made, symbol))
        except Exception as error:
            raise self.failed("the source of its kernel", error, symbol) from error

    def failed(self, what: str, error: Exception, where: str) -> LoweringError:
        """The error to raise: plugin file, op, cause."""
        return LoweringError(f"op {self.op_name}: {what} ({self.source.__name__} in {home(self.source)}) "
                             f"failed{line_of(error, home(self.source))}: {describe(error)}\n  at {where}")


@dataclass(frozen=True)
class _Made:
    result: Any


def _prim_func(made: Any, symbol: str) -> Any:
    if isinstance(made, str):
        from tvm.script import from_source

        made = from_source(made)
    if not hasattr(made, "with_attr"):
        raise TypeError(f"a kernel is a Function, a PrimFunc or TVMScript text, not a {type(made).__name__}")
    return made.with_attr("global_symbol", symbol)
