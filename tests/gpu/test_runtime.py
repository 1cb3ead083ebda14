"""On a card: the runtime's equalities on the bundled model, and how it starts, lasts and drafts at full size.

Needs `.gpu/` (see README.md) and an NVIDIA GPU; skipped elsewhere.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_card import BUILDS, CARD, MODEL, _events, say

from qcn_compile.runtime.batch import Span

HERE = Path(__file__).parent
FULL = next((BUILDS / name for name in ("full-mtp", "full") if (BUILDS / name).is_dir()), BUILDS / "full")
CODE = ("class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        "
        "self.items.append(item)\n\n    def pop(self):\n        return self.items.pop()\n")
SYSTEM = "You are a coding assistant. Answer with Python code and one sentence about it. " * 8
TASKS = ["Write a function that adds two numbers.", "Now one that reverses a list. " * 12,
         "Explain the second one. " * 25, "Write a class for a stack with push and pop, and tests for it. " * 6]
PROMPTS: list[Any] = ["def fib(n):\n", CODE, "x = [1, 2, 3]\n" * 20,
                      [{"role": "user", "content": "Add a docstring to every method:\n" + CODE}]]
CLOSE = 0.08  # of the logits' spread: two tokens so close may change places when sums are taken in another order
pytestmark = pytest.mark.skipif(not (CARD and BUILDS.is_dir()), reason="needs an NVIDIA GPU and .gpu/ (prepare.py)")
small = pytest.mark.skipif(not (BUILDS / "tiny-mtp").is_dir(), reason="no tiny-mtp")
large = pytest.mark.skipif(not FULL.is_dir(), reason="no full build")


def tiny(**options: Any) -> Any:
    """The bundled model with its draft head, weights as they are."""
    from qcn_compile import load

    return load(BUILDS / "tiny-mtp", model=MODEL, **options)


def greedy(model: Any, prompt: Any, count: int = 80) -> list[int]:
    return [t for o in model.generate(prompt, temperature=0, max_tokens=count) for t in o.token_ids]


@pytest.fixture(scope="module")
def plain() -> Iterator[Any]:
    with tiny(max_running_requests=4) as model:
        yield model
        model.check_integrity()


class Ties:
    """Greedy texts against the plain run's: the same, or apart from a place on where the plain logits tie nearly."""

    def __init__(self, plain: Any) -> None:
        self.plain, self.same, self.close, self.wrong = plain, 0, 0, 0

    def add(self, prompt: list[int], got: list[int], want: list[int]) -> None:
        if got == want:
            self.same += 1
            return
        place = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
        pair = (got + want[-1:])[place], (want + got[-1:])[place]
        row = self.plain.logits([*prompt, *want[:place]])[-1]
        gap = float(abs(row[pair[0]] - row[pair[1]]) / row.std())
        self.close += gap < CLOSE
        self.wrong += gap >= CLOSE
        say(f"  apart after {place} tokens: {pair}, logits {gap:.3f} of their spread apart")

    def __str__(self) -> str:
        return f"{self.same} texts equal, {self.close} apart at a near tie, {self.wrong} wrong"


@small
@pytest.mark.parametrize("states", [None, 4], ids=["snapshots on the card", "spilled to host memory"])
def test_a_prefix_hit_gives_the_tokens_of_a_miss(plain: Any, states: int | None) -> None:
    from qcn_compile.runtime.prefix.options import PrefixOptions

    ties, computed, total = Ties(plain), 0, 0
    messages = [{"role": "system", "content": SYSTEM}]
    options = PrefixOptions(states=states, host_bytes=200_000_000)
    with tiny(max_running_requests=3, prefix=options, prefill_chunk=128) as cached:
        for task in TASKS * 2:
            messages = [*messages[:5], {"role": "user", "content": task}]
            prompt = cached.encode(messages)
            outputs = list(cached.generate(prompt, temperature=0, max_tokens=40))
            got = [t for o in outputs for t in o.token_ids]
            ties.add(prompt, got, greedy(plain, prompt, 40))
            computed, total = computed + len(prompt) - outputs[-1].timing.cached_tokens, total + len(prompt)
            messages.append({"role": "assistant", "content": "".join(o.text for o in outputs)})
        cached.check_integrity()
        say(f"prefix cache, {cached.memory.snapshots} snapshots: {ties}; {computed} of {total} prompt tokens computed; "
            f"{cached.engine.prefixes}")
        spilled = cached.engine.prefixes.tiers.host_used()
        assert not ties.wrong and computed < total / 2 and (states is None or spilled > 0)


