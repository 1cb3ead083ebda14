"""Flags of memory and scheduling mean what they mean in SGLang, from the command line to the loaded model."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from qcn_compile.errors import CapacityError, QcnError, UsageError
from qcn_compile.runtime import cli
from qcn_compile.runtime.memory import memory_bytes, shared_budget


@contextmanager
def started(build, *flags):
    arguments = cli.parser().parse_args([str(build), "--port", "1", "--threads", "1", *flags])
    with cli._load(arguments, None) as model:
        yield model


@pytest.mark.parametrize(("flags", "running", "snapshots", "drafts"), [
    ("--max-mamba-cache-size 6 --max-running-requests 2", 2, 4, 0),  # slots of the whole server
    ("--max-mamba-cache-size 3 --max-running-requests 8", 3, 0, 0),  # which bound the running requests
    ("--max-mamba-cache-size 3 --max-running-requests 8 --disable-radix-cache", 3, 0, 0),
    ("--max-running-requests 5 --disable-radix-cache", 5, 0, 0),
    ("--max-mamba-cache-size 8 --max-running-requests 2 --speculative-algorithm NGRAM", 2, 6, 2),  # drafts' come on top
    ("--disable-radix-cache", 16, 0, 0),
])
def test_state_slots(toy_build, flags, running, snapshots, drafts):
    with started(toy_build, *flags.split()) as model:
        memory = model.memory
        assert (memory.slots, memory.snapshots, memory.drafts) == (running, snapshots, drafts)
        assert f"{running} sequences at once" in model.describe()


@pytest.mark.parametrize("ratio", [0.25, 0.9, 3.0])
def test_ratio_of_state_memory_to_kv_memory(toy_build, ratio):
    """Where the running sequences could use more of both than there is."""
    with started(toy_build, "--cache-memory", "0.0001", "--max-running-requests", "32", "--context-length", "128",
                 "--mamba-full-memory-ratio", str(ratio)) as model:
        memory = model.memory
        slot, page = memory.state_bytes / memory.all_slots, memory.kv_bytes / memory.pages
        whole = memory.state_bytes + memory.kv_bytes
        assert whole <= 100_000
        full = memory.pages == memory.slots * (memory.context_length // memory.page_size)
        assert full or whole > 100_000 - slot - page
        assert memory.state_bytes <= max(ratio * (100_000 - memory.state_bytes), memory.slots * slot) + slot
        assert full or memory.state_bytes > ratio * memory.kv_bytes - (1 + ratio) * max(slot, page)


def test_share_of_the_memory(toy_build):
    with started(toy_build, "--mem-fraction-static", "0.000001") as model:
        used = model.executable.weight_bytes + model.memory.kv_bytes + model.memory.state_bytes
        assert 0 < used <= 1e-6 * memory_bytes()
    assert shared_budget(0.9, 80_000, 70_000) == 2000
    with pytest.raises(CapacityError, match="less than the weights"):
        shared_budget(0.5, 80_000, 70_000)


def test_chunks_and_contexts(toy_build):
    for flags, chunk in (("--chunked-prefill-size 8", 8), ("--chunked-prefill-size -1", 32), ("", 32)):
        with started(toy_build, *flags.split()) as model:
            assert model.engine._scheduler.limits.prefill_chunk == chunk
    with started(toy_build, "--context-length", "50", "--max-running-requests", "3") as model:
        assert model.memory.context_length == 50 and model.engine._scheduler.limits.max_running == 3


@pytest.mark.parametrize(("flags", "kind", "cure"), [
    ("--max-mamba-cache-size 0", UsageError, "leave it out to let --mamba-full-memory-ratio decide"),
    ("--mamba-full-memory-ratio 0", UsageError, "must be more than 0"),
    ("--context-length 129", UsageError, "--json-model-override-args"),
    ("--mem-fraction-static 0.5 --cache-memory 1", UsageError, "exclude each other"),
    ("--max-running-requests 0", UsageError, "must be at least 1"),
    ("--cache-memory 0.0000001", CapacityError, "lower --context-length or --max-running-requests"),
])
def test_what_cannot_be(toy_build, flags, kind, cure):
    with pytest.raises(QcnError, match=cure) as found, started(toy_build, *flags.split()):
        pass
    assert isinstance(found.value, kind)
