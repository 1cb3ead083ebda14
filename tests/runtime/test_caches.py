"""Pages and slots: counts, sharing, tables, and nothing leaked under random use."""

from __future__ import annotations

import random

import pytest

from qcn_compile.errors import CapacityError
from qcn_compile.runtime.kv_cache import BlockTable, PageAllocator
from qcn_compile.runtime.state_slots import SlotAllocator


def test_pages_are_counted():
    pages = PageAllocator(4)
    held = pages.allocate(3)
    assert len(set(held)) == 3 and (pages.free, pages.used, pages.total) == (1, 3, 4)
    with pytest.raises(CapacityError, match="2 KV pages wanted, 1 of 4 free"):
        pages.allocate(2)
    assert pages.free == 1
    pages.release(held)
    assert pages.free == 4
    with pytest.raises(ValueError, match="released twice"):
        pages.release(held[:1])


def test_shared_pages_are_freed_by_their_last_owner():
    pages = PageAllocator(3)
    held = pages.allocate(2)
    pages.share(held[:1])
    pages.check_integrity([held, held[:1]])
    pages.release(held)
    assert pages.free == 2
    pages.check_integrity([held[:1]])
    pages.release(held[:1])
    pages.check_integrity([])
    with pytest.raises(ValueError, match="is free"):
        pages.share([0])


def test_integrity_names_wrong_pages():
    pages = PageAllocator(3)
    held = pages.allocate(1)
    with pytest.raises(AssertionError, match=rf"\[{held[0]}\]"):
        pages.check_integrity([])


def test_block_table_grows_by_pages():
    pages = PageAllocator(8)
    table = BlockTable(pages, page_size=4, context_length=10)
    for tokens, want in [(1, 1), (4, 1), (5, 2), (5, 2), (10, 3)]:
        table.grow(tokens)
        assert len(table.pages) == want and table.missing(tokens) == 0
    with pytest.raises(CapacityError, match="context"):
        table.grow(13)
    pages.check_integrity([table.pages.tolist()])
    table.release()
    assert pages.free == 8 and len(table.pages) == 0


def test_a_table_that_cannot_grow_is_unchanged():
    pages = PageAllocator(2)
    table = BlockTable(pages, 4, 100)
    with pytest.raises(CapacityError):
        table.grow(12)
    assert pages.free == 2 and len(table.pages) == 0


def test_random_tables_leak_nothing():
    rng, pages, tables = random.Random(0), PageAllocator(40), []
    for _ in range(600):
        if tables and rng.random() < 0.4:
            tables.pop(rng.randrange(len(tables)))[0].release()
        else:
            tables.append([BlockTable(pages, 4, 64), 0])
        for row in tables:
            tokens = min(64, row[1] + rng.randint(0, 6))
            if row[0].missing(tokens) <= pages.free:
                row[0].grow(tokens)
                row[1] = tokens
        pages.check_integrity([table.pages.tolist() for table, _ in tables])


def test_slots():
    slots = SlotAllocator(2)
    first, second = slots.acquire(), slots.acquire()
    assert {first, second} == {0, 1} and slots.free == 0
    with pytest.raises(CapacityError, match="all 2 state slots"):
        slots.acquire()
    slots.release(first)
    slots.check_integrity([second])
    with pytest.raises(ValueError, match="without being held"):
        slots.release(first)
    with pytest.raises(AssertionError, match="leaked"):
        slots.check_integrity([])
