"""On a card: how the full-size model with random weights starts, drafts and lasts; each test has the card alone.

Needs `.gpu/` (see README.md) and an NVIDIA GPU; skipped elsewhere.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from test_card import BUILDS, CARD, _events, say

from qcn_compile.runtime.batch import Span

FULL = next((BUILDS / name for name in ("full-mtp", "full") if (BUILDS / name).is_dir()), BUILDS / "full")
HEAD = FULL.name == "full-mtp"  # its weights fill a card of 80 GB: the table of tokens stays with the host
pytestmark = pytest.mark.skipif(not (CARD and FULL.is_dir()), reason="needs an NVIDIA GPU and .gpu/ (prepare.py)")
START = """
import sys, time
begun = float(sys.argv[2])
import qcn_compile.runtime.loaded as loaded
imported = time.time()
model = loaded.load(sys.argv[1], context_length=4096, max_running_requests=1, embedding_on_host=sys.argv[3] == "1")
ready, prompt = time.time(), list(range(5, 1029))
times = [imported - begun, ready - begun]
for i in range(12):
    at = time.time()
    model.generate([i, *prompt], temperature=0.0, max_tokens=1).text()
    times.append(time.time() - at)
print(*times)
"""


def test_start_and_first_requests() -> None:
    """A process of its own, weights made up on the device: interpreter to ready, then requests of 1024 tokens."""
    done = subprocess.run([sys.executable, "-c", START, str(FULL), repr(time.time()), str(int(HEAD))],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    imported, ready, first, *rest = map(float, done.stdout.split())
    say(f"process start to imported {imported:.2f} s, to ready {ready:.2f} s; first request of 1025 tokens to its "
        f"first token {1e3 * first:.1f} ms, the next eleven {1e3 * min(rest):.1f} to {1e3 * max(rest):.1f} ms")
    assert first < 3 * max(rest)


def test_a_round_of_drafts_and_ten_thousand_steps() -> None:
    from qcn_compile import load
    from qcn_compile.runtime.speculation.options import SpeculationOptions

    options = SpeculationOptions(3, "mtp") if HEAD else None
    with load(FULL, context_length=12288, max_running_requests=1, speculation=options,
              embedding_on_host=HEAD) as model:
        say(model.describe())
        if HEAD:
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
