"""YaRN given when a build is loaded, against transformers with the same config."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qcn_compile.errors import UsageError
from qcn_compile.runtime.loaded import load

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
TOKENS = np.random.default_rng(1).integers(0, 4000, 230).tolist()
LONG = {"rope_type": "yarn", "factor": 31.0, "original_max_position_embeddings": 32768}
FULL = json.dumps({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}})


def relative(got, want):
    return float((torch.from_numpy(got) - want).norm() / want.norm())


def transformers_with(bundled, yarn):
    config = AutoConfig.from_pretrained(bundled)
    config.rope_parameters = {**config.rope_parameters, **yarn}
    reference = AutoModelForCausalLM.from_pretrained(bundled, config=config, dtype=torch.float32,
                                                     attn_implementation="eager").eval()
    with torch.no_grad():
        return reference(torch.tensor([TOKENS]), use_cache=False).logits[0]


def test_logits_are_those_of_transformers_with_yarn(bundled, builds, loaded):
    want = transformers_with(bundled, YARN)
    with load(builds("fp32"), threads=2, overrides=json.dumps({"rope_scaling": YARN})) as model:
        assert relative(model.logits(TOKENS), want) < 1e-4
    assert relative(loaded("fp32").logits(TOKENS), want) > 1e-3  # without it the answer is another


def test_longer_contexts_need_the_override(builds):
    with pytest.raises(UsageError, match=r"--context-length 100000: the build is for 1 to 32768 .*override-args"):
        load(builds("fp32"), threads=2, context_length=100000)
    with load(builds("fp32"), threads=2, context_length=131072, max_running_requests=1, overrides=FULL) as model:
        assert model.memory.context_length == 131072
    with load(builds("fp32"), threads=2, overrides=FULL) as model:
        assert model.memory.context_length == 32768
    with pytest.raises(UsageError, match="131072 tokens"):
        load(builds("fp32"), threads=2, context_length=131073, overrides=FULL)


def test_a_context_of_1010000_tokens(bundled, builds):
    """As the cookbook's line asks for; the model's own limit is 32768 here, so the factor is 31 in place of 4."""
    with load(builds("fp32"), threads=2, context_length=1_010_000, max_running_requests=1,
              overrides=json.dumps({"rope_scaling": LONG})) as model:
        assert model.memory.context_length == 1_010_000
        assert model.memory.pages * model.memory.page_size >= 1_010_000
        got = model.logits(TOKENS)
    assert relative(got, transformers_with(bundled, LONG)) < 1e-4


@pytest.mark.slow
def test_tokens_beyond_the_models_own_context(builds):
    """A prompt longer than the config's limit, in chunks and whole steps alike, keeps its answer."""
    tokens = np.random.default_rng(2).integers(0, 4000, 33100).tolist()
    answers = []
    for chunk in (512, 200):
        with load(builds("bf16"), threads=2, context_length=1_010_000, max_running_requests=1,
                  overrides=json.dumps({"rope_scaling": LONG}), prefill_chunk=chunk) as model:
            answers.append([t for o in model.generate(tokens, temperature=0, max_tokens=8, ignore_eos=True)
                            for t in o.token_ids])
    assert answers[0] == answers[1] and len(answers[0]) == 8
