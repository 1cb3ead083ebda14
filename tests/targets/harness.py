"""Run ops through the real path (lower, pack, emit, host library) and through the op table, and compare.

A Program is a few ops over named values. `Lab` compiles the kernels of all programs at once and runs them on fresh
random inputs: results and scratch poisoned with NaN, guards behind every buffer, pointers aligned to 4 bytes only, rows
strided where the program says so, caches holding NaN wherever nothing was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from host_abi import Host
from programs import DECODE, PREFILL, PROGRAMS, Program, Ragged, width_of

from qcn_compile.ir import ops as _ops  # noqa: F401  (fills the op table)
from qcn_compile.ir.batch import Batch, Caches
from qcn_compile.ir.encoding import encode
from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.optable import TABLE
from qcn_compile.ir.types import DType, StateKind, StateRef, StateType, TensorType
from qcn_compile.targets.base import Kernel, Ref
from qcn_compile.targets.cpu import CpuTarget
from qcn_compile.targets.tvm.sizes import state_columns

__all__ = ["DECODE", "PREFILL", "PROGRAMS", "Host", "Lab", "Program", "Ragged", "Trial", "assert_close"]

BF16_NAN = 0x7FC0
GUARD = 24  # elements behind every buffer that must stay as they were


@dataclass
class Outcome:
    """Results by value, caches in the kernels' layout, and the same from the references."""

    got: list[np.ndarray]
    want: list[np.ndarray]
    states: list[tuple[str, np.ndarray, np.ndarray]]


class Lab:
    """Kernels of many programs in one library, and the host to run them."""

    def __init__(self, folder: Path, programs: Sequence[Program], target: CpuTarget | None = None) -> None:
        self.target = target or CpuTarget()
        self.launches = {program: program.lower(self.target) for program in programs}
        kernels: dict[Kernel, None] = {call.kernel: None for calls in self.launches.values() for _, call in calls}
        self.folder = folder
        host, library = self.target.emit(list(kernels), folder)
        self.host = Host(folder / host)
        self.library = self.host.load(folder / library)

    def run(self, program: Program, ragged: Ragged, threads: int = 1, seed: int = 0) -> Outcome:
        """Fresh inputs, kernels and references."""
        trial = Trial(program, ragged, self.target, np.random.default_rng(seed))
        self.launch(trial, threads)
        trial.check_guards()
        return trial.outcome()

    def launch(self, trial: Trial, threads: int = 1) -> np.ndarray:
        """Run the kernels of a trial's program; returns its last result."""
        self.host.start(threads)
        self.host.run(self.library, [(call.kernel.symbol, [trial.address(op, ref) for ref in call.args])
                                     for op, call in self.launches[trial.program]])
        return trial.result()

    def pieces(self, whole: Trial, steps: Sequence[tuple[Program, int]]) -> np.ndarray:
        """The one sequence of `whole` again, in steps of (program, tokens) that hand their caches on; last results."""
        results, at, before = [], 0, whole
        for program, tokens in steps:
            trial = Trial(program, Ragged((tokens,), (at,)), self.target, np.random.default_rng(0))
            trial.take(whole, at)
            trial.take_states(before, fresh=at == 0)
            results.append(self.launch(trial))
            at, before = at + tokens, trial
        return np.concatenate(results)

    def check(self, program: Program, ragged: Ragged, threads: int = 1, tolerance: float = 2e-5, seed: int = 0,
              last: int | None = None) -> None:
        """Results (the `last` ones only, if given) and caches agree with the references."""
        done = self.run(program, ragged, threads, seed)
        pairs = list(zip(done.got, done.want, strict=True))
        for got, want in pairs if last is None else pairs[-last:]:
            assert_close(got, want, tolerance, program.name)
        for name, got, want in done.states:
            assert_close(got, want, tolerance, f"{program.name}, cache {name}")


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float, what: str) -> None:
    """Equal shapes, no NaN where none is wanted, |got - want| <= tolerance * (largest |want|)."""
    assert got.shape == want.shape, what
    differ = np.isnan(got) != np.isnan(want)
    assert not differ.any(), f"{what}: NaN at {np.argwhere(differ)[:4]}"
    scale = max(float(np.nanmax(np.abs(want), initial=0.0)), 1e-3)
    error = float(np.nanmax(np.abs(got.astype(np.float64) - want), initial=0.0)) / scale
    assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:.3g}"


