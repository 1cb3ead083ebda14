"""On a card: the choice of tokens at full size, in step with the host's, and what a step costs through the engine."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_card import BUILDS, CARD, MODEL, _events, say

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "targets" / "triton"), str(HERE)]
FULL = Path(os.environ.get("QCN_GPU_FULL", BUILDS / "full"))
VOCAB, ROWS = 151936, 128
pytestmark = pytest.mark.skipif(not (CARD and FULL.is_dir()), reason="needs an NVIDIA GPU and .gpu/ (prepare.py)")


def settings() -> dict[str, dict[str, Any]]:
    return {"plain": {}, "recommended": {"temperature": 1.0, "top_p": 0.95, "top_k": 40}, "top-k": {"top_k": 7},
            "top-p": {"top_p": 0.6}, "min-p": {"min_p": 0.05}, "cool": {"temperature": 0.3},
            "all": {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "temperature": 0.8}, "wide top-k": {"top_k": 300},
            "flat top-p": {"top_p": 0.9, "temperature": 2.5},
            "bias": {"logit_bias": {3: 12.0, 250: 11.0, 9: -100.0}, "top_p": 0.9}}


def test_the_distribution_is_the_hosts() -> None:
    from card import Card
    from test_sample import SLOTS, Board, adjusted, expected, picks_of, request, surprise

    card = Card(FULL / "kernels")
    board = Board(card, VOCAB, ROWS)
    rng = np.random.default_rng(1)
    peaked = (rng.standard_normal(VOCAB) * 2.2).astype(np.float32)
    peaked[rng.integers(0, 5000, 60)] += 9
    try:
        worst = {}
        for name, params in settings().items():
            one = request(SLOTS - 1, **params)
            tokens = np.concatenate([board.choose(np.tile(peaked, (ROWS, 1)), picks_of(one, ROWS, seed))
                                     for seed in range(16)])
            worst[name] = surprise(tokens, expected(peaked, one), adjusted(peaked, one))
        say("chi square over degrees of freedom: " + ", ".join(f"{n} {v:.2f}" for n, v in worst.items()))
        assert max(worst.values()) < 2.0
        rows = (rng.standard_normal((ROWS, VOCAB)) * 3).astype(np.float32)
        picks = picks_of(request(0, temperature=0.0), ROWS)
        from qcn_compile.ir.encoding import from_bf16, to_bf16

        assert np.array_equal(board.choose(rows, picks), from_bf16(to_bf16(rows)).argmax(-1))
    finally:
        card.device.close()


def test_the_device_chooses_what_the_host_would() -> None:
    """Log probabilities make the host choose; without them the device does, one step ahead. The same batch each way."""
    from qcn_compile import load

    real = (MODEL / "model.safetensors.index.json").is_file() and any(MODEL.glob("model-*.safetensors"))
    name = "tiny-none" if real else "tiny-dummy"  # random weights will do
    with load(BUILDS / name, model=MODEL if real else None) as model:
        say(f"{name}: {model.describe()}")
        prompts = [model.encode(text) for text in ("def fib(n):", "import os\n", "class Stack:", "while True:")]

        def together(**params: Any) -> list[list[int]]:
            streams = [model.generate(p, max_tokens=100, ignore_eos=True, **params) for p in prompts]
            return [[t for o in s for t in o.token_ids] for s in streams]

        def alone(**params: Any) -> list[list[int]]:
            return [[t for o in model.generate(p, max_tokens=100, **params) for t in o.token_ids] for p in prompts]

        same = [alone(temperature=0.0, logprobs=0) == alone(temperature=0.0),
                together(temperature=0.0, logprobs=0) == together(temperature=0.0),
                alone(temperature=0.0, logprobs=0, repetition_penalty=1.3, presence_penalty=0.5)
                == alone(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5),
                alone(temperature=0.9, top_k=30, seed=5) == alone(temperature=0.9, top_k=30, seed=5)]
        model.check_integrity()
        say(f"alone, together, with penalties, seeded twice: the same tokens {same}")
        assert all(same)


def test_a_step_through_the_engine() -> None:
    """Full size, random weights: milliseconds a token through the engine beside the plan's own by events."""
    from qcn_compile import load

    started = time.perf_counter()
    with load(FULL, context_length=4096, max_running_requests=int(os.environ.get("QCN_GPU_BATCH", "16"))) as model:
        say(f"{model.describe()}; {time.perf_counter() - started:.1f} s")
        prompt = np.random.default_rng(0).integers(0, 150000, 1024).tolist()
        kinds = {"greedy": {"temperature": 0.0}, "recommended": {"temperature": 1.0, "top_p": 0.95, "top_k": 40},
                 "plain": {"temperature": 1.0, "top_k": 0, "top_p": 1.0}, "host": {"temperature": 0.0, "logprobs": 0}}
        for batch in (size for size in (1, 4, 8, 16) if size <= model.memory.slots):
            for name, params in kinds.items():
                spent, count = _decode(model, prompt, batch, params)
                say(f"batch {batch:3d} {name:12s} {1e3 * spent / count:.3f} ms a step through the engine, "
                    f"{1e3 * _events(model, f'decode-{batch}'):.3f} ms by events")
        _sampling_launches(model)


def _decode(model: Any, prompt: list[int], batch: int, params: dict[str, Any], count: int = 96) -> tuple[float, int]:
    """Seconds of `count` steps after all prompts are done."""
    streams = [model.generate([*prompt, i], max_tokens=count + 40, ignore_eos=True, **params) for i in range(batch)]
    got = dict.fromkeys((s.request_id for s in streams), 0)
    while min(got.values()) < 8:
        for o in model.engine.step():
            got[o.request_id] += len(o.token_ids)
    begun = time.perf_counter()
    for _ in range(count):
        model.engine.step()
    spent = time.perf_counter() - begun
    for s in streams:
        s.close()
    while model.engine.step():
        pass
    return spent, count


def _sampling_launches(model: Any) -> None:
    from qcn_compile.runtime.profile import Profile

    model.executable.profile = profile = Profile()
    for params in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.95, "top_k": 40},
                   {"temperature": 1.0, "top_k": 0, "top_p": 0.5}):
        model.executable.profile = profile = Profile()
        for _ in model.generate([1, 2, 3], max_tokens=6, ignore_eos=True, **params):
            pass
        say(f"{json.dumps(params)}\n" + "\n".join(line for line in profile.lines() if "sample" in line))
    model.executable.profile = None
