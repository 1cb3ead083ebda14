"""Sequences stepped by hand, beside the engine: for logits, evaluation and tests."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from qcn_compile.errors import CapacityError, UsageError
from qcn_compile.runtime.batch import Span
from qcn_compile.runtime.engine import Engine, Runner
from qcn_compile.runtime.kv_cache import BlockTable


@dataclass
class _Sequence:
    table: BlockTable
    slot: int
    length: int = 0


class RaggedSequences:
    """Named sequences whose caches come from the engine's pages and slots and stay until released."""

    def __init__(self, runner: Runner, engine: Engine) -> None:
        self._runner, self._engine = runner, engine
        self._sequences: dict[Hashable, _Sequence] = {}

    def step(self, batch: Sequence[tuple[Hashable, Sequence[int]]]) -> list[np.ndarray]:
        """Append tokens to sequences; copies of all their logits, f32 [tokens, vocab] each."""
        names = [name for name, _ in batch]
        if not batch or len(set(names)) != len(names):
            raise UsageError("a step needs at least one sequence, and each only once")
        started = [name for name in names if name not in self._sequences]
        try:
            spans = [self._span(name, tokens) for name, tokens in batch]
            logits = self._runner.run(spans)
        except CapacityError:
            for name in started:
                self.release(name)
            raise
        for name, tokens in batch:
            self._sequences[name].length += len(tokens)
        ends = np.cumsum([len(tokens) for _, tokens in batch])[:-1]
        return [rows.copy() for rows in np.split(logits, ends)]

    def release(self, name: Hashable) -> None:
        """Give a sequence's caches back; unknown names are fine."""
        sequence = self._sequences.pop(name, None)
        if sequence is not None:
            sequence.table.release()
            self._engine.slots.release(sequence.slot)

    def held(self) -> list[tuple[int, list[int]]]:
        """(slot, pages) of every sequence."""
        return [(s.slot, s.table.pages.tolist()) for s in self._sequences.values()]

    def _span(self, name: Hashable, tokens: Sequence[int]) -> Span:
        sequence = self._sequences.get(name)
        if sequence is None:
            config = self._engine.config
            table = BlockTable(self._engine.pages, config.page_size, config.context_length)
            sequence = self._sequences[name] = _Sequence(table, self._engine.slots.acquire())
        sequence.table.grow(sequence.length + len(tokens))
        return Span(tokens, sequence.length, sequence.slot, sequence.table.pages, len(tokens))
