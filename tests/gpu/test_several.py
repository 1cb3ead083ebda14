"""On a machine with two or more cards: ranks equal one card, a killed rank ends a run, and how steps scale.

Needs `.gpu/` with the part "several" (prepare.py, any machine) and NCCL; skipped elsewhere. One go:

    PYTHONPATH=. python -m pytest tests/gpu/test_several.py -q -s
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_card import BUILDS, CARD, MODEL, say
from test_runtime import CLOSE

SUMS = ("one-shot", "nccl", "fused")
BATCHES = (1, 8, 32, 64)
STEPS, WINDOWS = 60, 3


def _cards() -> int:
    if not CARD:
        return 0
    from cuda.bindings import driver

    return int(driver.cuDeviceGetCount()[1])


pytestmark = pytest.mark.skipif(_cards() < 2 or not (BUILDS / "several").is_dir(),
                                reason="needs two NVIDIA GPUs and .gpu/several (prepare.py several)")
PROMPTS = ["def fib(n):\n", "import os\n", "class Stack:\n    def __init__(self):", "# sort a list\n", "while True:",
           "x = [1, 2, 3]\ny =", "try:\n    open(", "for i in range(10):\n    print("]


def ask(what: str, build: str, sums: str = "one-shot") -> Any:
    """What this file says as a program of its own, with a way to sum: it is chosen when a build is loaded."""
    command = [sys.executable, __file__, what, str(BUILDS / "several" / build)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False,
                          env={**os.environ, "QCN_ALL_REDUCE": sums})
    if done.returncode:
        raise AssertionError(f"{build} {sums}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def test_ranks_equal_one_card() -> None:
    """Logits within the rounding of bf16 sums; greedy texts alone, in a batch, and from cached prefixes are one card's,
    or apart from a place on where two tokens tie nearly."""
    one, failed = ask("texts", "tiny"), []
    tries = [(build, sums) for build in ("tiny-tp2", "tiny-ep2") for sums in SUMS] + [("tiny-pp2", "one-shot")]
    for build, sums in tries:
        try:
            many = ask("texts", build, sums)
        except AssertionError as problem:
            failed.append(str(problem))
            continue
        want, have = (np.array(found["logits"]) for found in (one, many))
        error = float(np.linalg.norm(have - want) / np.linalg.norm(want))
        gaps = [[_gap(*row) for row in zip(one["alone"], many[key], one["margins"], strict=True)]
                for key in ("alone", "batch", "again")]
        same = [sum(gap is None for gap in row) for row in gaps]
        widest = max((gap for row in gaps for gap in row if gap is not None), default=0.0)
        say(f"{build} {sums}: logits {error:.4f} apart, greedy texts equal alone, in a batch, cached: {same} of "
            f"{len(PROMPTS)}, others part where two logits are at most {widest:.3f} of their spread apart")
        if not (error < 0.03 and widest < CLOSE and many["batch"] == many["again"]):
            failed.append(f"{build} {sums}: {error:.4f} {same} {widest:.3f}")
    assert not failed, "\n".join(failed)


def _gap(want: list[int], have: list[int], margins: list[float]) -> float | None:
    """One card's margin between its two likeliest tokens where the texts part; None where they do not."""
    return next((margins[i] for i, (a, b) in enumerate(zip(want, have, strict=True)) if a != b), None)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_ends_the_run(how: signal.Signals) -> None:
    command = [sys.executable, "-m", "qcn_compile.runtime.cli", str(BUILDS / "several" / "tiny-tp2"), "--model",
               str(MODEL), "--prompt", "def fib(n):", "--max-tokens", "20000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "QCN_RANK_TIMEOUT": "5"})
    assert process.stdout is not None and process.stdout.read(1)
    worker = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    os.kill(worker, how)
    begun = time.monotonic()
    try:
        _, words = process.communicate(timeout=60)
    finally:
        process.kill()
    say(f"rank 1 {how.name}: exit code {process.returncode} after {time.monotonic() - begun:.1f} s: "
        f"{words.strip().splitlines()[-1][:200]}")
    assert process.returncode == 7
    assert not Path(f"/proc/{worker}").exists()


def test_scaling() -> None:
    """Milliseconds a step of Qwen3-Coder-Next, FP8, random weights: the table of issue and docs."""
    rows, failed = [("TP 1", "full", "one-shot")], []
    rows += [(f"{name}, {sums}", build, sums) for name, build in (("TP 2", "full-tp2"), ("TP 2, EP 2", "full-ep2"))
             for sums in SUMS]
    rows.append(("PP 2", "full-pp2", "one-shot"))
    found: dict[str, dict[str, float]] = {}
    say("| layout | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |\n|---|" + "---|" * len(BATCHES))
    for title, build, sums in rows:
        if not (BUILDS / "several" / build).is_dir():
            continue
        try:
            times = found[title] = ask("times", build, sums)
        except AssertionError as error:
            failed.append(str(error))
            continue
        say(f"| {title} | " + " | ".join(f"{times[str(b)]:.3f} ms" if str(b) in times else "does not fit"
                                         for b in BATCHES) + " |")
    if "TP 1" in found:
        for title, times in found.items():
            say(f"{title}: batch 1 at {found['TP 1']['1'] / times['1']:.2f} times one card's speed")
    assert not failed, "\n".join(failed)


def texts(build: Path) -> dict[str, Any]:
    """Logits of a text, and greedy texts of PROMPTS one by one, at once, and at once again from cached prefixes."""
    from qcn_compile import load
    from qcn_compile.runtime.prefix.options import PrefixOptions

    def new(streams: Any) -> list[list[int]]:
        return [[t for output in stream for t in output.token_ids] for stream in streams]

    with load(build, model=MODEL, max_running_requests=8, prefix=PrefixOptions()) as model:
        logits = model.logits(list(range(40, 140))).astype(np.float64).tolist()
        alone = new(model.generate(p, temperature=0.0, max_tokens=64) for p in PROMPTS)
        batch = new([model.generate(p, temperature=0.0, max_tokens=64) for p in PROMPTS])
        again = new([model.generate(p, temperature=0.0, max_tokens=64) for p in PROMPTS])
        model.check_integrity()
        margins = [_margins(model, model.encode(p), text) for p, text in zip(PROMPTS, alone, strict=True)]
    return {"logits": logits, "alone": alone, "batch": batch, "again": again, "margins": margins}


def _margins(model: Any, prompt: list[int], text: list[int]) -> list[float]:
    """How far the likeliest token leads at each place of a text, in spreads of the logits."""
    rows = model.logits([*prompt, *text])[len(prompt) - 1:-1]
    second, first = np.partition(rows, -2)[:, -2:].T
    return ((first - second) / rows.std(-1)).tolist()


def times(build: Path) -> dict[str, float]:
    """Milliseconds of a step through the engine at about 1024 tokens of context, by batch: the median of windows. One
    load with as many requests as fit."""
    from qcn_compile import load
    from qcn_compile.errors import CapacityError

    for most in reversed(BATCHES):
        try:
            with load(build, context_length=1280, max_running_requests=most) as model:
                return {str(batch): _step_ms(model, batch) for batch in BATCHES if batch <= most}
        except CapacityError as error:
            print(error, file=sys.stderr)
    return {}


def _step_ms(model: Any, batch: int) -> float:
    rng = np.random.default_rng(0)
    for _ in range(batch):
        prompt = rng.integers(0, model.manifest.vocab_size, 1000).tolist()
        model.engine.add_request(prompt, _greedy(STEPS * (WINDOWS + 1) + batch + 40))
    produced = 0
    while produced < 20 * batch:  # all prompts are computed, all requests decode
        produced += sum(len(output.token_ids) for output in model.engine.step())
    marks = [time.perf_counter()]
    for _ in range(WINDOWS):
        for _ in range(STEPS):
            model.engine.step()
        marks.append(time.perf_counter())
    model.engine.abort_all()
    return 1e3 * float(np.median([b - a for a, b in pairwise(marks)])) / STEPS


def _greedy(tokens: int) -> Any:
    from qcn_compile.runtime.request import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


if __name__ == "__main__":
    print(json.dumps({"texts": texts, "times": times}[sys.argv[1]](Path(sys.argv[2]))))
