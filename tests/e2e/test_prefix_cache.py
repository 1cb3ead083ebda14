"""The prefix cache on the trained model: a hit gives the tokens of a miss, and logits that differ by rounding only."""

from __future__ import annotations

import numpy as np
import pytest

from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.prefix.options import PrefixOptions

SYSTEM = "You are a coding assistant. Answer with Python code and one sentence about it. " * 8
TASKS = ["Write a function that adds two numbers.", "Now one that reverses a list. " * 12,
         "Explain the second one. " * 25, "Write a class for a stack with push and pop, and tests for it. " * 6]


def tokens_of(model, prompt, **fields):
    outputs = list(model.generate(prompt, temperature=0, max_tokens=40, **fields))
    return [t for o in outputs for t in o.token_ids], outputs[-1].timing, "".join(o.text for o in outputs)


@pytest.mark.parametrize("options", [PrefixOptions(), PrefixOptions(states=5, host_bytes=50_000_000)], ids=str)
def test_a_hit_gives_the_tokens_of_a_miss(builds, loaded, options):
    plain = loaded("bf16")
    messages = [{"role": "system", "content": SYSTEM}]
    computed = new = known = 0
    with load(builds("bf16"), max_running_requests=3, threads=2, prefix=options, prefill_chunk=128) as cached:
        for task in TASKS:
            messages.append({"role": "user", "content": task})
            prompt = cached.encode(messages)
            got, timing, text = tokens_of(cached, prompt)
            assert got == tokens_of(plain, prompt)[0]
            computed += len(prompt) - timing.cached_tokens
            new += len(prompt) - known
            known = len(prompt) + len(got) - 1
            messages.append({"role": "assistant", "content": text})
        cached.check_integrity()
    assert computed <= 1.2 * new


def test_logits_after_a_hit_are_those_of_a_miss(builds, loaded):
    prompt = loaded("bf16").encode([{"role": "system", "content": SYSTEM}, {"role": "user", "content": TASKS[1]}])
    want = loaded("bf16").logits(prompt)[-1]
    with load(builds("bf16"), threads=2, prefix=PrefixOptions(), prefill_chunk=96) as cached:
        rows = []
        run = cached.executable.run
        cached.engine._runner = type("Spy", (), {"run": lambda _, spans: rows.append(run(spans).copy()) or rows[-1]})()
        for _ in range(2):
            rows.clear()
            cached_tokens = tokens_of(cached, prompt)[1].cached_tokens
            first = next(row for row in rows if len(row))
            np.testing.assert_allclose(first[0], want, rtol=0, atol=1e-3 * np.abs(want).max())
        assert cached_tokens > len(prompt) / 2
