"""A prompt's chunk beside decoding sequences: what the scheduler makes of it, the plan a GPU takes, and its inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_driver import FakeDriver

from qcn_compile.artifact import SCHEMA, Arg, CacheSpec, Launch, Manifest, Plan, seal, write_json
from qcn_compile.lowering.buckets import buckets_for
from qcn_compile.runtime.batch import Span
from qcn_compile.runtime.cuda.executable import CudaExecutable
from qcn_compile.runtime.cuda.opening import open_cuda
from qcn_compile.runtime.kv_cache import PageAllocator
from qcn_compile.runtime.request import Request, SamplingParams
from qcn_compile.runtime.scheduler import Chunk, Scheduler, SchedulerLimits
from qcn_compile.runtime.state_slots import SlotAllocator

PAGE, LENGTH, SLOTS, WIDTH = 32, 16384, 256, 5
ARRAYS = ("tokens", "cu_seqlens", "context_lens", "slots", "rows", "counts")


@pytest.fixture
def executable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CudaExecutable:
    """All plans of a GPU build, each of one kernel that reads the arrays of a step, over the fake driver."""
    monkeypatch.setattr("qcn_compile.runtime.cuda.driver.bindings", FakeDriver)
    row = {"file": "k.cubin", "entry": "k", "shared": 0, "threads": 32, "pdl": True, "pointers": len(ARRAYS),
           "loose": []}
    (tmp_path / "kernels").mkdir()
    write_json(tmp_path / "kernels" / "kernels.json", {"k": row})
    (tmp_path / "kernels" / "k.cubin").write_bytes(b"cubin")
    args, names = tuple(Arg("input", name) for name in ARRAYS), []
    for bucket in buckets_for("gpu"):
        plan = Plan("main", bucket.name, bucket.tokens, bucket.sequences, bucket.rows, 8192,
                    (Launch("k", args, "op %a", "here", 10, 20, (bucket.tokens,)),),
                    {"logits": {"offset": 0, "dtype": "bf16", "width": WIDTH}})
        names.append(f"plan/{bucket.name}.json")
        write_json(tmp_path / names[-1], plan.to_json())
    spec = {"mode": "dummy", "files": [], "blobs": {"w.w": {"bytes": 1 << 12, "fill": "bf16"}}}
    caches = (CacheSpec("kv", "kv", "bf16", (1, 32, 8), 2 * 2 * 8 * PAGE), CacheSpec("d", "delta", "f32", (2, 4), 32))
    manifest = Manifest(SCHEMA, {}, {"name": "h200", "kind": "gpu", "arch": 90}, {}, caches, PAGE, LENGTH, WIDTH, 8,
                        tuple(names), ("kernels/kernels.json",), spec, {})
    return open_cuda(tmp_path, seal(tmp_path, manifest), LENGTH, SLOTS, None)[1]


def mixed(executable: CudaExecutable, decoding: int, prompt: int) -> list[Chunk]:
    """The step of a scheduler over the build's plans when a prompt arrives beside decoding requests."""
    capacities = executable.capacities
    limits = SchedulerLimits(SLOTS, max(c.tokens for c in capacities), PAGE, LENGTH)
    scheduler = Scheduler(limits, capacities, PageAllocator(20_000), SlotAllocator(SLOTS))
    for arrival in range(decoding):
        scheduler.add(Request(f"d{arrival}", [1] * (2 + arrival), SamplingParams(), 50, arrival))
    while any(not r.decoding for r in (*scheduler.waiting, *scheduler.running)):
        for chunk in scheduler.schedule():
            scheduler.advance(chunk)
            chunk.request.tokens.append(2)
    if prompt:
        scheduler.add(Request("p", [3] * prompt, SamplingParams(), 50, decoding))
    return scheduler.schedule()


def spans(chunks: list[Chunk]) -> list[Span]:
    found = []
    for chunk in chunks:
        request, done = chunk.request, chunk.request.computed
        assert request.table is not None and request.slot is not None
        found.append(Span(request.tokens[done:done + chunk.count], done, request.slot, request.table.pages, chunk.rows))
    return found


@pytest.mark.parametrize(("decoding", "prompt", "tokens", "plan"), [
    (20, 0, 20, "decode-32"),
    (8, 24, 32, "decode-32"),  # the delta rule goes token by token, attention over splits of the keys
    (5, 200, 205, "prefill-512"),
    (32, 512, 544, "prefill-1024"),
    (32, 12_000, 8192, "prefill-8192"),  # the prompt gets what the decoding ones leave of the largest plan
    (200, 100, 300, "prefill-512"),
])
def test_plans_of_mixed_steps(executable: CudaExecutable, decoding: int, prompt: int, tokens: int, plan: str) -> None:
    chunks = mixed(executable, decoding, prompt)
    step = spans(chunks)
    assert len(chunks) == decoding + bool(prompt) and sum(chunk.count for chunk in chunks) == tokens
    logits = executable.run(step)
    assert executable._last.name == plan
    assert logits.shape == (decoding + (0 < prompt < 8192), WIDTH)  # a prompt that goes on wants no logits
    arrays = executable._inputs.arrays
    assert arrays["counts"][:3].tolist() == [tokens, len(step), len(logits)]
    ends = np.cumsum([len(span.tokens) for span in step])
    assert arrays["cu_seqlens"][:len(step) + 1].tolist() == [0, *ends]
    assert arrays["context_lens"][:len(step)].tolist() == [span.context for span in step]
    assert arrays["slots"][:len(step)].tolist() == [span.slot for span in step]
    assert arrays["rows"][:len(logits)].tolist() == [
        end - 1 for end, span in zip(ends, step, strict=True) if span.wanted]
    executable.check_integrity()
