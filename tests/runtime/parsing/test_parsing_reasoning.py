"""Reasoning is split from the answer, alone and before tool calls."""

from __future__ import annotations

import json

import pytest
from parsing_texts import TOOLS, counted_ids, parse, render_hermes, render_xml

from qcn_compile.errors import UsageError
from qcn_compile.runtime.parsing import OutputParser, make_reasoning_parser, make_tool_parser
from qcn_compile.runtime.parsing.events import Content, Reasoning

CALL = render_xml("list_files", {})


@pytest.mark.parametrize("inside, text, reasoning, content", [
    (True, "think\n</think>\n\nanswer", "think", "answer"),
    (True, "<think>\nthink\n</think>\n\nanswer\n", "think", "answer\n"),
    (True, "\n<think>think</think>answer", "think", "answer"),
    (True, "a\n\nb <x> </thin\n</think>c", "a\n\nb <x> </thin", "c"),
    (True, "never closed\n", "never closed", None), (True, "cut </thi", "cut </thi", None), (True, "", None, None),
    (True, "\n</think>\n\nanswer", None, "answer"), (True, "\n\n  indented</think>x", "  indented", "x"),
    (True, "a</think>\n</think>\n\nb", "a", "b"), (True, "a</think></think>", "a", None),
    (True, "a</think>b </think> c", "a", "b </think> c"), (True, "a</think>\n\n  b", "a", "  b"),
    (True, "uses <tool_call> tags\n</think>\nb", "uses <tool_call> tags", "b"),
    (False, "plain\n</think> answer", None, "plain\n</think> answer"), (False, "\n x", None, "\n x"),
    (False, "<think>a</think>b", "a", "b"), (False, "\n<think>\n\n</think>\n\nb", None, "b"), (False, "<thin", None,
    "<thin"),
    (False, "x <think>a</think>", None, "x <think>a</think>"), (False, "\n", None, "\n"), (False, "<think>a",
    "a", None),
])
def test_split(inside, text, reasoning, content):
    for pieces in ([text], list(text), *([text[:cut], text[cut:]] for cut in range(len(text)))):
        got = parse(OutputParser(make_reasoning_parser("qwen3", inside)), *pieces)
        assert (got.reasoning, got.content) == (reasoning, content)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-thinking", "deepseek-r1"])
def test_names(name):
    assert parse(OutputParser(make_reasoning_parser(name, True)), "a</think>b").reasoning == "a"


def test_unknown_name():
    with pytest.raises(UsageError, match=r"reasoning parser 'o1'; known: qwen3 \(also qwen3-thinking, deepseek-r1\)"):
        make_reasoning_parser("o1", True)


@pytest.mark.parametrize("text, reasoning, content", [
    (f"think\n</think>\n\n{CALL}", "think", None), (f"think\n</think>\n\nok\n{CALL}\n", "think", "ok\n"),
    (f"think\n{CALL}", "think", None), (f"think\n{CALL}\n</think>\n", "think", None),
    (f"{CALL}\n</think>\n\nbye", None, "\n\nbye"),
    (f"<think>\nthink</think>\n</think>\n\n{CALL}", "think", None),
])
def test_with_tool_calls(text, reasoning, content):
    for pieces in ([text], list(text), *([text[:cut], text[cut:]] for cut in range(len(text)))):
        parser = OutputParser(make_reasoning_parser("qwen3", True), make_tool_parser("qwen3_coder",
        TOOLS, counted_ids()))
        got = parse(parser, *pieces)
        assert (got.reasoning, got.content) == (reasoning, content)
        assert [call.name for call in got.tool_calls] == ["list_files"]


def test_hermes_call_ends_the_reasoning():
    parser = OutputParser(make_reasoning_parser("qwen3", True), make_tool_parser("hermes", TOOLS))
    got = parse(parser, "so\n" + render_hermes("f", {"a": "</think>"}))
    assert got.reasoning == "so"
    assert json.loads(got.tool_calls[0].arguments) == {"a": "</think>"}


def test_neither_parser():
    assert parse(OutputParser(), "<think>", "</think>", "").content == "<think></think>"


def test_streams_as_it_comes():
    parser = OutputParser(make_reasoning_parser("qwen3", True))
    assert parser.feed("one ") == [Reasoning("one ")]
    assert parser.feed("two\n") == [Reasoning("two")]
    assert parser.feed("three</thi") == [Reasoning("\nthree")]
    assert parser.feed("nk>\n\nanswer ") == [Content("answer ")]
    assert parser.feed("goes on") == [Content("goes on")]
    assert parser.finish() == []
