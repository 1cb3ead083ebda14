"""Streamed text = whole text for every chunking; stop strings across token and character boundaries."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcn_compile
from qcn_compile.runtime.detokenize import Detokenizer, StopMatcher
from qcn_compile.runtime.tokenizer import Tokenizer

TEXTS = ["def fib(n):\n    return n\n", "naïve café — 你好", "🙂👩‍👩‍👧 family 🇳🇱",
         "<|im_start|>a<tool_call>b<|im_end|>c", "a\u0301b"]


BUNDLED = Path(qcn_compile.__file__).parent / "assets" / "tiny-coder"


@pytest.fixture(scope="module", params=["toy", "bundled"])
def tokenizer(request, toy_build, tmp_path_factory):
    if request.param == "toy":
        return Tokenizer(toy_build)
    if not (BUNDLED / "tokenizer.json").is_file():
        pytest.skip("no bundled model here")
    build = tmp_path_factory.mktemp("bundled")
    (build / "tokenizer").symlink_to(BUNDLED)
    return Tokenizer(build)


def chunks_of(items, seed):
    rng, start = random.Random(seed), 0
    while start < len(items):
        count = rng.randint(1, 4)
        yield items[start:start + count]
        start += count


def stream(detokenizer, pieces):
    return "".join([detokenizer.push(piece) for piece in pieces]) + detokenizer.finish()


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_is_whole_for_every_chunking(tokenizer, text):
    ids = tokenizer.encode(text)
    want = tokenizer.backend.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == want
    for seed in range(20):
        assert stream(Detokenizer(tokenizer.token_bytes), chunks_of(ids, seed)) == want
    assert stream(Detokenizer(tokenizer.token_bytes), [[i] for i in ids]) == want


def test_random_tokens_with_invalid_bytes_decode_as_the_backend_does(tokenizer):
    rng, size = random.Random(0), tokenizer.backend.get_vocab_size()
    for seed in range(300):
        ids = [rng.randrange(size + 10) for _ in range(rng.randint(1, 30))]  # the last ids are padding rows
        want = tokenizer.backend.decode([i for i in ids if i < size], skip_special_tokens=True)
        assert stream(Detokenizer(tokenizer.token_bytes), chunks_of(ids, seed)) == want


def test_a_split_character_waits_for_its_end(tokenizer):
    spelled = tokenizer.backend.pre_tokenizer.pre_tokenize_str("🙂")[0][0]
    ids = [tokenizer.backend.token_to_id(character) for character in spelled]
    assert len(ids) == 4
    detokenizer = Detokenizer(tokenizer.token_bytes)
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "🙂"]
    cut = Detokenizer(tokenizer.token_bytes)
    assert cut.push(ids[:2]) == "" and cut.finish() == "\ufffd"


def first_match(text, stops):
    """The definition, a character at a time: the first stop to be completed, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


@settings(max_examples=400, deadline=None)
@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.booleans(),
       st.randoms(use_true_random=False))
def test_stops_do_not_depend_on_chunking(text, stops, include, rng):
    matcher, shown, start = StopMatcher(stops, include), "", 0
    while start < len(text) and matcher.matched is None:
        size = rng.randint(1, 4)
        shown += matcher.push(text[start:start + size])
        start += size
    shown += matcher.finish()
    match = first_match(text, stops)
    if match is None:
        assert (shown, matcher.matched) == (text, None)
    else:
        end, stop = match
        assert (shown, matcher.matched) == (text[:end if include else end - len(stop)], stop)


def test_only_a_possible_start_is_held_back():
    matcher = StopMatcher(["</s>", "END"], include=False)
    assert [matcher.push(piece) for piece in ["ab<", "/", "x<", "/s"]] == ["ab", "", "</x", ""]
    assert matcher.push(">more") == "" and matcher.matched == "</s>"
    assert matcher.push("anything") == "" and matcher.finish() == ""


def test_a_stop_inside_a_character_split_over_tokens(tokenizer):
    ids = tokenizer.encode("price 5€ each")
    for pieces in ([[i] for i in ids], [ids]):
        detokenizer = Detokenizer(tokenizer.token_bytes, ["€"])
        assert "".join(itertools.chain(map(detokenizer.push, pieces), [detokenizer.finish()])) == "price 5"
        assert detokenizer.stopped
