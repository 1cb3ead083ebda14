"""Late-bound weights: a build's recipes evaluated over a checkpoint with NumPy alone, packed as the kernels want them.

A weight is made expert by expert, a matrix some rows at a time: memory holds a few pieces, whatever the model's size.
A tensor stays in the form it is stored in (bf16 bits, or e4m3 codes with block scales) as long as steps only move rows,
so that a bf16 or FP8 checkpoint is copied, not converted, into kernels of the same format.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from os import cpu_count
from typing import Any

import numpy as np

from qcn_compile.errors import ArtifactError, ModelError
from qcn_compile.runtime import late_fp4, late_int4
from qcn_compile.runtime.late_checkpoint import BLOCK, Checkpoint, Tensor, concat, spread, values

PIECE = 1 << 20  # elements of a matrix made at a time, as when weights are copied
AHEAD = 2  # pieces in the making for each core
Piece = tuple[str, int, np.ndarray]


def pieces(recipe: dict[str, Any], checkpoint: Checkpoint) -> Iterator[Piece]:
    """(part, offset in it, bytes u8) of one blob, in order; padding at the end of a part is left out."""
    whole = Rows(recipe["steps"], checkpoint)
    shape = whole.shapes[-1]
    if len(shape) == 3:
        step = 1
    elif len(shape) == 2 and recipe["layout"] == "matrix" and recipe["format"] != "nvfp4":
        step = max(PIECE // shape[1] // BLOCK, 1) * BLOCK
    else:
        step = max(shape[0], 1)
    at: dict[str, int] = {}

    def make(start: int) -> dict[str, np.ndarray]:
        return pack(recipe["layout"], recipe["format"], whole.get(start, min(start + step, shape[0])))

    for made in _ahead(make, range(0, max(shape[0], 1), step)):
        for part, data in made.items():
            yield part, at.get(part, 0), data
            at[part] = at.get(part, 0) + data.nbytes


def _ahead(make: Callable[[int], dict[str, np.ndarray]], starts: range) -> Iterator[dict[str, np.ndarray]]:
    """`make` of each, in order, on all cores (NumPy works outside the interpreter's lock), a few at a time."""
    cores = cpu_count() or 1
    if len(starts) == 1:
        yield make(starts[0])
        return
    with ThreadPoolExecutor(cores) as pool:
        waiting: deque[Future[dict[str, np.ndarray]]] = deque()
        for start in starts:
            waiting.append(pool.submit(make, start))
            if len(waiting) >= AHEAD * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Rows:
    """Rows of the last step of a recipe. What cannot be made by rows is small, and made whole."""

    def __init__(self, steps: list[dict[str, Any]], checkpoint: Checkpoint) -> None:
        self._steps, self._checkpoint = steps, checkpoint
        self.shapes: list[tuple[int, ...]] = []
        for step in steps:
            self.shapes.append(_shape(step, [self.shapes[i] for i in step["args"]]))

    def get(self, start: int, stop: int) -> Tensor:
        return self._rows(len(self._steps) - 1, start, stop)

    def _rows(self, index: int, start: int, stop: int) -> Tensor:
        step, args = self._steps[index], self._steps[index]["args"]
        name = step["op"]
        if name == "weight":
            return self._weight(step, start, stop)
        if name == "concat" and step["axis"] == 0:
            return self._concat(args, start, stop)
        if name == "take_rows":
            return concat([self._rows(args[0], *run) for run in runs(step["runs"], start, stop)], 0)
        if name == "slice" and step["axis"] == 0:
            return self._rows(args[0], step["start"] + start, step["start"] + stop)
        if name == "reshape":
            return self._reshape(index, start, stop)
        if name == "transpose" and 0 in (step["a"], step["b"]):
            return _transpose(step, [self._whole(args[0])]).rows(start, stop)
        return _STEPS[name](step, [self._rows(i, start, stop) for i in args])

    def _whole(self, index: int) -> Tensor:
        return self._rows(index, 0, self.shapes[index][0] if self.shapes[index] else 1)

    def _concat(self, args: list[int], start: int, stop: int) -> Tensor:
        parts, at = [], 0
        for index in args:
            size = self.shapes[index][0]
            first, last = max(start - at, 0), min(stop - at, size)
            if first < last:
                parts.append(self._rows(index, first, last))
            at += size
        return concat(parts, 0)

    def _reshape(self, index: int, start: int, stop: int) -> Tensor:
        """By rows where a row of the result is some whole rows of the operand."""
        source, shape = self._steps[index]["args"][0], self.shapes[index]
        wide, narrow = prod(shape[1:]), prod(self.shapes[source][1:])
        if wide % narrow:
            return _reshape(shape, self._whole(source)).rows(start, stop)
        factor = wide // narrow
        return _reshape((stop - start, *shape[1:]), self._rows(source, start * factor, stop * factor))

    def _weight(self, step: dict[str, Any], start: int, stop: int) -> Tensor:
        """Rows of a parameter, or experts of a stack when the checkpoint keeps them apart."""
        name, shape, checkpoint = step["name"], step["shape"], self._checkpoint
        if checkpoint.has(name) or not step.get("merged"):
            if list(checkpoint.place(name).shape) != list(shape):
                self._mismatch(name, checkpoint.place(name).shape, shape)
            return checkpoint.read(name, start, stop)
        experts = []
        for expert in range(start, stop):
            made = concat([checkpoint.read(pattern.replace("*", str(expert))) for pattern in step["merged"]], 0)
            if list(made.data.shape) != list(shape[1:]):
                self._mismatch(f"expert {expert} of {name}", made.data.shape, shape[1:])
            experts.append(Tensor(made.kind, made.data[None], None if made.scales is None else made.scales[None]))
        return concat(experts, 0)

    def _mismatch(self, name: str, found: tuple[int, ...], wanted: list[int]) -> None:
        raise ModelError(f"{self._checkpoint.folder}: {name} has shape {list(found)}, the build expects "
                         f"{list(wanted)}: another model than it was built for")


def _shape(step: dict[str, Any], args: list[tuple[int, ...]]) -> tuple[int, ...]:
    name = step["op"]
    if name in ("weight", "reshape"):
        return tuple(step["shape"])
    shape = list(args[0])
    if name == "concat":
        shape[step["axis"]] = sum(arg[step["axis"]] for arg in args)
    elif name == "take_rows":
        shape[0] = sum(count for _, count in step["runs"])
    elif name == "slice":
        shape[step["axis"]] = step["stop"] - step["start"]
    elif name == "transpose":
        a, b = step["a"], step["b"]
        shape[a], shape[b] = shape[b], shape[a]
    return tuple(shape)


def runs(table: list[list[int]], start: int, stop: int) -> list[tuple[int, int]]:
    """Where rows start..stop of a take_rows come from, as (first, last) of its operand."""
    found, at = [], 0
    for first, count in table:
        low, high = max(start - at, 0), min(stop - at, count)
        if low < high:
            found.append((first + low, first + high))
        at += count
    return found


def _reshape(shape: tuple[int, ...], x: Tensor) -> Tensor:
    if x.scales is None:
        return Tensor(x.kind, x.data.reshape(shape))
    if shape[-2:] == x.data.shape[-2:]:
        return Tensor(x.kind, x.data.reshape(shape), x.scales.reshape(*shape[:-2], *x.scales.shape[-2:]))
    return Tensor("f32", x.wide().reshape(shape))


def _slice(step: dict[str, Any], args: list[Tensor]) -> Tensor:
    """Of an inner axis; codes stay codes where whole blocks are taken."""
    x, axis, start, stop = args[0], step["axis"], step["start"], step["stop"]
    at = (slice(None),) * axis
    if x.scales is None:
        return Tensor(x.kind, x.data[(*at, slice(start, stop))])
    if start % BLOCK or (stop % BLOCK and stop != x.data.shape[axis]):
        return Tensor("f32", x.wide()[(*at, slice(start, stop))])
    return Tensor(x.kind, x.data[(*at, slice(start, stop))],
                  x.scales[(*at, slice(start // BLOCK, -(-stop // BLOCK)))])


def _transpose(step: dict[str, Any], args: list[Tensor]) -> Tensor:
    x = args[0]
    data = x.data if x.scales is None else x.wide()
    return Tensor(x.kind if x.scales is None else "f32", data.swapaxes(step["a"], step["b"]))


def _cast(step: dict[str, Any], args: list[Tensor]) -> Tensor:
    if step["dtype"] == "f32":
        return Tensor("f32", args[0].wide())
    return args[0] if args[0].kind == "bf16" else Tensor("bf16", to_bf16(args[0].wide()))


def _pointwise(compute: Callable[[np.ndarray, dict[str, Any]], np.ndarray]) -> Callable[..., Tensor]:
    return lambda step, args: Tensor("f32", compute(args[0].wide(), step))


_STEPS: dict[str, Callable[[dict[str, Any], list[Tensor]], Tensor]] = {
    "concat": lambda step, args: concat(args, step["axis"]), "slice": _slice, "transpose": _transpose, "cast": _cast,
    "add_scalar": _pointwise(lambda x, step: x + np.float32(step["value"])),
    "mul_scalar": _pointwise(lambda x, step: x * np.float32(step["value"])),
    "neg": _pointwise(lambda x, step: -x), "exp": _pointwise(lambda x, step: np.exp(x)),
}


_FOUR: dict[str, Callable[[np.ndarray], tuple[np.ndarray, ...]]] = {
    "nvfp4": lambda matrix: late_fp4.quantize(matrix, values()), "int4-g128": late_int4.quantize}


def pack(layout: str, format_: str, x: Tensor) -> dict[str, np.ndarray]:
    """Part name -> bytes u8, as the GPU target packs it (targets/triton/packing.py)."""
    if layout == "vector":
        return {"w": _flat(x.wide())}
    if layout == "channels":
        return {"w": _flat(x.wide().T)}
    if layout != "matrix" or format_ not in ("bf16", "fp8", *_FOUR):
        raise ArtifactError(f"this qcn-run cannot pack weights as {layout} in {format_}; build again with qcn-compile")
    if format_ == "bf16":
        return {"w": _flat(x.data if x.kind == "bf16" else to_bf16(x.wide()))}
    if x.scales is not None and format_ == "fp8":
        return {"w": _flat(x.data), "s": _flat(x.scales)}
    wide = x.wide()
    matrices = wide if wide.ndim > 2 else wide[None]
    done = [_FOUR.get(format_, quantize)(matrix) for matrix in matrices]
    return {part: _flat(np.stack(made)) for part, made in zip("wsg", zip(*done, strict=True), strict=False)}


def _flat(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def to_bf16(w: np.ndarray) -> np.ndarray:
    """Bit patterns of f32 rounded to bf16, nearest even."""
    bits = np.ascontiguousarray(w, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32 [N, K] -> e4m3 codes u8 [N, K] and f32 scales [ceil(N/128), ceil(K/128)] = max|block| / 448."""
    rows, columns = (np.arange(0, n, BLOCK) for n in w.shape)
    most = np.maximum.reduceat(np.maximum.reduceat(np.abs(w), rows, 0), columns, 1)
    scales = (most / np.float32(448)).astype(np.float32)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    x = w * spread(inverse, w.shape)
    return late_fp4.e4m3(x), scales
