"""DeltaNet states in bfloat16: half the memory of a sequence, little lost, and every equality kept."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np

from qcn_compile.artifact import read_manifest
from qcn_compile.compile import Options, optimised
from qcn_compile.ir.types import StateKind
from qcn_compile.lowering.buckets import buckets_for
from qcn_compile.lowering.schedule import kernels_of, schedule
from qcn_compile.runtime.cli import main
from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.speculation.options import SpeculationOptions
from qcn_compile.targets.registry import load_target

HELDOUT = [json.loads(line)["text"] for line in (Path(__file__).parents[1] / "data/heldout.jsonl").open()]
PROMPTS = ["def fib(n):\n", "class Stack:\n    def push(self, item):\n" * 6, "x = [1, 2, 3]\n" * 20]


def tokens_of(model, prompt):
    return [t for o in model.generate(prompt, temperature=0, max_tokens=60) for t in o.token_ids]


def perplexity(model, texts):
    losses = []
    for text in texts:
        ids = model.encode(text)[:1200]
        logits = model.logits(ids)[:-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        losses.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


def test_states_take_half_and_lose_little(builds, loaded):
    sizes = {name: sum(c.unit_bytes for c in read_manifest(builds(name)).caches if c.kind == "delta")
             for name in ("bf16", "bf16-states")}
    assert sizes["bf16"] == 2 * sizes["bf16-states"] > 0
    exact, rounded = (perplexity(loaded(name), HELDOUT[:3]) for name in ("bf16", "bf16-states"))
    print(f"perplexity with states in fp32 {exact:.4f}, in bf16 {rounded:.4f}")
    assert exact != rounded and abs(rounded / exact - 1) < 0.01
    plans = [loaded(name).memory for name in ("bf16", "bf16-states")]
    assert plans[1].state_bytes < 0.6 * plans[0].state_bytes


def test_chunks_and_steps_equal_the_whole(loaded):
    model = loaded("bf16-states")
    ids = np.random.default_rng(4).integers(0, 4000, 140).tolist()
    whole = model.logits(ids)
    parts = [model.step([("c", ids[a:b])])[0] for a, b in pairwise((0, 1, 32, 97, 98, 140))]
    model.release("c")
    assert np.linalg.norm(np.concatenate(parts) - whole) <= 2e-5 * np.linalg.norm(whole)


def test_all_features_together_give_the_plain_greedy_tokens(builds, loaded):
    want = [tokens_of(loaded("bf16-states"), prompt) for prompt in PROMPTS]
    with load(builds("bf16-states"), max_running_requests=3, threads=2, prefill_chunk=48, prefix=PrefixOptions(),
              speculation=SpeculationOptions(4)) as model:
        model.engine.speculation.times.ratio = lambda sequences: 1.0
        for _ in range(2):
            streams = [model.generate(prompt, temperature=0, max_tokens=60) for prompt in PROMPTS]
            assert [[t for o in stream for t in o.token_ids] for stream in streams] == want
            model.check_integrity()
        assert model.engine.speculation.accepted > 10 and model.engine.prefixes.counts.hits > 0


def test_the_flag_must_agree_with_the_build(builds, capsys):
    flags = ["--prompt", "x", "--max-tokens", "1", "--threads", "2", "--mamba-ssm-dtype"]
    assert main([str(builds("bf16-states")), *flags, "bfloat16"]) == 0
    assert main([str(builds("bf16-states")), *flags, "float32"]) == 2
    assert "keeps its states in bf16; build again with qcn-compile --mamba-ssm-dtype float32" in capsys.readouterr().err


def test_gpu_plans_keep_states_in_bfloat16_too():
    target = load_target("h100", None)
    graph = optimised(None, "h100", Options(weights="dummy", states="bfloat16"))
    states = [state for state in graph.states.values() if state.kind is StateKind.delta]
    assert states and all(target.cache_unit(state, 32)[1] == 2 * np.prod(state.shape) for state in states)
    seen = set()
    for bucket in [b for b in buckets_for("gpu") if b.tokens in (1, 4, 64, 512)]:
        for kernel in kernels_of([schedule(graph, bucket, target)]):
            if "ST" in (params := dict(kernel.params)):
                seen.add((kernel.family, params["ST"]))
    assert seen == {(name, "bf16") for name in ("delta_one", "delta_step", "delta_batch", "delta_scan")}
