"""On a card: all kernels against the op table, the bundled model against the CPU, the full-size model timed.

Needs `.gpu/` (see README.md) and an NVIDIA GPU; skipped elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "targets" / "triton"), str(HERE)]
BUILDS = Path(os.environ.get("QCN_GPU_BUILDS", ".gpu"))
MODEL = Path(os.environ.get("QCN_TINY_CODER", "qcn_compile/assets/tiny-coder"))

try:
    from cuda.bindings import driver

    CARD = int(driver.cuInit(0)[0]) == 0
except Exception:
    CARD = False
pytestmark = pytest.mark.skipif(not (CARD and BUILDS.is_dir()), reason="needs an NVIDIA GPU and .gpu/ (prepare.py)")


def say(text: str) -> None:
    """A line of the report."""
    print(text, flush=True)


@pytest.fixture(scope="module")
def card() -> Iterator[object]:
    from card import Card

    made = Card(BUILDS / "kernels")
    yield made
    made.device.close()


def test_kernels(card) -> None:  # type: ignore[no-untyped-def]
    from cases import every
    from harness_gpu import check

    from qcn_compile.targets.triton.target import GpuTarget

    target, failures = GpuTarget("h200"), []
    for case, batches in every():
        worst = 0.0
        for seed, ragged in enumerate(batches):
            try:
                worst = max(worst, check(card, target, case, ragged, seed + 10))
            except AssertionError as error:
                failures.append(str(error)[:300])
                say(f"FAIL {str(error)[:300]}")
        say(f"{case.name:50s} relative L2 {worst:.1e}")
    assert not failures


@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_bundled_model_equals_the_cpu(quant: str) -> None:
    from qcn_compile import load

    rows = json.loads((BUILDS / "reference.json").read_text())
    stored = np.load(BUILDS / "reference.npz")
    tolerance, agreement = (0.03, 0.97) if quant == "none" else (0.2, 0.85)
    with load(BUILDS / f"tiny-{quant}", model=MODEL) as model:
        say(f"tiny {quant}: {model.describe()}")
        same, errors, top = 0, [], []
        for i, row in enumerate(rows):
            tokens, want = [*row["prompt"], *row["new"]], stored[f"logits{i}"].astype(np.float32)
            got = model.logits(tokens)
            errors.append(np.linalg.norm(got - want) / np.linalg.norm(want))
            top.append((got.argmax(-1) == want.argmax(-1)).mean())
            new = [t for o in model.generate(row["prompt"], temperature=0.0, max_tokens=len(row["new"]))
                   for t in o.token_ids]
            same += new == row["new"][:len(new)] and len(new) == len(row["new"])
        model.check_integrity()
        say(f"tiny {quant}: logits L2 {max(errors):.3f} worst, top-1 {np.mean(top):.4f}, "
            f"greedy equal for {same} of {len(rows)} prompts")
        assert max(errors) < tolerance and np.mean(top) > agreement


def test_steps_equal_chunks_and_batches() -> None:
    from qcn_compile import load

    rows = json.loads((BUILDS / "reference.json").read_text())[:3]
    with load(BUILDS / "tiny-none", model=MODEL) as model:
        whole = [model.logits([*r["prompt"], *r["new"]][:40]) for r in rows]
        ids = [[*r["prompt"], *r["new"]][:40] for r in rows]
        for at in range(40):
            steps = model.step([(str(i), x[at:at + 1]) for i, x in enumerate(ids)])
            for i, step in enumerate(steps):
                assert np.linalg.norm(step[0] - whole[i][at]) <= 0.05 * np.linalg.norm(whole[i][at]), (i, at)
        model.release("0")
        parts = np.concatenate([model.step([("x", ids[0][a:b])])[0] for a, b in ((0, 5), (5, 6), (6, 13), (13, 40))])
        assert np.linalg.norm(parts - whole[0]) <= 0.03 * np.linalg.norm(whole[0])


def test_variants(card) -> None:  # type: ignore[no-untyped-def]
    from card import REPEAT
    from variants import variants

    slab = card.slab()
    peak = card.copy_bandwidth(slab)
    say(f"{card.device}: device copy {peak:.0f} GB/s")
    ints = card.numbers()
    found = defaultdict(list)
    for v in variants():
        seconds = card.seconds(card.variant(v.kernel, v.grid, slab, ints, v.bytes)) / REPEAT
        found[v.what].append((seconds, v))
    for what, rows in found.items():
        rows.sort(key=lambda r: r[0])
        say(f"{what:16s} " + " | ".join(f"{1e6 * s:.2f} us {v.bytes / s / 1e9:.0f} GB/s {v.label}" for s, v in rows[:6])
            + f" | worst {1e6 * rows[-1][0]:.2f} {rows[-1][1].label}")


def test_full_model() -> None:
    from qcn_compile import load
    from qcn_compile.runtime.profile import Profile

    started = time.perf_counter()
    with load(BUILDS / "full", context_length=8192, max_running_requests=8) as model:
        say(f"full: {model.describe()}; {time.perf_counter() - started:.1f} s")
        executable, device = model.executable, model._device
        prompt = np.random.default_rng(0).integers(0, 150000, 1024).tolist()
        for _ in range(2):
            begun = time.perf_counter()
            for at in range(0, 1024, 512):
                logits = model.step([("a", prompt[at:at + 512])])[0]
            say(f"prefill 1024 in 512s, all logits: {1e3 * (time.perf_counter() - begun):.1f} ms, "
                f"finite {np.isfinite(logits).all()}")
            model.release("a")
        for at in range(0, 1024, 512):
            model.step([("a", prompt[at:at + 512])])
        begun = time.perf_counter()
        token = 1
        for _ in range(32):
            token = int(model.step([("a", [token])])[0][0].argmax())
        wall = (time.perf_counter() - begun) / 32
        for name in [p.name for p in executable._plans if p.name.startswith("decode")]:
            _time_plan(model, executable, device, name, wall)
        executable.profile = Profile()
        for _ in range(3):
            model.step([("a", [1])])
        say("\n".join(executable.profile.lines()))


def _time_plan(model, executable, device, name: str, wall: float) -> None:  # type: ignore[no-untyped-def]
    count = executable.plan(name).tokens
    model.step([(f"s{i}", [5 + i]) for i in range(count)])
    plan, first, last = executable.plan(name), device.event(), device.event()
    found = []
    for _ in range(12):
        device.record(first)
        executable.replay(plan)
        device.record(last)
        device.synchronize()
        found.append(device.seconds(first, last))
    for i in range(count):
        model.release(f"s{i}")
    seconds, moved = float(np.median(found)), sum(launch.bytes for launch in plan.launches)
    say(f"{name}: {1e3 * seconds:.3f} ms a step by events, {count / seconds:.0f} tokens/s, "
        f"{moved / 1e9:.2f} GB counted, {moved / seconds / 1e9:.0f} GB/s, {len(plan.launches)} launches; "
        f"whole step with copies (batch 1) {1e3 * wall:.3f} ms")
