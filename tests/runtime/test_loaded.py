"""`load(build).generate`: streams, prompts of every kind, defaults, early ends."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from qcn_compile.errors import ArtifactError, UsageError
from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.request import SamplingParams


def greedy(reference, tokens, count):
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(reference(tokens)[-1].argmax()))
    return tokens


def test_greedy_generation_is_the_references(model, reference):
    prompt = list(range(40, 60))
    outputs = list(model.generate(prompt, temperature=0, max_tokens=15, ignore_eos=True))
    new = [token for output in outputs for token in output.token_ids]
    assert prompt + new == greedy(reference, prompt, 15)
    assert [o.finish_reason for o in outputs[:-1]] == [None] * 14 and outputs[-1].finish_reason == "length"
    assert "".join(o.text for o in outputs) == model.tokenizer.decode(new)


def test_interleaved_streams_equal_those_alone(model):
    prompts = ["def fib(n):", [5, 6, 7], [{"role": "user", "content": "hi"}], "x" * 50]
    alone = [model.generate(p, max_tokens=20, seed=3).text() for p in prompts]
    streams = [model.generate(p, max_tokens=20, seed=3) for p in prompts]
    texts = [""] * len(streams)
    live = dict(enumerate(streams))
    while live:
        for i, stream in list(live.items()):
            output = next(stream, None)
            if output is None:
                del live[i]
            else:
                texts[i] += output.text
    assert texts == alone


def test_pages_run_out_but_the_tokens_stay(toy_build, model):
    prompts = [list(range(30 + i, 60 + i)) for i in range(4)]
    want = [[t for o in model.generate(p, temperature=0, max_tokens=60) for t in o.token_ids] for p in prompts]
    with load(toy_build, threads=1, cache_memory=4 * 64 + 33 * 128) as small:
        assert small.memory.pages == 33
        streams = [small.generate(p, temperature=0, max_tokens=60) for p in prompts]
        assert [[t for o in stream for t in o.token_ids] for stream in streams] == want
        small.check_integrity()


def test_a_stream_left_early_frees_its_caches(model):
    stream = model.generate([1, 2, 3], max_tokens=50, ignore_eos=True)
    next(stream)
    assert model.engine.pages.used > 0
    stream.close()
    assert model.engine.pages.used == 0 and list(stream) == []
    unread = model.generate([1, 2, 3])
    assert model.engine.unfinished == 1
    del unread
    gc.collect()
    assert model.engine.unfinished == 0


def test_a_stream_of_a_closed_model_says_so(toy_build):
    model = load(toy_build, threads=1)
    stream = model.generate([1, 2, 3])
    model.close()
    with pytest.raises(UsageError, match="ended before its stream was read"):
        next(stream)


def test_defaults_come_from_the_model_and_can_be_replaced(model):
    assert (model.sampling().temperature, model.sampling().top_k) == (0.8, 40)
    assert model.sampling(temperature=0, top_k=None) == SamplingParams(temperature=0, top_k=40, top_p=0.95)
    with pytest.raises(UsageError, match=r"unknown sampling parameter beams; known: max_tokens"):
        model.generate("x", beams=3)
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    assert len(list(model.generate([9], params))) == 2 and len(list(model.generate([9], params, max_tokens=3))) == 3


def test_stops_and_logprobs_reach_the_stream(model):
    whole = model.generate([9, 9], temperature=0, max_tokens=12, ignore_eos=True).text()
    stop = whole[3:6]
    assert model.generate([9, 9], temperature=0, max_tokens=12, ignore_eos=True, stop=stop).text() == (
        whole[:whole.index(stop)])
    output = next(model.generate([9, 9], temperature=0, logprobs=3))
    logits = model.logits([9, 9])[-1].astype(np.float64)
    want = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    assert output.samples[0].logprob == pytest.approx(want.max(), abs=1e-4)


def test_logits_beside_a_running_request(model):
    stream = model.generate([1, 2, 3], temperature=0, max_tokens=10, ignore_eos=True)
    first = next(stream).token_ids
    model.logits(list(range(100)))
    rest = [t for o in stream for t in o.token_ids]
    again = [t for o in model.generate([1, 2, 3], temperature=0, max_tokens=10, ignore_eos=True) for t in o.token_ids]
    assert [*first, *rest] == again


def test_a_build_without_tokenizer_takes_ids_only(toy_copy, reseal):
    for path in (toy_copy / "tokenizer").iterdir():
        path.unlink()
    reseal(toy_copy, {})
    with load(toy_copy, threads=1) as model:
        assert len([t for o in model.generate([4, 5], temperature=0, max_tokens=3) for t in o.token_ids]) == 3
        with pytest.raises(ArtifactError, match="has no tokenizer: give token ids"):
            model.generate("text")


def test_describe(model):
    text = model.describe()
    assert text.startswith("4 plans, 1 threads, weights 0.0 MB") and "128 pages x 4 = 512 tokens" in text


def test_a_cpu_build_has_no_table_to_move(toy_build):
    with pytest.raises(UsageError, match="--embedding-on-host: a CPU build's weights lie in host memory anyway"):
        load(toy_build, embedding_on_host=True)
