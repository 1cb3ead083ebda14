"""Sampling: filters against a plain definition, frequencies against probabilities, determinism per request."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qcn_compile.errors import DeviceError, UsageError
from qcn_compile.runtime.request import SamplingParams
from qcn_compile.runtime.sampler import Sampler, distribution


def logits_of(size, seed=0, scale=2.0):
    return np.random.default_rng(seed).normal(scale=scale, size=size).astype(np.float32)


def plain(row, params):
    """The definition, with a full sort: temperature, top-k, top-p, min-p -> probabilities f64 [vocab]."""
    p = np.exp((row.astype(np.float64) - row.max()) / params.temperature)
    order = np.argsort(-p, kind="stable")
    keep = order[:params.top_k] if params.top_k else order
    mass = np.cumsum(p[keep]) / p[keep].sum()
    keep = keep[:int((mass < params.top_p).sum()) + 1]
    keep = keep[p[keep] >= params.min_p * p[keep].max()]
    out = np.zeros(len(row))
    out[keep] = p[keep] / p[keep].sum()
    return out


@pytest.mark.parametrize("size", [50, 5000])
@pytest.mark.parametrize("fields", [
    {}, {"temperature": 0.3}, {"top_k": 5}, {"top_k": 10**6}, {"top_p": 0.5}, {"top_p": 0.999, "temperature": 3.0},
    {"min_p": 0.2}, {"top_k": 20, "top_p": 0.7, "min_p": 0.05, "temperature": 1.5}, {"top_k": 1}, {"top_p": 1e-6},
])
def test_distribution_is_the_definition(size, fields):
    row, params = logits_of(size), SamplingParams(**fields)
    ids, weights = distribution(row, params)
    got = np.zeros(size)
    got[np.arange(size) if ids is None else ids] = weights / weights.sum()
    np.testing.assert_allclose(got, plain(row, params), atol=1e-6)


def test_frequencies_follow_the_distribution():
    row, params = logits_of(30), SamplingParams(temperature=0.9, top_k=12, top_p=0.95, seed=7)
    sampler, draws = Sampler(params, [], 30), 20000
    counts = Counter(sampler.sample(row).token for _ in range(draws))
    want = plain(row, params)
    assert set(counts) == set(np.flatnonzero(want).tolist())
    expected = want[want > 0] * draws
    seen = np.array([counts[int(i)] for i in np.flatnonzero(want)])
    assert ((seen - expected) ** 2 / expected).sum() < 2.5 * len(expected) + 10  # chi-squared, far in the tail


def test_greedy_takes_the_first_largest_and_leaves_the_logits():
    row = np.array([1, 5, 5, 0], np.float32)
    before = row.copy()
    assert Sampler(SamplingParams(temperature=0), [], 4).sample(row).token == 1
    Sampler(SamplingParams(temperature=0, logit_bias={0: 9.0}, presence_penalty=1.0), [1], 4).sample(row)
    np.testing.assert_array_equal(row, before)


def test_the_same_seed_gives_the_same_tokens_whatever_runs_beside():
    rows = [logits_of(100, i) for i in range(40)]
    params = SamplingParams(seed=11, temperature=1.2)
    alone = [Sampler(params, [], 100).sample(rows[0]).token] + []
    one, other = Sampler(params, [], 100), Sampler(SamplingParams(seed=12), [], 100)
    mixed = []
    for row in rows:
        mixed.append(one.sample(row).token)
        other.sample(row)
    again = Sampler(params, [], 100)
    assert mixed == [again.sample(row).token for row in rows] and alone == mixed[:1]
    third = Sampler(SamplingParams(seed=13, temperature=1.2), [], 100)
    assert mixed != [third.sample(row).token for row in rows]


def test_unseeded_requests_differ():
    row = np.zeros(1000, np.float32)
    draws = {tuple(Sampler(SamplingParams(), [], 1000).sample(row).token for _ in range(1)) for _ in range(20)}
    assert len(draws) > 10


def test_penalties_by_hand():
    row = np.array([2.0, -2.0, 1.0, 0.5], np.float32)

    def greedy_row(prompt, outputs, **fields):
        sampler = Sampler(SamplingParams(temperature=0, **fields), prompt, 4)
        for token in outputs:
            forced = np.full(4, -50, np.float32)
            forced[token] = 50
            assert sampler.sample(forced).token == token
        return sampler._adjusted(row)

    np.testing.assert_allclose(greedy_row([0, 1], [], repetition_penalty=2.0), [1.0, -4.0, 1.0, 0.5])
    np.testing.assert_allclose(greedy_row([3], [0], repetition_penalty=2.0), [1.0, -2.0, 1.0, 0.25])
    np.testing.assert_allclose(greedy_row([0], [2, 2], frequency_penalty=0.5), [2.0, -2.0, 0.0, 0.5])
    np.testing.assert_allclose(greedy_row([0], [2, 2], presence_penalty=0.5), [2.0, -2.0, 0.5, 0.5])
    np.testing.assert_allclose(greedy_row([], [], logit_bias={1: 3.5, 3: -100, 99: 1.0}), [2.0, 1.5, 1.0, -99.5])


def test_logprobs_are_the_models_own():
    row = logits_of(50)
    want = row - row.max() - np.log(np.exp(row - row.max()).sum())
    sampler = Sampler(SamplingParams(temperature=0.1, top_k=2, logit_bias={0: -100}, logprobs=5), [], 50)
    sample = sampler.sample(row)
    np.testing.assert_allclose(sample.logprob, want[sample.token], atol=1e-5)
    assert [i for i, _ in sample.top_logprobs] == np.argsort(-row)[:5].tolist()
    np.testing.assert_allclose([p for _, p in sample.top_logprobs], np.sort(want)[::-1][:5], atol=1e-5)
    none = Sampler(SamplingParams(logprobs=0), [], 50).sample(row)
    assert none.logprob is not None and none.top_logprobs == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers(bad):
    row = logits_of(10)
    row[3] = bad
    with pytest.raises(DeviceError, match="not finite"):
        Sampler(SamplingParams(), [], 10).sample(row)


@pytest.mark.parametrize(("fields", "words"), [
    ({"temperature": -0.1}, "temperature=-0.1: must be a number from 0 to 100"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": "hot"}, "temperature='hot'"),
    ({"top_p": 0.0}, "top_p=0.0"), ({"top_p": 1.1}, "top_p=1.1"), ({"min_p": 2}, "min_p=2"),
    ({"top_k": -1}, "top_k=-1: must be a whole number >= 0"), ({"top_k": 2.5}, "top_k=2.5"),
    ({"max_tokens": 0}, "max_tokens=0: must be a whole number >= 1"), ({"max_tokens": True}, "max_tokens=True"),
    ({"repetition_penalty": 0}, "repetition_penalty=0"), ({"frequency_penalty": 3}, "from -2 to 2"),
    ({"seed": -1}, "seed=-1"), ({"logprobs": 21}, "from 0 to 20"), ({"stop": ("",)}, "non-empty"),
    ({"stop": [3]}, "non-empty"), ({"logit_bias": {"a": 1}}, "'a' is no token id"),
    ({"logit_bias": {1: 200}}, r"logit_bias\[1\]=200"),
])
def test_bad_parameters_name_themselves(fields, words):
    with pytest.raises(UsageError, match=words):
        SamplingParams(**fields)