class Trial:
    """The memory of one run."""

    def __init__(self, program: Program, ragged: Ragged, target: CpuTarget, rng: np.random.Generator) -> None:
        self.program, self.ragged, self.target, self.rng = program, ragged, target, rng
        self.sizes = ragged.sizes
        assert all(self.sizes[k] <= most for k, most in program.bucket.sizes.items()), "more than the bucket holds"
        self.buffers: dict[Any, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.plain: dict[Value, np.ndarray] = {}
        self._draw_values()
        self._draw_batch()
        self._draw_states()

    # ---- inputs ----

    def _shape(self, type_: TensorType) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else d.at(self.sizes) for d in type_.shape)

    def _draw_values(self) -> None:
        for value, kind in self.program.values.items():
            shape = self._shape(value.tensor)
            if kind[0] == "weight":
                self.plain[value] = (self.rng.standard_normal(shape) * kind[2]).astype(np.float32)
                continue
            _, stride, ints, scale = kind
            if ints is not None:
                high = self.sizes[ints[1]] if isinstance(ints[1], str) else ints[1]
                data = self.rng.integers(ints[0], high, shape, dtype=np.int32)
            else:
                data = (self.rng.standard_normal(shape) * scale).astype(np.float32)
            self.plain[value] = data
            self._place(value, strided(data, stride))
        for op in self.program.ops:
            for value in op.results:
                self._place(value, np.full(self._shape(value.tensor), poison(value.tensor)))

    def _place(self, key: Any, data: np.ndarray) -> np.ndarray:
        """Copy into a guarded buffer, 4-byte aligned but not 8; returns the view inside."""
        raw = np.zeros(data.nbytes + 4 * GUARD + 128, np.uint8)
        start = -raw.ctypes.data % 64 + 4
        view = raw[start:start + data.nbytes].view(data.dtype).reshape(data.shape)
        view[...] = data
        guard = raw[start + data.nbytes:start + data.nbytes + 4 * GUARD]
        guard[...] = 0xA5
        self.buffers[key] = (raw, view, guard)
        return view

    def _draw_batch(self) -> None:
        lengths, count = self.ragged.lengths, len(self.ragged.lengths)
        contexts = [self.ragged.context(s) for s in range(count)]
        self.pages_of = [-(-(c + n) // self.target.page_size) for n, c in zip(lengths, contexts, strict=True)]
        self.pages, width = sum(self.pages_of) + 2, max([*self.pages_of, 1]) + 1
        order, at = self.rng.permutation(self.pages), 0
        table = np.full((count, width), 1 << 30, np.int32)
        for s, n in enumerate(self.pages_of):
            table[s, :n] = order[at:at + n]
            at += n
        self.slots = count + 2
        arrays = {"cu_seqlens": np.cumsum([0, *lengths]), "context_lens": contexts, "block_table": table,
                  "slots": self.rng.permutation(self.slots)[:count], "token_seq": np.repeat(np.arange(count), lengths),
                  "into": (), "counts": [self.sizes["T"], count, self.sizes["R"], width]}
        arrays["into"] = arrays["slots"]
        self.arrays = {name: self._place(("input", name), np.asarray(data, np.int32)) for name, data in arrays.items()}

    def _draw_states(self) -> None:
        """Reference caches with random contents, and the same in the kernels' layout, NaN where nothing was written."""
        self.caches = Caches(self.program.states, self.slots, self.pages, self.target.page_size)
        for name, state in self.program.states.items():
            for index, store in enumerate(self.caches.data[name]):
                store.copy_(torch.from_numpy(self.rng.standard_normal(tuple(store.shape)).astype(np.float32)))
                part = "kv"[index] if state.kind is StateKind.kv else ""
                data = bits(self._native(state, part, store.float().numpy().copy()), state)
                self._poison_unwritten(state, part, data)
                self._place(("state", name, part), data)
        self.batch = Batch([int(i) for i in self.arrays["cu_seqlens"]], [int(i) for i in self.arrays["context_lens"]],
                           [int(i) for i in self.arrays["slots"]],
                           [[int(p) for p in row] for row in self.arrays["block_table"]], self.caches)

    def _native(self, state: StateType, part: str, data: np.ndarray) -> np.ndarray:
        """Reference layout (kv [pages, page, heads, dim], conv [slots, C, W-1], delta [slots, Hv, Dk, Dv]), ours."""
        if state.kind is StateKind.conv:
            data = data.swapaxes(1, 2)
        elif state.kind is StateKind.delta:
            slots, heads, depth, width = data.shape
            columns = state_columns(width)
            data = data.reshape(slots, heads, depth, width // columns, columns).swapaxes(2, 3)
        elif part:
            data = data.transpose(0, 2, 3, 1) if part == "k" else data.swapaxes(1, 2)
        return np.ascontiguousarray(data)

    def _poison_unwritten(self, state: StateType, part: str, data: np.ndarray) -> None:
        if part:
            keep = np.zeros((self.pages, self.target.page_size), bool)
            for s, row in enumerate(self.arrays["block_table"]):
                for p in range(self.ragged.context(s)):
                    keep[row[p // self.target.page_size], p % self.target.page_size] = True
            data.swapaxes(1, 3 if part == "k" else 2)[~keep] = np.nan
            return
        for s, slot in enumerate(self.arrays["slots"]):
            if self.ragged.context(s) == 0:
                data[slot] = np.nan if data.dtype == np.float32 else BF16_NAN

    # ---- running ----

    def address(self, op: Op, ref: Ref) -> int:
        """Where an argument lies."""
        if ref.kind in ("operand", "result"):
            value = op.operands[ref.index] if ref.kind == "operand" else op.results[ref.index]
            return self._at(value)
        if ref.kind == "input":
            return self._at(("input", ref.name))
        if ref.kind == "state":
            attr = op.attrs[ref.name]
            assert isinstance(attr, StateRef)
            return self._at(("state", attr.name, ref.part))
        key = (id(op), ref.kind, ref.index, ref.name, ref.layout, ref.part)
        if key not in self.buffers and ref.kind == "scratch":
            self._place(key, np.full(ref.bytes // 4, np.nan, np.float32))
        elif key not in self.buffers:
            self._pack(op, ref)
        return self._at(key)

    def _pack(self, op: Op, ref: Ref) -> None:
        value = op.operands[ref.index]
        encoding = self.program.values[value][1]
        for part, blob in self.target.pack(ref.layout, encoding, self.plain[value]).items():
            assert blob.ndim == 1, ref
            raw = np.zeros(blob.nbytes + 4096, np.uint8)
            view = raw[-raw.ctypes.data % 64:][:-(-blob.nbytes // 64) * 64]
            view[:blob.nbytes] = blob.view(np.uint8)
            self.buffers[id(op), "blob", ref.index, ref.name, ref.layout, part] = (raw, view, raw[:0])

    def _at(self, key: Any) -> int:
        return int(self.buffers[key][1].ctypes.data)

    def take(self, source: Trial, first: int) -> None:
        """Weights of `source`, and its rows from `first` on, for as many tokens as this trial has."""
        for mine, theirs in zip(self.program.values, source.program.values, strict=True):
            kind = self.program.values[mine]
            if kind[0] == "weight":
                self.plain[mine] = source.plain[theirs]
                continue
            rows = source.plain[theirs][first:first + len(self.plain[mine])]
            strides = (kind[1] or width_of(mine.tensor)) * 4, 4
            flat = np.lib.stride_tricks.as_strided(self.buffers[mine][1].view(rows.dtype).reshape(-1),
                                                   (len(rows), rows[0].size), strides)
            flat[...] = rows.reshape(len(rows), -1)
            self.plain[mine] = rows

    def take_states(self, source: Trial, fresh: bool) -> None:
        """Slots, pages and, unless fresh, caches of an earlier trial of the same sequence."""
        for name in ("slots", "into", "block_table"):
            self.buffers["input", name] = source.buffers["input", name]
            self.arrays[name] = source.arrays[name]
        self.arrays["counts"][3] = self.arrays["block_table"].shape[1]
        for name, state in self.program.states.items():
            for part in ("k", "v") if state.kind is StateKind.kv else ("",):
                data = source.buffers["state", name, part][1]
                nan = np.nan if data.dtype == np.float32 else BF16_NAN
                self._place(("state", name, part), np.full_like(data, nan) if fresh else data)

    def result(self) -> np.ndarray:
        """The last result of the program."""
        return self.buffers[self.program.ops[-1].results[0]][1].copy()

    def check_guards(self) -> None:
        for key, (_, _, guard) in self.buffers.items():
            assert (guard == 0xA5).all(), f"wrote behind the end of {key}"

    def outcome(self) -> Outcome:
        """Kernels' results beside the references'."""
        known: dict[Value, Any] = {self.program.batch: self.batch}
        for value, kind in self.program.values.items():
            data = encode(self.plain[value], kind[1]) if kind[0] == "weight" else self.plain[value]
            known[value] = torch.from_numpy(np.array(data))
        got, want = [], []
        for op in self.program.ops:
            run = self.program.references.get(op, TABLE[op.name].reference)
            attrs = {k: v.name if isinstance(v, StateRef) else v for k, v in op.attrs.items()}
            made = run(*[known[v] if v is not None else None for v in op.operands], **attrs)
            for value, tensor in zip(op.results, made if isinstance(made, tuple) else (made,), strict=True):
                known[value] = tensor
                got.append(self.buffers[value][1].copy())
                want.append(tensor.numpy())
        return Outcome(got, want, list(self._states()))

    def _states(self) -> Any:
        for name, state in self.program.states.items():
            for index, store in enumerate(self.caches.data[name]):
                part = "kv"[index] if state.kind is StateKind.kv else ""
                want = self._native(state, part, store.float().numpy())
                got = floats(self.buffers["state", name, part][1])
                keep = self._written(part)
                if part:
                    axis = 3 if part == "k" else 2
                    yield f"{name}.{part}", got.swapaxes(1, axis)[keep], want.swapaxes(1, axis)[keep]
                else:
                    yield name, got[keep], want[keep]

    def _written(self, part: str) -> np.ndarray:
        """Which (page, position) holds something after the step; slots all do, unused ones what they held before."""
        if not part:
            return np.ones(self.slots, bool)
        keep = np.zeros((self.pages, self.target.page_size), bool)
        for s, row in enumerate(self.arrays["block_table"]):
            for p in range(self.ragged.context(s) + self.ragged.lengths[s]):
                keep[row[p // self.target.page_size], p % self.target.page_size] = True
        return keep


def bits(data: np.ndarray, state: StateType) -> np.ndarray:
    """f32 values as a cache of that type holds them: f32, or the upper halves of numbers that bf16 holds exactly."""
    return data if state.dtype is DType.f32 else (data.view(np.uint32) >> 16).astype(np.uint16)


def floats(data: np.ndarray) -> np.ndarray:
    """The inverse of `bits`."""
    return data if data.dtype == np.float32 else (data.astype(np.uint32) << 16).view(np.float32)


def strided(data: np.ndarray, stride: int) -> np.ndarray:
    """Rows `stride` elements apart, NaN between them (the last row is not padded)."""
    width = int(np.prod(data.shape[1:], dtype=np.int64))
    if stride in (0, width) or len(data) == 0:
        return data
    flat = np.full((len(data), stride), np.nan, np.float32)
    flat[:, :width] = data.reshape(len(data), width)
    return flat.reshape(-1)[:stride * (len(data) - 1) + width]


def poison(type_: TensorType) -> Any:
    """What an unwritten result holds."""
    return np.float32(np.nan) if type_.dtype.is_float else np.int32(-1 << 30)
