"""DESIGN section 9 on the real model: chunks, batches, pages and buckets change nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from qcn_compile import load
from qcn_compile.runtime.loaded import Model


def tokens(model: Model, n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 4000, n).tolist()


def alone(model: Model, ids: list[int]) -> np.ndarray:
    return model.logits(ids)


def close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.linalg.norm(got - want) <= 2e-5 * np.linalg.norm(want)
    assert (got.argmax(-1) == want.argmax(-1)).mean() > 0.995


@pytest.mark.parametrize("variant", ["fp32", "int8"])
@pytest.mark.parametrize("lengths", [(31, 32, 33), (1, 63, 64, 65), (5, 127, 1, 128, 129), (9, 1, 1, 1)])
def test_a_ragged_batch_equals_one_at_a_time(loaded: Callable[[str], Model], variant: str,
                                             lengths: tuple[int, ...]) -> None:
    model = loaded(variant)
    sequences = [tokens(model, n, i) for i, n in enumerate(lengths)]
    together = model.step([(f"s{i}", ids) for i, ids in enumerate(sequences)])
    for i, (ids, logits) in enumerate(zip(sequences, together, strict=True)):
        model.release(f"s{i}")
        close(logits, alone(model, ids))


@pytest.mark.parametrize("cuts", [(1,), (31,), (32,), (33,), (63, 64, 65), (64, 128), (100, 101, 102), (8, 16, 24)])
def test_chunked_prefill_equals_whole(loaded: Callable[[str], Model], cuts: tuple[int, ...]) -> None:
    model = loaded("fp32")
    ids = tokens(model, 140, 7)
    parts = [model.step([("c", ids[a:b])])[0] for a, b in pairwise((0, *cuts, len(ids)))]
    model.release("c")
    close(np.concatenate(parts), alone(model, ids))


@pytest.mark.parametrize("prompt", [1, 31, 32, 33, 63, 64, 65])
def test_decode_after_prefill_equals_one_long_prefill(loaded: Callable[[str], Model], prompt: int) -> None:
    model = loaded("fp32")
    ids = tokens(model, prompt + 40, 11)
    parts = model.step([("d", ids[:prompt])])
    parts += [model.step([("d", [t])])[0] for t in ids[prompt:]]
    model.release("d")
    close(np.concatenate(parts), alone(model, ids))


def test_decodes_and_prefills_mixed_in_one_step(loaded: Callable[[str], Model]) -> None:
    model = loaded("fp32")
    ids = {name: tokens(model, 90, seed) for seed, name in enumerate("abc")}
    done, got = dict.fromkeys(ids, 0), {name: [] for name in ids}
    for step in [{"a": 40}, {"a": 1, "b": 33}, {"a": 1, "b": 1, "c": 70}, {"c": 20, "a": 1}, {"b": 56, "a": 47}]:
        batch = [(name, ids[name][done[name]:done[name] + n]) for name, n in step.items()]
        for (name, part), logits in zip(batch, model.step(batch), strict=True):
            got[name].append(logits)
            done[name] += len(part)
    for name, parts in got.items():
        model.release(name)
        close(np.concatenate(parts), alone(model, ids[name]))


def test_generation_does_not_depend_on_company(loaded: Callable[[str], Model]) -> None:
    model = loaded("int4")
    prompts = ["def fib(n):", "class A:\n", "import sys\n\n", "x = 1\n"]
    single = [model.generate(p, temperature=0.0, max_tokens=48).text() for p in prompts]
    streams = [model.generate(p, temperature=0.0, max_tokens=48) for p in prompts]
    assert [s.text() for s in streams] == single
    sampled = [model.generate(p, temperature=0.8, seed=3, max_tokens=32).text() for p in prompts]
    streams = [model.generate(p, temperature=0.8, seed=3, max_tokens=32) for p in prompts]
    assert [s.text() for s in streams] == sampled


def test_threads_change_no_bit(builds: Callable[[str], Path], loaded: Callable[[str], Model], tmp_path: Path) -> None:
    ids = tokens(loaded("int4"), 75, 5)
    copy = shutil.copytree(builds("int4"), tmp_path / "copy")  # a build is open with one thread count at a time
    with load(copy, threads=1) as one:
        assert np.array_equal(one.logits(ids), loaded("int4").logits(ids))
