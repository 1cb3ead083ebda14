"""One case = a few ops over named values: lowered by a GPU target, run by the interpreter or on a card, and compared
with the op table in fp32. Results and scratch start as NaN, caches are NaN wherever nothing was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from qcn_compile.ir import ops as _ops  # noqa: F401  (fills the op table)
from qcn_compile.ir.batch import Batch, Caches
from qcn_compile.ir.encoding import Encoding, encode, from_bf16, to_bf16
from qcn_compile.ir.fp8 import VALUES
from qcn_compile.ir.graph import Location, Op, Value
from qcn_compile.ir.optable import TABLE
from qcn_compile.ir.types import BatchType, DType, StateKind, StateRef, StateType, TensorType, parse_type
from qcn_compile.targets.base import Bucket, Call, Kernel, Operand, Ref
from qcn_compile.targets.triton.lowering.site import FEW
from qcn_compile.targets.triton.target import GpuTarget

DECODE_1, DECODE_8 = Bucket("decode-1", 1, 1, 1), Bucket("decode-8", 8, 8, 8)
DECODE_4, DECODE_64 = Bucket("decode-4", 4, 4, 4), Bucket("decode-64", 64, 64, 64)
PREFILL, LONG = Bucket("prefill-64", 64, 16, 64), Bucket("prefill-192", 192, 16, 64)
WIDE = Bucket("prefill-2048", 2048, 16, 64)  # capacity only: as many tokens take large tiles
PRODUCTS = {"linear": 1, "linear_add": 1, "moe_experts": 3, "moe_add": 3}  # op: its operand with the weight of x
BF16, FP8, NVFP4 = Encoding("bf16"), Encoding("fp8", 128), Encoding("nvfp4", 16)
INT4 = Encoding("int4-g128", 128)
VECTOR = Encoding()


class Runner(Protocol):
    """What runs launches over named byte buffers and returns them as they are afterwards."""

    def run(self, launches: Sequence[tuple[Kernel, tuple[int, ...], list[str]]],
            buffers: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class Ragged:
    """Sequences of a batch: new tokens and tokens already cached, each."""

    lengths: tuple[int, ...]
    contexts: tuple[int, ...] = ()
    rows: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        return {"T": sum(self.lengths), "S": len(self.lengths), "R": self.rows}

    def context(self, s: int) -> int:
        return self.contexts[s] if self.contexts else 0


@dataclass(eq=False)
class Case:
    """Ops over named values. Inputs may be strided; whole numbers are drawn from a range; weights carry an encoding."""

    name: str
    bucket: Bucket = PREFILL
    values: dict[Value, tuple[Any, ...]] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    states: dict[str, StateType] = field(default_factory=dict)
    tolerance: float = 6e-3
    moves: bool = False  # states are written to other slots
    batch: Value = field(default_factory=lambda: Value("batch", BatchType()))

    def input(self, name: str, type_: str, more: int = 0, ints: tuple[int, int | str] | None = None,
              scale: float = 1.0) -> Value:
        """A runtime operand whose rows lie `more` elements further apart than they are wide."""
        value = Value(name, parse_type(type_))
        self.values[value] = ("input", more, ints, scale)
        return value

    def weight(self, name: str, shape: tuple[int, ...], encoding: Encoding = VECTOR, scale: float = 0.2) -> Value:
        value = Value(name, parse_type(f"bf16[{','.join(map(str, shape))}]"))
        self.values[value] = ("weight", encoding, scale)
        return value

    def state(self, name: str, kind: StateKind, dtype: DType, shape: tuple[int, ...]) -> StateRef:
        self.states[name] = StateType(kind, dtype, shape)
        return StateRef(name)

    def op(self, name: str, operands: Sequence[Value | None], **attrs: Any) -> Any:
        """Append an op; returns its result, or a tuple of them."""
        found = TABLE[name].infer(*[v.type if v is not None else None for v in operands], **attrs)
        op = Op(name, list(operands), [], attrs, Location(f"test.{self.name}"))
        op.results = [Value(f"{name}.{len(self.ops)}.{i}", t, op)
                      for i, t in enumerate(found if isinstance(found, tuple) else (found,))]
        self.ops.append(op)
        return op.results[0] if len(op.results) == 1 else tuple(op.results)

    def lower(self, target: GpuTarget) -> list[tuple[Op, Call]]:
        """All launches in order."""
        return [(op, c) for op in self.ops for c in target.lower(op, [self._operand(v) for v in op.operands],
                                                                 [v.tensor for v in op.results], self.bucket)]

    def _operand(self, value: Value | None) -> Operand | None:
        if value is None or isinstance(value.type, BatchType):
            return None
        kind = self.values.get(value, ("result", 0))
        if kind[0] == "weight":
            return Operand(value.tensor, 0, kind[1])
        return Operand(value.tensor, width(value.tensor) + kind[1])


def width(type_: TensorType) -> int:
    """Elements of a row."""
    return int(np.prod([int(d) for d in type_.shape[1:]], dtype=np.int64))  # type: ignore[arg-type]


def check(runner: Runner, target: GpuTarget, case: Case, ragged: Ragged, seed: int = 0,
          last: int | None = None) -> float:
    """Results (the `last` ones only, if given) and caches agree with the references; returns the largest error."""
    trial = Trial(case, ragged, target, np.random.default_rng(seed))
    launches = [(c.kernel, c.grid, [trial.place(op, ref) for ref in c.args]) for op, c in case.lower(target)]
    after = runner.run(launches, trial.buffers)
    pairs = trial.results(after)
    worst = 0.0
    for what, got, want in [*(pairs if last is None else pairs[-last:]), *trial.caches_after(after)]:
        worst = max(worst, assert_close(got, want, case.tolerance, f"{case.name} {ragged}: {what}"))
    return worst


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float, what: str) -> float:
    """Whole numbers equal; floats: relative L2 error, and no element off by 8 times as much of the largest."""
    assert got.shape == want.shape, what
    if got.dtype.kind == "i":
        assert np.array_equal(got, want), f"{what}: {np.argwhere(got != want)[:4]}"
        return 0.0
    assert np.isfinite(got).all(), f"{what}: not finite at {np.argwhere(~np.isfinite(got))[:4]}"
    if got.size == 0:
        return 0.0
    error = float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-6))
    far = float(np.abs(got - want).max() / max(float(np.abs(want).max()), 1e-6))
    assert error <= tolerance and far <= 8 * tolerance, f"{what}: relative L2 {error:.2e}, largest {far:.2e}"
    return error


class Trial:
    """The memory of one run: byte buffers by name, and what the references compute on."""

    def __init__(self, case: Case, ragged: Ragged, target: GpuTarget, rng: np.random.Generator) -> None:
        self.case, self.ragged, self.target, self.rng = case, ragged, target, rng
        self.sizes = ragged.sizes
        self.buffers: dict[str, np.ndarray] = {}
        self.plain: dict[Value, np.ndarray] = {}
        self._draw_values()
        self._draw_batch()
        self._draw_states()

    def _shape(self, type_: TensorType) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else d.at(self.sizes) for d in type_.shape)

    def _draw_values(self) -> None:
        for value, kind in self.case.values.items():
            shape = self._shape(value.tensor)
            if kind[0] == "weight":
                drawn = self.rng.standard_normal(shape)
                drawn = np.abs(drawn) if kind[2] < 0 else drawn  # a negative scale: all negative, like log decays
                self.plain[value] = from_bf16(to_bf16(drawn * kind[2]))
            elif kind[2] is not None:
                high = self.sizes[kind[2][1]] if isinstance(kind[2][1], str) else kind[2][1]
                self.plain[value] = self.rng.integers(kind[2][0], high, shape, dtype=np.int32)
                self._store(f"value {value.name}", self.plain[value])
            else:
                data = (self.rng.standard_normal(shape) * kind[3]).astype(np.float32)
                narrow = value.tensor.dtype is DType.bf16
                self.plain[value] = from_bf16(to_bf16(data)) if narrow else data
                self._store(f"value {value.name}", strided(to_bf16(data) if narrow else data, kind[1]))
        for op in self.case.ops:
            for value in op.results:
                elements = int(np.prod(self._shape(value.tensor)))
                self._store(f"value {value.name}", np.full(elements * value.tensor.dtype.bits // 8, 0xFF, np.uint8))

    def _store(self, name: str, data: np.ndarray) -> None:
        line = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self.buffers[name] = np.concatenate([line, np.full(-len(line) % 64 + 64, 0xFF, np.uint8)])

    def _draw_batch(self) -> None:
        lengths, count = self.ragged.lengths, len(self.ragged.lengths)
        contexts = [self.ragged.context(s) for s in range(count)]
        size = self.target.page_size
        self.pages_of = [-(-(c + n) // size) for n, c in zip(lengths, contexts, strict=True)]
        self.pages, wide = sum(self.pages_of) + 2, max([*self.pages_of, 1]) + 1
        order, at = self.rng.permutation(self.pages), 0
        table = np.full((count, wide), 1 << 24, np.int32)
        for s, n in enumerate(self.pages_of):
            table[s, :n] = order[at:at + n]
            at += n
        self.slots = 2 * count + 2
        slots = self.rng.permutation(self.slots)
        self.arrays = {"cu_seqlens": np.cumsum([0, *lengths]), "context_lens": contexts, "block_table": table,
                       "slots": slots[:count], "into": slots[count:2 * count] if self.case.moves else slots[:count],
                       "token_seq": np.repeat(np.arange(count), lengths),
                       "last": np.zeros(self.slots),
                       "counts": [self.sizes["T"], count, self.sizes["R"], wide]}
        for name, data in self.arrays.items():
            self._store(f"input {name}", np.asarray(data, np.int32))

    def _draw_states(self) -> None:
        wide = {n: StateType(s.kind, s.dtype if s.dtype is DType.f8e4m3 else DType.f32, s.shape)
                for n, s in self.case.states.items()}
        self.caches = Caches(wide, self.slots, self.pages, self.target.page_size)
        for name, state in self.case.states.items():
            for index, store in enumerate(self.caches.data[name]):
                data = self.rng.standard_normal(tuple(store.shape)).astype(np.float32)
                if state.dtype is DType.bf16:
                    data = from_bf16(to_bf16(data))
                elif state.dtype is DType.f8e4m3:
                    data = torch.from_numpy(data).to(torch.float8_e4m3fn).float().numpy()
                if state.kind is StateKind.conv:
                    for s, slot in enumerate(self.arrays["slots"]):  # before the first token there were zeros
                        data[slot, :, :max(0, 3 - self.ragged.context(s))] = 0
                store.copy_(torch.from_numpy(data))
                part = "kv"[index] if state.kind is StateKind.kv else ""
                native = self._native(state, part, data)
                self._store(f"state {name} {part}", _stored(native, state.dtype))
        block_tables = [[int(p) for p in row] for row in np.asarray(self.arrays["block_table"])]
        self.batch = Batch(*([int(i) for i in self.arrays[n]] for n in ("cu_seqlens", "context_lens", "slots")),
                           block_tables, self.caches)

    def _native(self, state: StateType, part: str, data: np.ndarray) -> np.ndarray:
        """Reference layout to the kernels', NaN where nothing was written."""
        if part:
            keep = self._positions(0)
            data = data.copy()
            data[~keep] = np.nan
            return data.swapaxes(1, 2)  # [pages, page, heads, dim] -> [pages, heads, page, dim]
        if state.kind is StateKind.conv:
            ring = np.full((self.slots, self.target.cache_unit(state, 32)[0][0], state.shape[0]), np.nan, np.float32)
            for s, slot in enumerate(self.arrays["slots"]):
                for row, position in self._ring(s, self.ragged.context(s)):
                    ring[slot, position] = data[slot, :, row]
            return ring
        data = data.copy()
        for s, slot in enumerate(self.arrays["slots"]):
            if self.ragged.context(s) == 0:
                data[slot] = np.nan
        return data

    def _ring(self, s: int, stop: int) -> list[tuple[int, int]]:
        """(column of the reference's state, row of the ring) of the last inputs before position `stop`."""
        return [(column, (stop - 3 + column) % 16) for column in range(3) if stop - 3 + column >= 0]

    def _positions(self, new: int) -> np.ndarray:
        keep = np.zeros((self.pages, self.target.page_size), bool)
        for s, row in enumerate(np.asarray(self.arrays["block_table"])):
            for p in range(self.ragged.context(s) + new * self.ragged.lengths[s]):
                keep[row[p // self.target.page_size], p % self.target.page_size] = True
        return keep

    def place(self, op: Op, ref: Ref) -> str:
        """The buffer of an argument, made when first named."""
        if ref.kind in ("operand", "result"):
            value = op.operands[ref.index] if ref.kind == "operand" else op.results[ref.index]
            assert value is not None
            return f"value {value.name}"
        if ref.kind == "input":
            return f"input {ref.name}"
        if ref.kind == "state":
            attr = op.attrs[ref.name]
            assert isinstance(attr, StateRef)
            return f"state {attr.name} {ref.part}"
        if ref.kind == "scratch":
            name = f"scratch {op.results[0].name} {ref.name}"
            if name not in self.buffers:
                self._store(name, np.full(ref.bytes, 0xFF, np.uint8))
            return name
        value = op.operands[ref.index]
        assert value is not None
        for part, blob in self.target.pack(ref.layout, self.case.values[value][1], self.plain[value]).items():
            self._store(f"blob {value.name} {ref.layout} {part}", blob)
        return f"blob {value.name} {ref.layout} {ref.part}"

    def results(self, after: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """(what, kernels' result, reference in fp32) of every op."""
        known: dict[Value, Any] = {self.case.batch: self.batch}
        for value, data in self.plain.items():
            kind = self.case.values[value]
            encoded = encode(data, kind[1]) if kind[0] == "weight" else data
            known[value] = torch.from_numpy(np.array(encoded))
        found = []
        for op in self.case.ops:
            attrs = {k: v.name if isinstance(v, StateRef) else v for k, v in op.attrs.items()}
            operands = [known[v] if v is not None else None for v in op.operands]
            if self._narrow(op):
                operands[0] = torch.from_numpy(through_e4m3(operands[0].numpy()))
            made = TABLE[op.name].reference(*operands, **attrs)
            for value, tensor in zip(op.results, made if isinstance(made, tuple) else (made,), strict=True):
                known[value] = tensor
                found.append((value.name, self._read(after[f"value {value.name}"], value.tensor), tensor.numpy()))
        return found

    def _narrow(self, op: Op) -> bool:
        """Whether the op multiplies fp8 weights with activations rounded to e4m3."""
        weight = op.operands[PRODUCTS[op.name]] if op.name in PRODUCTS else None
        few = self.case.bucket.tokens <= FEW
        return weight is not None and self.target.narrow and not few and self.case.values[weight][1].format == "fp8"

    def _read(self, line: np.ndarray, type_: TensorType) -> np.ndarray:
        shape = self._shape(type_)
        line = line[:int(np.prod(shape)) * type_.dtype.bits // 8]
        if type_.dtype is DType.bf16:
            return from_bf16(line.view(np.uint16)).reshape(shape)
        if type_.dtype is DType.f8e4m3:
            return VALUES[line].reshape(shape)
        return line.view(np.int32 if type_.dtype is DType.i32 else np.float32).reshape(shape)

    def caches_after(self, after: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """(what, kernels' cache, reference) wherever something is written after the step."""
        found = []
        for name, state in self.case.states.items():
            shape, _ = self.target.cache_unit(state, self.target.page_size)
            for index, store in enumerate(self.caches.data[name]):
                part = "kv"[index] if state.kind is StateKind.kv else ""
                units = (self.pages if part else self.slots, *shape)
                got = self._read(after[f"state {name} {part}"], TensorType(state.dtype, units))
                want = store.float().numpy()
                if part:
                    keep = self._positions(1)
                    got, want = got.swapaxes(1, 2)[keep], want[keep]
                elif state.kind is StateKind.conv:
                    got, want = self._ring_pairs(got, want)
                else:
                    got, want = got[self.arrays["into"]], want[self.arrays["slots"]]
                found.append((f"cache {name} {part}", got, want))
                if self.case.moves and not part:
                    kept = [line[f"state {name} "].reshape(-1)[:np.prod(units) * state.dtype.bits // 8].reshape(
                        self.slots, -1)[self.arrays["slots"]].astype(np.int32) for line in (after, self.buffers)]
                    found.append((f"cache {name} where it was", *kept))
        return found

    def _ring_pairs(self, ring: np.ndarray, want: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        got, kept = [], []
        for s, slot in enumerate(self.arrays["slots"]):
            for column, row in self._ring(s, self.ragged.context(s) + self.ragged.lengths[s]):
                got.append(ring[self.arrays["into"][s], row])
                kept.append(want[slot, :, column])
        return np.array(got), np.array(kept)


def _stored(data: np.ndarray, dtype: DType) -> np.ndarray:
    """f32 as a cache of that type holds it."""
    if dtype is DType.f8e4m3:
        return torch.from_numpy(np.ascontiguousarray(data)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return to_bf16(data) if dtype is DType.bf16 else data


def through_e4m3(x: np.ndarray) -> np.ndarray:
    """x [T, K] rounded to e4m3 in groups of 128 columns whose largest becomes 448."""
    out = np.empty_like(x)
    for start in range(0, x.shape[1], 128):
        group = x[:, start:start + 128]
        scale = np.maximum(np.abs(group).max(1, keepdims=True), 1e-12) / np.float32(448)
        out[:, start:start + 128] = torch.from_numpy(group / scale).to(torch.float8_e4m3fn).float().numpy() * scale
    return out


def strided(data: np.ndarray, more: int) -> np.ndarray:
    """Rows `more` elements further apart, NaN patterns between them."""
    rows = data.reshape(len(data), -1)
    filler = np.full((len(data), more), -1 if data.dtype.kind == "u" else np.nan).astype(data.dtype)
    return np.concatenate([rows, filler], 1)


Make = Callable[[], Case]
