"""The vocabulary kernels are written in: raw pointers as arrays, SSA names, loops and branches over TVM's IRBuilder.

A Python `for` unrolls, `loop` and `parallel` make loops of the kernel. `a[i]` is a scalar and `a[i, n]` a vector of n
elements from i on; both can be assigned. Arrays carry no shape and no check: sizes are read from `counts` at run time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

UNBOUNDED = 1 << 40  # declared length of a pointer parameter: no check is made, and indices may be 64 bit
LOCAL_BYTES = 1008  # TVM puts local arrays below 1024 bytes on the stack, larger ones on the heap
Expr = Any


@dataclass(frozen=True)
class Machine:
    """What kernels may assume of the processor: SIMD lanes of f32, the lanes of its int8 dot product (0: none), and
    whether it is an ARM, whose dot product is of signed codes; x86's is of unsigned with signed ones."""

    lanes: int = 8
    dot: int = 0
    arm: bool = False

    @staticmethod
    def of(features: Sequence[str]) -> Machine:
        """From the feature names of data/cpu.toml."""
        if "neon" in features:
            return Machine(4, 4 if "dotprod" in features else 0, arm=True)
        lanes = 16 if "avx512" in features else 8 if "avx2" in features else 4
        return Machine(lanes, 16 if "vnni" in features else 8 if "avxvnni" in features else 0)


class Array:
    """A pointer with element access. Vector accesses need no more alignment than one element (at most 4 bytes)."""

    def __init__(self, buffer: Any, dtype: str) -> None:
        self.buffer, self.dtype = buffer, dtype

    def __getitem__(self, at: Any) -> Expr:
        index, lanes = at if isinstance(at, tuple) else (at, 1)
        return self.buffer[_span(index, lanes)]

    def __setitem__(self, at: Any, value: Expr) -> None:
        index, lanes = at if isinstance(at, tuple) else (at, 1)
        T.buffer_store(self.buffer, value, [_span(index, lanes)])

    def address(self, index: Expr) -> Expr:
        """Pointer to an element."""
        return T.address_of(self.buffer[index])


def _span(index: Expr, lanes: int) -> Expr:
    return index if lanes == 1 else T.ramp(index, 1, lanes)


class Arrays:
    """The parameters of a kernel by name."""

    def __init__(self, arrays: dict[str, Array]) -> None:
        self._arrays = arrays

    def __getattr__(self, name: str) -> Array:
        return self._arrays[name]


class Function:
    """Collects the body of one kernel: `with Function("name", x="float32") as a: ...` and then `.result`."""

    def __init__(self, symbol: str, **params: str) -> None:
        self.symbol, self.params = symbol, params
        self._builder = IRBuilder()
        self._frame = T.prim_func(s_tir=True)
        self.result: Any = None

    def __enter__(self) -> Arrays:
        self._builder.__enter__()
        self._frame.__enter__()
        T.func_name(self.symbol)
        T.func_attr({"tirx.noalias": True})
        pointers = {name: T.arg(name + "_ptr", T.handle(dtype)) for name, dtype in self.params.items()}
        arrays = {}
        for name, pointer in pointers.items():
            dtype = self.params[name]
            buffer = T.decl_buffer((T.int64(UNBOUNDED),), dtype, data=pointer, align=min(4, _bytes(dtype)))
            arrays[name] = Array(IRBuilder.name(name, buffer), dtype)
        return Arrays(arrays)

    def __exit__(self, *error: Any) -> None:
        self._frame.__exit__(*error)
        self._builder.__exit__(*error)
        if error[0] is None:
            self.result = self._builder.get().with_attr("global_symbol", self.symbol)


def _bytes(dtype: str) -> int:
    return tvm.DataType(dtype).bits // 8


def local(name: str, dtype: str, size: int) -> Array:
    """A small array on the stack; with constant indices it lives in registers."""
    if size * _bytes(dtype) > LOCAL_BYTES:
        raise ValueError(f"local array {name} of {size * _bytes(dtype)} bytes would go to the heap")
    return Array(IRBuilder.name(name, T.alloc_buffer((size,), dtype, scope="global")), dtype)


def let(name: str, value: Expr) -> Expr:
    """Name a value once, so that it is computed once."""
    return IRBuilder.name(name, T.bind(value))


@contextmanager
def loop(name: str, stop: Expr, start: Expr = 0) -> Iterator[Expr]:
    """for name in start..stop, in order."""
    with T.serial(start, stop) as index:
        yield IRBuilder.name(name, index)


@contextmanager
def parallel(name: str, stop: Expr) -> Iterator[Expr]:
    """for name in 0..stop, split over the threads."""
    with T.parallel(0, stop) as index:
        yield IRBuilder.name(name, index)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """if condition."""
    with T.If(condition), T.Then():
        yield


class Branch:
    """if/else: `with Branch(c) as b:`, then `with b.then:` and `with b.otherwise:`."""

    def __init__(self, condition: Expr) -> None:
        self._frame = T.If(condition)

    def __enter__(self) -> Branch:
        self._frame.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._frame.__exit__(*error)

    @property
    def then(self) -> Any:
        return T.Then()

    @property
    def otherwise(self) -> Any:
        return T.Else()


def lanes_of(value: Expr) -> int:
    """SIMD width of an expression."""
    return int(tvm.DataType(str(value.ty if hasattr(value, "ty") else value.dtype)).lanes)


def dtype_of(value: Expr) -> str:
    """Element type of an expression."""
    return str(value.ty if hasattr(value, "ty") else value.dtype).split("x")[0]


def vector(dtype: str, lanes: int) -> str:
    """Type name of a vector."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def splat(value: Expr, lanes: int) -> Expr:
    """The scalar in every lane."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def f32(value: float, lanes: int = 1) -> Expr:
    """A float constant in every lane."""
    return splat(T.float32(value), lanes)


def i32(value: int, lanes: int = 1) -> Expr:
    """An integer constant in every lane."""
    return splat(T.int32(value), lanes)


def wide(value: Expr) -> Expr:
    """64 bit, for offsets into caches and stacked experts that may pass 2^31 elements."""
    return T.Cast("int64", value)


def prefetch(array: Array, index: Expr) -> None:
    """Ask for the cache line of an element that is read soon."""
    T.evaluate(tvm.tirx.call_intrin("void", "tirx.prefetch", array.address(index), T.int32(0), T.int32(3), T.int32(1)))
