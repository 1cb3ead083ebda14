"""Rotary tables under overrides: those of transformers, and clear errors for what a build cannot take."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qcn_compile.errors import ArtifactError, UsageError
from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.rope import rope_override

CODER = {"max_position_embeddings": 262144, "rope_theta": 5e6, "rope_scaling": None, "head_dim": 256,
         "partial_rotary_factor": 0.25}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
LLAMA = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192}


def override(config=CODER, **fields):
    return rope_override(json.dumps(fields), config)


@pytest.mark.parametrize("scaling", [
    YARN, {**YARN, "factor": 2.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {**YARN, "attention_factor": 0.8}, {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3},
    {"rope_type": "linear", "factor": 3.0}, LLAMA], ids=lambda s: "-".join(map(str, s.values())))
def test_tables_are_those_of_transformers(scaling):
    config = Qwen3NextConfig(**{**CODER, "rope_parameters": {**scaling, "rope_theta": 5e6,
                                                             "partial_rotary_factor": 0.25}, "rope_scaling": None})
    want, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    got, mine = override(rope_scaling=scaling).frequencies(32)
    assert got.dtype == np.float32 and np.abs(got / want.numpy() - 1).max() < 2e-6
    assert mine == pytest.approx(factor, abs=1e-12)


def test_old_and_new_names_mean_the_same():
    want = override(rope_scaling=YARN).frequencies(32)[0]
    new = {"max_position_embeddings": 262144, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}
    for found in (override(rope_parameters={**YARN, "rope_theta": 5e6}), override(new, rope_scaling=YARN),
                  override(rope_scaling={**YARN, "rope_type": None, "type": "yarn"})):
        assert np.array_equal(found.frequencies(32)[0], want)
    assert override(rope_theta=1e4).frequencies(32)[0][-1] == pytest.approx(1e4 ** (-31 / 32))


def test_how_long_a_context_an_override_allows():
    assert rope_override("{}", CODER) is None
    assert override(rope_scaling=YARN).positions == 1048576
    assert override(rope_scaling={"rope_type": "linear", "factor": 2.0}).positions == 524288
    assert override(rope_theta=1e7).positions == 262144
    assert override(max_position_embeddings=400000).positions == 400000


@pytest.mark.parametrize(("text", "words"), [
    ("{", "is no JSON"), ("[]", "must be a JSON object"), ('{"num_experts": 4}', "num_experts: a build has"),
    ('{"rope_scaling": {"rope_type": "dynamic", "factor": 2}}', "dynamic"), ('{"rope_scaling": 3}', "JSON object"),
    ('{"rope_scaling": {"rope_type": "yarn"}}', "yarn needs factor"), ('{"rope_theta": "x"}', "above 0"),
    ('{"rope_scaling": {"rope_type": "yarn", "factor": -1}}', "above 0"),
    ('{"max_position_embeddings": true}', "above 0")])
def test_bad_overrides(text, words):
    with pytest.raises(UsageError, match=words):
        rope_override(text, CODER)


def test_a_build_without_tables_to_replace_says_so(toy_copy, reseal):
    reseal(toy_copy, {"model": {"name": "toy", "config": CODER}})
    with pytest.raises(ArtifactError, match="build it again"):
        load(toy_copy, threads=1, overrides=json.dumps({"rope_scaling": YARN}))