@small
@pytest.mark.parametrize("drafts", ["ngram-4", "mtp-3", "mtp-1"])
@pytest.mark.parametrize("prefix", [False, True], ids=["", "prefix"])
def test_speculation_gives_the_plain_greedy_tokens(plain: Any, drafts: str, prefix: bool) -> None:
    from qcn_compile.runtime.prefix.options import PrefixOptions
    from qcn_compile.runtime.speculation.options import SpeculationOptions

    algorithm, count = drafts.split("-")
    prompts = [plain.encode(p) for p in PROMPTS]
    want = [greedy(plain, p) for p in prompts]
    ties = Ties(plain)
    with tiny(max_running_requests=3, prefill_chunk=48, prefix=PrefixOptions() if prefix else None,
              speculation=SpeculationOptions(int(count), algorithm)) as fast:
        fast.engine.speculation.times.ratio = lambda sequences: 1.0  # draft as long as anything is gained
        for _ in range(2):  # the second time from cached prefixes, all at once
            streams = [fast.generate(p, temperature=0, max_tokens=80) for p in prompts]
            for prompt, stream, expected in zip(prompts, streams, want, strict=True):
                ties.add(prompt, [t for o in stream for t in o.token_ids], expected)
            fast.check_integrity()
        say(f"{drafts}{' and prefix cache' * prefix}: {ties}; {fast.engine.speculation}")
        assert not ties.wrong and fast.engine.speculation.accepted > 40
        assert not prefix or fast.engine.prefixes.counts.hits > 0


@small
def test_long_greedy_texts_are_transformers(plain: Any) -> None:
    """Twenty prompts, 256 tokens each, beside transformers in fp32 (and the CPU build) on the same weights."""
    rows, ties = json.loads((BUILDS / "long.json").read_text()), Ties(plain)
    streams = [plain.generate(row["prompt"], temperature=0, max_tokens=256, ignore_eos=True) for row in rows]
    texts = [[t for o in stream for t in o.token_ids] for stream in streams]
    for row, tokens in zip(rows, texts, strict=True):
        ties.add(row["prompt"], tokens, row["new"])
    say(f"{len(rows)} prompts x 256 greedy tokens beside transformers and the CPU build: {ties}")
    assert not ties.wrong and ties.same >= len(rows) // 2


@small
@pytest.mark.parametrize(("name", "limit"), [("tiny-kv8", 0.1)])
def test_narrow_caches_give_close_logits(plain: Any, name: str, limit: float) -> None:
    """Caches in other formats than bf16 keys and values and f32 states: logits of long texts, whole and in steps."""
    from qcn_compile import load

    if not (BUILDS / name).is_dir():
        pytest.skip(f"no build {name}")
    texts = [[*row["prompt"], *row["new"]] for row in json.loads((BUILDS / "long.json").read_text())[:8]]
    errors, top = [], []
    with load(BUILDS / name, model=MODEL, max_running_requests=4) as narrow:
        say(f"{name}: {narrow.memory}")
        for ids in texts:
            want, got = plain.logits(ids), narrow.logits(ids)
            errors.append(float(np.linalg.norm(got - want) / np.linalg.norm(want)))
            top.append(float((got.argmax(-1) == want.argmax(-1)).mean()))
        ids = texts[0][:100]
        steps = np.concatenate([narrow.step([("x", ids[i:i + 1])])[0] for i in range(len(ids))])
        narrow.release("x")
        whole = narrow.logits(ids)
        apart = float(np.linalg.norm(steps - whole) / np.linalg.norm(whole))
        assert narrow.memory.kv_bytes < plain.memory.kv_bytes or "kv8" not in name
    say(f"{name}: logits L2 {max(errors):.3f} worst, top-1 {np.mean(top):.4f}, steps against whole {apart:.3f}")
    assert max(errors) < limit and np.mean(top) > 0.95 and apart < limit


