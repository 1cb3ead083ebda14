"""n-gram speculation on the trained model, with prefix cache, chunked prefill and batching all on."""

from __future__ import annotations

from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.speculation.options import SpeculationOptions

CODE = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        " \
       "self.items.append(item)\n\n    def pop(self):\n        return self.items.pop()\n"
PROMPTS = ["def fib(n):\n", CODE, [{"role": "user", "content": "Add a docstring to every method:\n" + CODE}],
           "x = [1, 2, 3]\n" * 20]


def tokens_of(streams):
    return [[t for o in stream for t in o.token_ids] for stream in streams]


def test_all_features_together_give_the_plain_greedy_tokens(builds, loaded):
    plain = loaded("bf16")
    want = tokens_of(plain.generate(p, temperature=0, max_tokens=80) for p in PROMPTS)
    with load(builds("bf16"), max_running_requests=3, threads=2, prefill_chunk=48, prefix=PrefixOptions(),
              speculation=SpeculationOptions(4)) as fast:
        for _ in range(2):  # the second time from cached prefixes
            streams = [fast.generate(p, temperature=0, max_tokens=80) for p in PROMPTS]
            assert tokens_of(streams) == want
            fast.check_integrity()
        assert fast.engine.speculation.accepted > 40 and fast.engine.prefixes.counts.hits > 0


def test_sampled_tokens_are_those_without_drafts(builds, loaded):
    want = [loaded("bf16").generate(CODE, seed=i, max_tokens=40).text() for i in range(4)]
    with load(builds("bf16"), threads=2, speculation=SpeculationOptions(4)) as fast:
        assert [fast.generate(CODE, seed=i, max_tokens=40).text() for i in range(4)] == want
