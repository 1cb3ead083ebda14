"""The paged KV cache's bookkeeping: reference-counted pages and one block table per sequence. No device memory here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from qcn_compile.errors import CapacityError


class Spare(Protocol):
    """An owner that gives pages back when others need them."""

    def reclaimable(self) -> int: ...

    def reclaim_pages(self, count: int) -> None: ...


class PageAllocator:
    """Hands out page numbers 0..pages-1. A page may be held by several owners; it is free again when all let go.

    Pages that only `spare` holds (the prefix cache) count as available: they are taken from it when free ones run out.
    """

    def __init__(self, pages: int) -> None:
        self._free = list(range(pages - 1, -1, -1))
        self._references = np.zeros(pages, np.int32)
        self.spare: Spare | None = None

    @property
    def total(self) -> int:
        return len(self._references)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def available(self) -> int:
        """Free pages, and those that can be had from the spare ones."""
        return self.free + (0 if self.spare is None else self.spare.reclaimable())

    @property
    def used(self) -> int:
        """Pages that sequences hold."""
        return self.total - self.available

    @property
    def references(self) -> np.ndarray:
        """i32 [pages], how many owners each has."""
        return self._references

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one owner each. Raises CapacityError, taking none, when fewer are available."""
        if count > self.free and self.spare is not None:
            self.spare.reclaim_pages(count - self.free)
        if count > self.free:
            raise CapacityError(f"{count} KV pages wanted, {self.free} of {self.total} free; "
                                "run fewer requests at once, or start with more KV memory")
        pages = [self._free.pop() for _ in range(count)]
        self._references[pages] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for pages in use."""
        for page in pages:
            if self._references[page] == 0:
                raise ValueError(f"KV page {page} is free and cannot be shared")
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One owner less; pages without owners are free again."""
        for page in pages:
            if self._references[page] == 0:
                raise ValueError(f"KV page {page} released twice")
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def check_integrity(self, owners: Iterable[Iterable[int]] | None = None) -> None:
        """Free pages are distinct and unowned; with `owners` (page lists) the reference counts must match them."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError("a KV page is in the free list twice")
        if {int(p) for p in np.flatnonzero(self._references == 0)} != free:
            raise AssertionError("the free list and the reference counts of the KV pages disagree")
        if owners is not None:
            held = Counter(int(page) for pages in owners for page in pages)
            wrong = [p for p in range(self.total) if self._references[p] != held[p]]
            if wrong:
                raise AssertionError(f"KV pages {wrong[:8]}: reference counts differ from their owners' tables")


class BlockTable:
    """The KV pages of one sequence, in order, as an i32 array of fixed capacity that grows with the tokens."""

    def __init__(self, allocator: PageAllocator, page_size: int, context_length: int) -> None:
        self._allocator = allocator
        self._page_size = page_size
        self._table = np.zeros(-(-context_length // page_size), np.int32)
        self._count = 0

    @property
    def pages(self) -> np.ndarray:
        """i32 [pages in use], a view."""
        return self._table[: self._count]

    def missing(self, tokens: int) -> int:
        """How many pages more `tokens` tokens need than the table has."""
        return max(0, -(-tokens // self._page_size) - self._count)

    def grow(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all. Raises CapacityError, changing nothing, when pages run out."""
        count = self.missing(tokens)
        if self._count + count > len(self._table):
            raise CapacityError(f"{tokens} tokens are more than the context of {len(self._table) * self._page_size}; "
                                "shorten the prompt or build with a larger --context-length")
        if count:
            self._table[self._count:self._count + count] = self._allocator.allocate(count)
            self._count += count

    def adopt(self, pages: Sequence[int]) -> None:
        """Begin with pages of others, becoming one more owner of them."""
        assert self._count == 0
        self._allocator.share(pages)
        self._table[:len(pages)] = pages
        self._count = len(pages)

    def release(self) -> None:
        """Give every page back."""
        self._allocator.release(self.pages.tolist())
        self._count = 0
