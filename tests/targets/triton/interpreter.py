"""Triton's interpreter in a process of its own, repaired: bf16 and fp8 casts, arithmetic and dot products.

The stock interpreter (3.6) truncates f32 -> bf16, drops carries in f32 -> fp8, computes on raw bit patterns of bf16 and
breaks on `range(tensor)` with numpy 2.4. It must also be chosen before Triton is imported, so kernels run in a child.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from qcn_compile.targets.base import Kernel
from qcn_compile.targets.triton.families import FAMILIES, Family, constants

Launch = tuple[Kernel, tuple[int, ...], list[str]]


class Interpreter:
    """Runs launches over named byte buffers, which it returns as they are afterwards."""

    def __init__(self) -> None:
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            context = get_context("spawn")
            self._pipe, child = context.Pipe()
            self._process = context.Process(target=_serve, args=(child,), daemon=True)
            self._process.start()
        finally:
            if before is None:
                del os.environ["TRITON_INTERPRET"]

    def run(self, launches: Sequence[Launch], buffers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The buffers after all launches. Raises RuntimeError with the child's traceback."""
        self._pipe.send(([(*launch, FAMILIES[launch[0].family]) for launch in launches], buffers))
        done = self._pipe.recv()
        if isinstance(done, str):
            raise RuntimeError(done)
        return done

    def close(self) -> None:
        self._process.terminate()


def _serve(pipe: Connection) -> None:
    repair()
    while True:
        launches, buffers = pipe.recv()
        try:
            pipe.send(_run(launches, buffers))
        except Exception:
            pipe.send(traceback.format_exc())


def _run(launches: list[tuple[Kernel, tuple[int, ...], list[str], Family]],
         buffers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    dtypes = {"bf16": torch.bfloat16, "f32": torch.float32, "i32": torch.int32, "fp8": torch.float8_e4m3fn,
              "u8": torch.uint8, "f16": torch.float16}
    bytes_ = {name: torch.from_numpy(data.copy()) for name, data in buffers.items()}
    for kernel, grid, names, family in launches:
        FAMILIES.setdefault(kernel.family, family)
        function = family.load(kernel.family)
        present, absent = family.pointers(kernel)
        assert len(present) == len(names), (kernel.symbol, names)
        pointers = {p.name: bytes_[n].view(dtypes[p.dtype]) for p, n in zip(present, names, strict=True)}
        more = {"PDL": False} if "PDL" in function.arg_names else {}
        function[(*grid, 1, 1)[:3]](**pointers, **dict.fromkeys(absent), **constants(kernel), **more)
    return {name: data.numpy() for name, data in bytes_.items()}


def repair() -> None:
    """Patch the interpreter of this process."""
    import ml_dtypes
    import triton.language as tl
    from triton.runtime import interpreter as stock

    floats: dict[Any, Any] = {tl.bfloat16: ml_dtypes.bfloat16, tl.float8e4nv: ml_dtypes.float8_e4m3fn,
                              tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64}
    narrow = (tl.bfloat16, tl.float8e4nv)
    _repair_casts(stock, floats, narrow)
    _repair_arithmetic(stock, floats, narrow)
    _repair_loops(stock)


def _repair_casts(stock: Any, floats: dict[Any, Any], narrow: tuple[Any, ...]) -> None:
    """Round to nearest even, clamp e4m3 as the hardware does, convert integers by value."""
    convert, cast, tl = stock._convert_float, stock.InterpreterBuilder.cast_impl, stock.tl

    def convert_float(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if source not in floats or target not in floats or mode == stock._ir.ROUNDING_MODE.RTZ:
            return convert(x, source, target, mode)
        value = np.ascontiguousarray(x).view(floats[source]).astype(np.float32)
        if target is tl.float8e4nv:
            value = np.clip(value, -448, 448)
        bits = getattr(np, f"uint{target.primitive_bitwidth}")
        return value.astype(floats[target]).view(bits).reshape(x.shape)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        old, new = source.dtype.scalar, target.scalar
        if new in narrow and old not in floats:
            data = convert_float(source.data.astype(np.float32), tl.float32, new, None)
            return stock.TensorHandle(data.view(stock._get_np_dtype(new)), new)
        if old in narrow and new not in floats:
            return stock.TensorHandle(_wide(source, floats, narrow).astype(stock._get_np_dtype(new)), new)
        return cast(self, source, target)

    stock._convert_float = convert_float
    stock.InterpreterBuilder.cast_impl = cast_impl


def _wide(handle: Any, floats: dict[Any, Any], narrow: tuple[Any, ...]) -> Any:
    kind = handle.dtype.scalar
    if kind not in narrow:
        return handle.data
    return np.ascontiguousarray(handle.data).view(floats[kind]).astype(np.float32)


def _repair_arithmetic(stock: Any, floats: dict[Any, Any], narrow: tuple[Any, ...]) -> None:
    """bf16 and fp8 arithmetic, comparisons and dot products by value."""
    binary, tl = stock.InterpreterBuilder.binary_op, stock.tl

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        kind = left.dtype.scalar
        if kind not in narrow or right.dtype.scalar != kind:
            return binary(self, left, right, op)
        out = op(_wide(left, floats, narrow), _wide(right, floats, narrow))
        if out.dtype == np.bool_:
            return stock.TensorHandle(out, tl.int1)
        bits = np.uint16 if kind == tl.bfloat16 else np.uint8
        return stock.TensorHandle(out.astype(np.float32).astype(floats[kind]).view(bits), kind)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        product = np.matmul(_wide(a, floats, narrow), _wide(b, floats, narrow), dtype=d.data.dtype)
        return stock.TensorHandle(product + d.data, d.dtype.scalar)

    stock.InterpreterBuilder.binary_op = binary_op
    stock.InterpreterBuilder.create_dot = create_dot


def _repair_loops(stock: Any) -> None:
    """`range(tensor)`; no overflow checks; device functions are patched once a launch, not once a call."""
    import dataclasses

    if any(f.name == "sanitize_overflow" for f in dataclasses.fields(stock.InterpreterOptions)):
        stock.interpreter_builder.options = stock.InterpreterOptions(sanitize_overflow=False)
    patch_tensor, launch, seen = stock._patch_lang_tensor, stock.GridExecutor.__call__, set[int]()

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    def call_grid(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        seen.add(id(self.fn.__globals__))
        return launch(self, *args, **kwargs)

    def call_nested(self: Any, *args: Any, **kwargs: Any) -> Any:
        key = id(self.fn.__globals__)
        if key not in seen:
            stock._patch_lang(self.fn)
            seen.add(key)
        return self.rewrite()(*args, **kwargs)

    stock._patch_lang_tensor = patch_lang_tensor
    stock.GridExecutor.__call__ = call_grid
    stock.InterpretedFunction.__call__ = call_nested
