"""On a card: all kernels against the op table, the bundled model against the CPU, the full-size model timed.

Needs `.gpu/` (see README.md) and an NVIDIA GPU; skipped elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

    target, failures = GpuTarget((BUILDS / "kernels" / "target").read_text()), []
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


@pytest.mark.parametrize("name", ["tiny-none", "tiny-int4-experts", "tiny-states"])
def test_steps_equal_chunks_and_batches(name: str) -> None:
    from qcn_compile import load

    rows = json.loads((BUILDS / "reference.json").read_text())[:3]
    with load(BUILDS / name, model=MODEL) as model:
        whole = [model.logits([*r["prompt"], *r["new"]][:40]) for r in rows]
        ids = [[*r["prompt"], *r["new"]][:40] for r in rows]
        for at in range(40):
            steps = model.step([(str(i), x[at:at + 1]) for i, x in enumerate(ids)])
            for i, step in enumerate(steps):
                assert np.linalg.norm(step[0] - whole[i][at]) <= 0.05 * np.linalg.norm(whole[i][at]), (i, at)
        model.release("0")
        parts = np.concatenate([model.step([("x", ids[0][a:b])])[0] for a, b in ((0, 5), (5, 6), (6, 13), (13, 40))])
        assert np.linalg.norm(parts - whole[0]) <= 0.03 * np.linalg.norm(whole[0])


@pytest.mark.parametrize("name", ["full-plain", "full-int4", "full"])
def test_full_model(name: str) -> None:
    """The full-size model with random weights: times of every plan, time of every kernel, many steps."""
    from qcn_compile import load
    from qcn_compile.runtime.profile import Profile

    if not (BUILDS / name).is_dir():
        pytest.skip(f"no build {name}")
    started = time.perf_counter()
    with load(BUILDS / name, context_length=8192, max_running_requests=10) as model:
        say(f"{name}: {model.describe()}; {time.perf_counter() - started:.1f} s")
        _time_plans(model, name)
        if name == "full":
            for steps in (1, 1024):
                model.executable.profile = Profile()
                _step(model, steps)
                _step(model, steps)
                say("\n".join(model.executable.profile.lines()))
                model.executable.profile = None
            _endurance(model)


def _step(model: Any, tokens: int) -> None:
    stream = model.generate(list(range(1, tokens + 1)), temperature=0.0, max_tokens=1)
    stream.text()


def _events(model: Any, name: str, repeat: int = 15) -> float:
    """Median seconds of a plan's graph, replayed on the inputs of the last step."""
    executable, device = model.executable, model._device
    first, last, found = device.event(), device.event(), []
    for _ in range(repeat):
        device.record(first)
        executable.replay(executable.plan(name))
        device.record(last)
        device.synchronize()
        found.append(device.seconds(first, last))
    return float(np.median(found))


def _time_plans(model: Any, build: str) -> None:
    """Every plan by events, at 1024 tokens of context for one token; time to first token; steps with all copies."""
    prompt = np.random.default_rng(0).integers(0, 150000, 1024).tolist()
    for _ in range(3):
        begun = time.perf_counter()
        model.generate(prompt, temperature=0.0, max_tokens=1).text()
        first = time.perf_counter() - begun
    begun = time.perf_counter()
    count = sum(len(o.token_ids) for o in model.generate(prompt, temperature=0.0, max_tokens=129))
    wall = (time.perf_counter() - begun - first) / max(count - 1, 1)
    say(f"{build}: time to first token, 1024 prompt {1e3 * first:.1f} ms; {count} tokens, {1e3 * wall:.3f} ms each "
        f"through the engine ({1 / wall:.0f} tokens/s)")
    _report(model, build, "decode-1", 1)
    for name in ("decode-8", "prefill-512", "prefill-2048"):
        tokens = model.executable.plan(name).tokens
        if name == "decode-8":
            model.step([(f"s{i}", [5 + i]) for i in range(8)])
            for i in range(8):
                model.release(f"s{i}")
        else:
            model.generate((2 * prompt)[:tokens], temperature=0.0, max_tokens=1).text()
        _report(model, build, name, tokens)
    model.generate(prompt, temperature=0.0, max_tokens=2).text()


def _report(model: Any, build: str, name: str, tokens: int) -> None:
    plan, seconds = model.executable.plan(name), _events(model, name)
    moved = sum(launch.bytes for launch in plan.launches)
    say(f"{build} {name}: {1e3 * seconds:.3f} ms a step by events, {tokens / seconds:.0f} tokens/s, "
        f"{moved / 1e9:.2f} GB counted, {moved / seconds / 1e9:.0f} GB/s, {len(plan.launches)} launches")


def _endurance(model: Any, steps: int = 2000) -> None:
    """Many steps through the graph leave finite logits."""
    model.step([("long", [3])])
    begun, token = time.perf_counter(), 1
    for _ in range(steps):
        logits = model.step([("long", [token])])[0][0]
        token = int(logits.argmax())
    say(f"{steps} steps: {1e3 * (time.perf_counter() - begun) / steps:.3f} ms each with host argmax, finite "
        f"{np.isfinite(logits).all()}, last token {token}")
    assert np.isfinite(logits).all()
