"""The mask hook of the sampler, and grammars over the bundled tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qcn_compile.runtime.request import SamplingParams
from qcn_compile.runtime.sampler import Sampler
from qcn_compile.runtime.server.config import Limits
from qcn_compile.runtime.server.errors import ApiError
from qcn_compile.runtime.server.grammar import (
    GrammarCompiler,
    depth,
    json_grammar,
    lark_grammar,
    regex_grammar,
)
from qcn_compile.runtime.server.schema.chat import Function
from qcn_compile.runtime.server.tool_grammar import free_text, tool_grammar

LIMITS = Limits()
READ = Function(name="read", parameters={
    "type": "object", "required": ["path", "mode"], "$defs": {"Line": {"type": "integer"}},
    "properties": {"path": {"type": "string"}, "line": {"$ref": "#/$defs/Line"}, "mode": {"enum": ["r", "w"]},
                   "tags": {"type": "array", "items": {"type": "string"}}}})
STOP = Function(name="stop")


class Only:
    """Allows some tokens, remembers what came."""

    def __init__(self, size, tokens):
        self.mask, self.taken = np.zeros(size, bool), []
        self.mask[list(tokens)] = True

    def allowed(self):
        return self.mask

    def accept(self, token):
        self.taken.append(token)


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"temperature": 5.0}, {"top_k": 2}, {"top_p": 0.1},
                                    {"min_p": 0.9}, {"repetition_penalty": 2.0}])
def test_only_allowed_tokens_are_chosen(fields):
    only = Only(50, [3, 17, 40])
    sampler = Sampler(SamplingParams(**{"seed": 1, **fields}), [1, 2], 50, only)
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32) * 5
    before = logits.copy()
    chosen = [sampler.sample(logits).token for _ in range(60)]
    assert set(chosen) <= {3, 17, 40} and only.taken == chosen
    assert (logits == before).all()


def test_the_random_stream_is_the_same_with_all_allowed():
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)
    free, bound = (Sampler(SamplingParams(seed=1), [1], 50, c) for c in (None, Only(50, range(50))))
    assert [free.sample(logits) for _ in range(30)] == [bound.sample(logits) for _ in range(30)]


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer.backend.to_str(), 4200, tokenizer.defaults.eos_token_ids,
                           tokenizer.backend.token_to_id)


def takes(compiler, tokenizer, grammar, text, thinking=False):
    """Whether a text, and then an end, passes a grammar token by token."""
    constraint = compiler.compile(grammar, thinking)()
    for token in tokenizer.encode(text):
        if not constraint.allowed()[token]:
            return False
        constraint.accept(token)
    allowed = constraint.allowed()
    assert len(allowed) == 4200 and allowed.any() and not allowed[4096:].any()
    return bool(allowed[list(tokenizer.defaults.eos_token_ids)].all())


@pytest.mark.parametrize(("text", "good"), [
    ('{"a": 1, "b": ["x"]}', True), ('{"a":1,"b":[]}', True), ('{"a": "1", "b": []}', False), ('{"a": 1}', False),
    ('{"a": 1, "b": []} and', False), ("", False), ('{"a": 1,' + " " * 90 + '"b": []}', False)])
def test_json(compiler, tokenizer, text, good):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array"}},
              "required": ["a", "b"], "additionalProperties": False}
    assert takes(compiler, tokenizer, json_grammar(schema, LIMITS, "p"), text) is good


def test_regex_lark_and_thinking(compiler, tokenizer):
    regex = regex_grammar(r"[a-z]+/\d{2}", LIMITS, "p")
    assert takes(compiler, tokenizer, regex, "abc/42") and not takes(compiler, tokenizer, regex, "abc/4")
    lark = lark_grammar('start: "a" | pair\npair: "(" start ")"', LIMITS, "p")
    assert takes(compiler, tokenizer, lark, "((a))") and not takes(compiler, tokenizer, lark, "((a)")
    assert takes(compiler, tokenizer, regex, "what now?\n</think>\n\nabc/42", thinking=True)
    assert not takes(compiler, tokenizer, regex, "abc/42", thinking=True)


PATH, MODE = "<parameter=path>\na\nb\n</parameter>\n", "<parameter=mode>\nr\n</parameter>\n"
LINE, TAGS = "<parameter=line>\n12\n</parameter>\n", '<parameter=tags>\n["x"]\n</parameter>\n'


def xml(*parts, name="read"):
    return f"<tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</tool_call>"


@pytest.mark.parametrize(("text", "good"), [
    (xml(PATH, MODE), True), (xml(PATH, LINE, MODE, TAGS), True), (xml(PATH), False), (xml(MODE), False),
    (xml(PATH, LINE.replace("12", "x"), MODE), False), (xml(PATH, MODE.replace("r\n", "x\n")), False),
    (xml(name="stop"), True), (xml(name="other"), False), ("hello", False),
    (xml(PATH, MODE) + "\n" + xml(name="stop"), True), ("Hello.\n" + xml(name="stop"), False)])
def test_forced_coder_calls(compiler, tokenizer, text, good):
    grammar = tool_grammar([READ, STOP], "qwen3_coder", compiler.tag, LIMITS, parallel=True, param="p")
    assert takes(compiler, tokenizer, grammar, text) is good


def test_strict_calls_after_text(compiler, tokenizer):
    grammar = tool_grammar([READ], "qwen3_coder", compiler.tag, LIMITS, parallel=False, param="p",
                           otherwise=free_text("p"))
    for text, good in (("Hello.", True), ("Hello.\n" + xml(PATH, MODE), True), (xml(PATH, MODE), True),
                       ("Hello.\n" + xml(PATH), False), (xml(PATH, MODE) + "\n" + xml(PATH, MODE), False)):
        assert takes(compiler, tokenizer, grammar, text) is good, text


def test_json_or_calls(compiler, tokenizer):
    grammar = tool_grammar([STOP], "qwen3_coder", compiler.tag, LIMITS, parallel=False, param="p",
                           otherwise=json_grammar({"type": "object"}, LIMITS, "p"))
    for text, good in (('{"a": 1}', True), (xml(name="stop"), True), ("Hello.", False)):
        assert takes(compiler, tokenizer, grammar, text) is good, text


@pytest.mark.parametrize(("arguments", "good"), [({"path": "a", "mode": "r"}, True), ({"path": "a"}, False),
                                                 ({"path": "a", "line": 3, "mode": "w"}, True),
                                                 ({"path": 5, "mode": "w"}, False)])
def test_forced_hermes_calls(compiler, tokenizer, arguments, good):
    grammar = tool_grammar([READ], "hermes", compiler.tag, LIMITS, parallel=True, param="p")
    text = f"<tool_call>\n{json.dumps({'name': 'read', 'arguments': arguments})}\n</tool_call>"
    assert takes(compiler, tokenizer, grammar, text) is good


def test_grammars_that_cannot_work(compiler):
    for make in (lambda: regex_grammar("(", LIMITS, "p"), lambda: lark_grammar("start: nothing", LIMITS, "p"),
                 lambda: json_grammar({"type": "odd"}, LIMITS, "p"), lambda: json_grammar([1], LIMITS, "p"),
                 lambda: json_grammar({"allOf": [{}] * 100_000}, LIMITS, "p"), lambda: regex_grammar("", LIMITS, "p")):
        with pytest.raises(ApiError) as caught:
            compiler.compile(make(), False)
        assert caught.value.status == 400 and caught.value.param == "p"


def test_depth():
    assert depth(5) == 0 and depth({}) == 1 and depth({"a": [{}]}) == 3
