"""The ragged batch of one step, as the references see it: sequences, and the caches they read and write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from qcn_compile.ir.types import StateKind, StateType

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f8e4m3": torch.float8_e4m3fn,
         "i64": torch.int64, "i32": torch.int32, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool}


@dataclass(frozen=True)
class Span:
    """One sequence of the batch: its tokens are rows `start:stop`; `context` tokens came in earlier steps."""

    start: int
    stop: int
    context: int
    slot: int
    pages: tuple[int, ...]


@dataclass
class Caches:
    """Storage for the states of a graph. kv: (k, v) each [pages, page, heads, dim]; others: [slots, *shape]."""

    states: dict[str, StateType]
    slots: int
    pages: int
    page_size: int
    data: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, state in self.states.items():
            dtype = TORCH[state.dtype.value]
            if state.kind is StateKind.kv:
                shape = (self.pages, self.page_size, *state.shape)
                self.data[name] = (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
            else:
                self.data[name] = (torch.zeros((self.slots, *state.shape), dtype=dtype),)


@dataclass
class Batch:
    """The value of a `batch` operand."""

    cu_seqlens: list[int]
    context_lens: list[int]
    slots: list[int]
    block_tables: list[list[int]]
    caches: Caches | None = None
    passing: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @staticmethod
    def fresh(lengths: list[int]) -> Batch:
        """Sequences that start from nothing and keep nothing."""
        cu = [0]
        for n in lengths:
            cu.append(cu[-1] + n)
        return Batch(cu, [0] * len(lengths), list(range(len(lengths))), [[] for _ in lengths])

    def spans(self) -> Iterator[Span]:
        """The sequences, in order."""
        for i, (a, b) in enumerate(zip(self.cu_seqlens[:-1], self.cu_seqlens[1:], strict=True)):
            yield Span(a, b, self.context_lens[i], self.slots[i], tuple(self.block_tables[i]))

    def append_kv(self, name: str, span: Span, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store this step's keys and values [n, heads, dim]; return all of the sequence's so far."""
        if self.caches is None:
            self.passing[name, span.start] = (k, v)
            return k, v
        keys, values = self.caches.data[name]
        fresh = self._rows(span)[span.context:]
        keys.flatten(0, 1)[fresh], values.flatten(0, 1)[fresh] = k.to(keys.dtype), v.to(values.dtype)
        return self.stored_kv(name, span)

    def stored_kv(self, name: str, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of the sequence, this step's included, each [context + n, heads, dim]."""
        if self.caches is None:
            return self.passing[name, span.start]
        keys, values = self.caches.data[name]
        rows = self._rows(span)
        return keys.flatten(0, 1)[rows], values.flatten(0, 1)[rows]

    def _rows(self, span: Span) -> torch.Tensor:
        size = self.caches.page_size if self.caches else 1
        total = span.context + span.stop - span.start
        return torch.tensor([span.pages[p // size] * size + p % size for p in range(total)], dtype=torch.long)

    def state(self, name: str, span: Span, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A copy of the sequence's state, zeros at its first token."""
        if self.caches is None or span.context == 0:
            return torch.zeros(shape, dtype=dtype)
        return self.caches.data[name][0][span.slot].to(dtype, copy=True)

    def keep(self, name: str, span: Span, value: torch.Tensor) -> None:
        """Write the sequence's state back."""
        if self.caches is not None:
            store = self.caches.data[name][0]
            store[span.slot] = value.to(store.dtype)
