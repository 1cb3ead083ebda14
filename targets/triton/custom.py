"""Triton kernels of users: a lowering that makes the kernel's family known, and the default one, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcn_compile.errors import LoweringError, QcnError, UsageError
from qcn_compile.ir.text import format_op
from qcn_compile.ir.types import DType, TensorType
from qcn_compile.targets.base import Call
from qcn_compile.targets.files import describe, home, line_of
from qcn_compile.targets.triton.families import FAMILIES, OPTIONS, Family
from qcn_compile.targets.triton.lowering import LOWERINGS
from qcn_compile.targets.triton.lowering.site import COUNTS, Site, call, inner, power, result

BLOCK = 1024  # elements of a row that a program handles at a time


def register(op_name: str, function: Any, lower: Callable[[Site], list[Call]] | None, signature: str) -> None:
    """Lower an op to a `@triton.jit` function. Raises UsageError for anything else, or one that is in no file."""
    if not hasattr(function, "arg_names"):
        raise UsageError(f"register_kernel({op_name!r}, target='gpu'): {getattr(function, '__name__', function)} is no "
                         "Triton kernel; decorate it with @triton.jit, below @register_kernel")
    if not Path(home(function)).is_file():
        raise UsageError(f"register_kernel({op_name!r}, target='gpu'): {function.__name__} is in no file; put it into "
                         "one, because GPU kernels are compiled in processes of their own")
    LOWERINGS[op_name] = _Custom(op_name, function, lower, signature)


def row_by_row(site: Site) -> list[Call]:
    """One program a row of the first result: pointers are operands, results, counts.

    Parameters: ROWS and TIMES (see `kernels.common.true_rows`), WIDTH of a result row, BLOCK (the power of two to step
    through it), STRIDE_i between rows of operand i in elements, and every plain attribute of the op by its name.
    """
    if not all(site.has(i) for i in range(len(site.op.operands))):
        raise site.fail("an optional operand is left out", "give register_kernel a lower= of your own")
    types = [*("f32" if o is not None and o.encoding is not None else _dtype(site, o.type)  # small weights are f32
               for o in site.operands if o is not None), *(_dtype(site, t) for t in site.results)]
    refs = [*map(site.ref, range(len(site.operands))), *map(result, range(len(site.results))), COUNTS]
    width = inner(site.results[0].shape)
    attrs = {key: value for key, value in site.op.attrs.items() if isinstance(value, int | float | str | bool)}
    return [call(f"custom_{site.op.name}", refs, (site.capacity(site.results[0].shape),), WIDTH=width,
                 BLOCK=min(BLOCK, power(width)), **site.rows(site.results[0].shape), **attrs,
                 **{f"STRIDE_{i}": site.stride(i) for i in range(len(site.operands))},
                 **dict(zip(_typed(len(types)), types, strict=True)))]


def _dtype(site: Site, type_: TensorType) -> str:
    if type_.dtype not in (DType.bf16, DType.f32, DType.i32):
        raise site.fail(f"an operand is {type_}", "row-by-row GPU kernels take bf16, f32 and i32")
    return type_.dtype.value


def _typed(count: int) -> tuple[str, ...]:
    return tuple(f"TYPE_{i}" for i in range(count))


@dataclass(frozen=True)
class _Custom:
    """A lowering that makes its kernel family known when it is first used."""

    op_name: str
    function: Any
    lower: Callable[[Site], list[Call]] | None
    signature: str

    def __call__(self, site: Site) -> list[Call]:
        file, family = home(self.function), f"custom_{self.op_name}"
        try:
            calls = (self.lower or row_by_row)(site)
        except QcnError:
            raise
        except Exception as error:
            raise LoweringError(f"op {self.op_name}: its lowering for GPUs (in {file}) failed{line_of(error, file)}: "
                                f"{describe(error)}\n  at {format_op(site.op)}") from error
        typed = () if self.lower else _typed(len(calls[0].args) - 1)
        FAMILIES[family] = Family(Path(file).stem, self.signature or self._signature(typed), file,
                                  self.function.__name__, typed)
        for one in calls:
            self._check(site, one, FAMILIES[family])
        return calls

    def _signature(self, typed: tuple[str, ...]) -> str:
        """Of a row-by-row kernel: the first parameters of the function are its pointers, the last of them `counts`."""
        names = [*self.function.arg_names, "counts"]
        return " ".join([*(f"{name}~:{{{kind}}}" for name, kind in zip(names, typed, strict=False)),
                         f"{names[min(len(typed), len(names) - 1)]}:i32"])

    def _check(self, site: Site, one: Call, family: Family) -> None:
        """The function takes exactly what the launch gives it."""
        if one.kernel.family not in FAMILIES or FAMILIES[one.kernel.family] is not family:
            return  # a built-in kernel among the launches
        present, absent = family.pointers(one.kernel)
        given = {p.name for p in present} | set(absent) | {name for name, _ in one.kernel.params
                                                           if name not in (*OPTIONS, *family.typed)}
        takes = set(self.function.arg_names) - {"PDL"}
        where = f"its kernel {self.function.__name__} (in {family.file})"
        if lacking := sorted(given - takes):
            raise site.fail(f"{where} takes no {', '.join(lacking)}", "add it as a tl.constexpr parameter")
        if extra := sorted(takes - given):
            raise site.fail(f"{where} wants {', '.join(extra)}, which its lowering does not give",
                            "take it out, or give register_kernel a lower= of your own")
