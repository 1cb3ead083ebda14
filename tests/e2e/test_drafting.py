"""Speculation on the trained model, both drafters, with prefix cache, chunked prefill and batching all on."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from qcn_compile.errors import UsageError
from qcn_compile.frontend import trace_model
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.ir.interpret import default_inputs, run
from qcn_compile.runtime.batch import Span
from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.speculation.options import SpeculationOptions

CODE = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        " \
       "self.items.append(item)\n\n    def pop(self):\n        return self.items.pop()\n"
PROMPTS = ["def fib(n):\n", CODE, [{"role": "user", "content": "Add a docstring to every method:\n" + CODE}],
           "x = [1, 2, 3]\n" * 20]


def tokens_of(streams):
    return [[t for o in stream for t in o.token_ids] for stream in streams]


HELDOUT = json.loads((Path(__file__).parents[1] / "data/heldout.jsonl").read_text().splitlines()[0])["text"]
ALGORITHMS = [SpeculationOptions(4), SpeculationOptions(3, "mtp"), SpeculationOptions(1, "mtp")]
IDS = ["ngram", "mtp-3", "mtp-1"]


@pytest.mark.parametrize("options", ALGORITHMS, ids=IDS)
def test_all_features_together_give_the_plain_greedy_tokens(options, builds, loaded):
    want = tokens_of(loaded("bf16").generate(p, temperature=0, max_tokens=80) for p in PROMPTS)
    with load(builds("mtp"), max_running_requests=3, threads=2, prefill_chunk=48, prefix=PrefixOptions(),
              speculation=options) as fast:
        fast.engine.speculation.times.ratio = lambda sequences: 1.0  # draft as long as anything is gained
        for _ in range(2):  # the second time from cached prefixes
            streams = [fast.generate(p, temperature=0, max_tokens=80) for p in PROMPTS]
            assert tokens_of(streams) == want
            fast.check_integrity()
        assert fast.engine.speculation.accepted > 40 and fast.engine.prefixes.counts.hits > 0


@pytest.mark.parametrize("options", ALGORITHMS, ids=IDS)
def test_sampled_tokens_are_those_without_drafts(options, builds, loaded):
    want = [loaded("bf16").generate(CODE, seed=i, max_tokens=40).text() for i in range(4)]
    with load(builds("mtp"), threads=2, speculation=options) as fast:
        assert [fast.generate(CODE, seed=i, max_tokens=40).text() for i in range(4)] == want


def test_preempted_requests_draft_again(builds, loaded):
    prompts = [list(range(10 * i, 10 * i + 120)) for i in range(1, 4)]
    params = {"temperature": 0, "max_tokens": 300, "ignore_eos": True}
    want = tokens_of(loaded("bf16").generate(p, **params) for p in prompts)
    with load(builds("mtp"), max_running_requests=3, threads=2, context_length=512, cache_memory=4_000_000,
              speculation=SpeculationOptions(1, "mtp")) as fast:
        assert fast.engine.pages.total < 3 * 420 / fast.memory.page_size
        assert tokens_of([fast.generate(p, **params) for p in prompts]) == want
        fast.check_integrity()


def test_the_compiled_head_equals_its_graph_and_agrees_with_the_main_model(builds):
    """Logits after every token of held-out code, in ragged pieces; the card gives 80 % agreement."""
    import torch

    traced = trace_model(locate(None, "cpu"))
    with load(builds("mtp"), threads=2) as model:
        tokens = model.tokenizer.encode(HELDOUT)[:161]
        main, hidden = run(traced.main, default_inputs(traced.main, [tokens[:-1]]), traced.weights.get)
        inputs = {**default_inputs(traced.mtp, [tokens[1:]]), "hidden": hidden}
        want = run(traced.mtp, inputs, traced.weights.get)[0]
        rows, pages = [], np.arange(8, dtype=np.int32)
        for start, stop in pairwise([0, 1, 9, 41, 73, 160]):
            span = Span(tokens[start + 1:stop + 1], start, 0, pages, stop - start)
            rows.append(model.executable.draft_logits([span], hidden[start:stop].numpy())[0].copy())
        got = torch.from_numpy(np.concatenate(rows))
    assert float((got - want).norm() / want.norm()) < 2e-2
    assert float((got[:-1].argmax(1) == main[1:].argmax(1)).float().mean()) > 0.7


def test_a_build_without_the_head_says_what_to_do(builds):
    with pytest.raises(UsageError, match=r"has no MTP head.*Coder-Next ships none.*qcn-compile --mtp"):
        load(builds("bf16"), threads=2, speculation=SpeculationOptions(3, "mtp"))