GUARD, PAINT, POISON = 4096, 0xA5, 0xFF


@small
def test_kernels_stay_inside_their_memory(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every allocation starts as NaN between painted guards; texts stay the same and the paint too."""
    from qcn_compile.runtime.cuda.device import CudaDevice
    from qcn_compile.runtime.speculation.options import SpeculationOptions

    guarded: list[tuple[int, int]] = []
    allocate = CudaDevice.allocate

    def between_guards(self: CudaDevice, nbytes: int) -> int:
        base = allocate(self, nbytes + 2 * GUARD)
        self.driver("cuMemsetD8", base, PAINT, nbytes + 2 * GUARD)
        self.driver("cuMemsetD8", base + GUARD, POISON, nbytes)
        guarded.append((base, nbytes))
        return base + GUARD

    prompts = [plain.encode(p) for p in PROMPTS]
    want = [greedy(plain, p, 40) for p in prompts]
    monkeypatch.setattr(CudaDevice, "allocate", between_guards)
    ties, line = Ties(plain), np.empty(GUARD, np.uint8)
    with tiny(max_running_requests=3, speculation=SpeculationOptions(3, "mtp")) as model:
        streams = [model.generate(p, temperature=0, max_tokens=40) for p in prompts]
        for prompt, stream, expected in zip(prompts, streams, want, strict=True):
            ties.add(prompt, [t for o in stream for t in o.token_ids], expected)
        model._device.synchronize()
        for base, nbytes in guarded:
            for place in (base, base + GUARD + nbytes):
                model._device.driver("cuMemcpyDtoH", line.ctypes.data, place, GUARD)
                assert (line == PAINT).all(), f"{nbytes} bytes: {np.argwhere(line != PAINT)[:4].ravel()} painted over"
    say(f"{len(guarded)} allocations between guards, filled with NaN: {ties}, no guard touched")
    assert not ties.wrong


CHECKED = """
import sys
from qcn_compile import load
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.speculation.options import SpeculationOptions

with load(sys.argv[1], model=sys.argv[2], max_running_requests=2, context_length=256, prefix=PrefixOptions(states=4),
          speculation=SpeculationOptions(3, "mtp")) as model:
    streams = [model.generate(text, temperature=t, max_tokens=12) for text, t in (("def fib(n):", 0), ("x = [1, 2", 1))]
    print(sum(len(o.token_ids) for stream in streams for o in stream), model.engine.speculation)
"""


@small
def test_compute_sanitizer_finds_nothing() -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        pytest.skip("no compute-sanitizer on this machine")
    begun = time.perf_counter()
    done = subprocess.run([tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", CHECKED,
                           str(BUILDS / "tiny-mtp"), str(MODEL)], capture_output=True, text=True, check=False,
                          timeout=240)
    lines = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "drafts accepted" in line]
    say(f"compute-sanitizer memcheck, {time.perf_counter() - begun:.0f} s: {'; '.join(lines)}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


START = """
import sys, time
begun = float(sys.argv[2])
import qcn_compile.runtime.loaded as loaded
imported = time.time()
model = loaded.load(sys.argv[1], context_length=4096, max_running_requests=1)
ready, prompt = time.time(), list(range(5, 1029))
times = [imported - begun, ready - begun]
for i in range(12):
    at = time.time()
    model.generate([i, *prompt], temperature=0.0, max_tokens=1).text()
    times.append(time.time() - at)
print(*times)
"""


@large
def test_start_and_first_requests() -> None:
    """A process of its own, weights made up on the device: interpreter to ready, then requests of 1024 tokens."""
    done = subprocess.run([sys.executable, "-c", START, str(FULL), repr(time.time())], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    imported, ready, first, *rest = map(float, done.stdout.split())
    say(f"process start to imported {imported:.2f} s, to ready {ready:.2f} s; first request of 1025 tokens to its "
        f"first token {1e3 * first:.1f} ms, the next eleven {1e3 * min(rest):.1f} to {1e3 * max(rest):.1f} ms")
    assert first < 3 * max(rest)


@large
def test_a_round_of_drafts_and_ten_thousand_steps() -> None:
    from qcn_compile import load
    from qcn_compile.runtime.speculation.options import SpeculationOptions

    head = FULL.name == "full-mtp"
    options = SpeculationOptions(3, "mtp") if head else None
    with load(FULL, context_length=12288, max_running_requests=1, speculation=options) as model:
        say(model.describe())
        if head:
            _rounds(model)
        _endurance(model)


def _rounds(model: Any, count: int = 60) -> None:
    """Steps of three drafts and their verification at 1K context; random weights refuse nearly all."""
    prompt = np.random.default_rng(0).integers(0, 150000, 1024).tolist()
    model.engine.speculation.times.ratio = lambda sequences: 0.0
    stream = model.generate(prompt, temperature=0.0, max_tokens=4 * count, ignore_eos=True)
    found = []
    for _ in range(count):
        before, drafted = time.perf_counter(), model.engine.speculation.drafted
        model.pump()
        if model.engine.speculation.drafted - drafted == 3:
            found.append(time.perf_counter() - before)
    verify = _events(model, "decode-4")
    executable, device = model.executable, model._device
    head = next(plan for plan in executable._draft_plans if plan.name == "decode-1")
    parts = {"the head": lambda: executable.replay(head), "a copy of a state": lambda: executable.rows.copy_state(0, 1)}
    for name, work in parts.items():
        say(f"{name}: {1e3 * _timed(device, work):.3f} ms by events")
    asked, rows = Span([5], 1024, 0, np.arange(33, dtype=np.int32), 1), np.zeros((1, 2048), np.uint16)
    began = time.perf_counter()
    for _ in range(50):
        executable.draft([asked], rows, 3)
    say(f"three rounds of the head with all copies: {20 * (time.perf_counter() - began):.3f} ms")
    stream.close()
    say(f"one round of 3 drafts and the verification of 4 tokens, batch 1: {1e3 * np.median(found):.3f} ms (median of "
        f"{len(found)}), of it the main model's step {1e3 * verify:.3f} ms by events; {model.engine.speculation}")


def _timed(device: Any, work: Any, repeat: int = 9) -> float:
    """Median seconds of what is put into the stream."""
    first, last, found = device.event(), device.event(), []
    for _ in range(repeat):
        device.record(first)
        work()
        device.record(last)
        device.synchronize()
        found.append(device.seconds(first, last))
    return float(np.median(found))


def _endurance(model: Any, steps: int = 10_000) -> None:
    """Ten thousand greedy tokens in one request: all of them tokens, no slower at the end, no memory taken."""
    free = model._device.free_bytes()
    model.engine.speculation = model.engine._scheduler._speculation = None
    stream = model.generate([1, 2, 3], temperature=0.0, max_tokens=steps, ignore_eos=True)
    begun, marks, tokens = time.perf_counter(), [], []
    for output in stream:
        tokens += output.token_ids
        if len(tokens) % 1000 == 0:
            marks.append(time.perf_counter() - begun)
    spent = np.diff([0.0, *marks])
    say(f"{len(tokens)} steps: {spent[0]:.3f} ms each of the first thousand, {spent[-1]:.3f} ms of the last, "
        f"{len(set(tokens))} different tokens")
    model.check_integrity()
    assert len(tokens) == steps and min(tokens) >= 0 and model._device.free_bytes() == free
    assert np.isfinite(model.logits(tokens[:64])).all()
