"""Tool calls by hand: how arguments stream, and what broken output becomes."""

from __future__ import annotations

import json
import random
import re
import time

import pytest
from parsing_texts import TOOLS, Sample, counted_ids, parse, render_hermes, render_xml

from qcn_compile.errors import UsageError
from qcn_compile.runtime.parsing import OutputParser, collect, make_tool_parser
from qcn_compile.runtime.parsing.events import Event, ToolCallArguments, ToolCallFinished, ToolCallStarted


def message(text: str, parser: str = "qwen3_coder"):
    return parse(Sample("", text, parser, None).make(), *text)


def calls(text: str, parser: str = "qwen3_coder") -> list[tuple[str, dict]]:
    return [(call.name, json.loads(call.arguments)) for call in message(text, parser).tool_calls]


def stream(parser: OutputParser, text: str, size: int) -> list[Event]:
    events = [event for start in range(0, len(text), size) for event in parser.feed(text[start:start + size])]
    return events + parser.finish()


@pytest.mark.parametrize("name", ["qwen3_coder", "qwen_coder", "qwen3-coder", "qwen3coder"])
def test_names_of_the_xml_format(name):
    assert calls(render_xml("write", {"path": "a"}), name) == [("write", {"path": "a"})]


@pytest.mark.parametrize("name", ["hermes", "qwen", "qwen25", "qwen3"])
def test_names_of_the_json_format(name):
    assert calls(render_hermes("write", {"path": "a"}), name) == [("write", {"path": "a"})]


def test_unknown_name():
    with pytest.raises(UsageError, match=r"unknown tool call parser 'llama'; known: qwen3_coder \(also qwen_coder, .*"
                                         r"hermes \(also qwen, qwen25, qwen3\)"):
        make_tool_parser("llama", [])


def test_ids():
    parser = make_tool_parser("hermes", TOOLS)
    made = collect(parser.feed(render_hermes("a", {}) + render_hermes("b", {})) + parser.finish()).tool_calls
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", call.id) for call in made)
    assert made[0].id != made[1].id


@pytest.mark.parametrize("name", ["qwen3_coder", "hermes"])
def test_a_long_string_streams_as_it_comes(name):
    value = "".join(f"line {number} <b> \\ \"q\"\n" for number in range(200))
    render = render_xml if name == "qwen3_coder" else render_hermes
    parser = OutputParser(tools=make_tool_parser(name, TOOLS, counted_ids()))
    text = render("write", {"text": value, "path": "p"})
    told = fed = 0
    for start in range(0, len(text), 4):
        fed += 4
        told += sum(len(event.text) for event in parser.feed(text[start:start + 4])
                    if isinstance(event, ToolCallArguments))
        if 80 < fed < len(text) - 80:
            assert told >= fed - 80  # tags and the little that is held back
    assert parse(OutputParser(tools=make_tool_parser(name, TOOLS)), text).tool_calls[0].complete


def test_the_first_event_is_the_name():
    parser = OutputParser(tools=make_tool_parser("qwen3_coder", TOOLS, counted_ids()))
    events = stream(parser, render_xml("write", {"path": "abc", "mode": 7}), 1)
    assert events[0] == ToolCallStarted(0, f"call_{0:024x}", "write")
    assert "".join(event.text for event in events[1:-1]) == '{"path": "abc", "mode": 7}'
    assert events[-1] == ToolCallFinished(0, complete=True)


def test_one_newline_on_each_side_is_markup():
    for value in ("", "\n", "\n\n", "a\n", "\na", " a "):
        assert calls(render_xml("write", {"text": value})) == [("write", {"text": value})]
    assert calls("<tool_call><function=write><parameter=text>a</parameter></function></tool_call>") \
        == [("write", {"text": "a"})]


@pytest.mark.parametrize("value", [
    "x</parameter>y", "a\n</parameter>\nb", "</function> and </tool_call> end a call", "<parameter=text>\n1",
    "<function=", "<tool_call>", "print('<tool_call><function=write>')", "\n<parameter=other>\nx",
    render_xml("list_files", {}), f"Example:\n{render_xml('write', {'path': 'x', 'mode': 3})}\nEnd",
    f"{render_xml('write', {'path': 'x'})}\n{render_xml('write', {'text': 'y'})}\n",
])
def test_tags_inside_a_string(value):
    text = render_xml("write", {"text": value, "mode": 1})
    assert calls(text) == [("write", {"text": value, "mode": 1})]
    assert message(f"ok\n{text}\n").content == "ok\n"
    assert calls(render_hermes("write", {"text": value}), "hermes") == [("write", {"text": value})]


def test_an_unfinished_call_inside_a_string():
    value = "<tool_call>\n<function=write>\n<parameter=path>\nx"
    assert calls(render_xml("write", {"text": value})) == [("write", {"text": value})]


HEAD, ARGUMENT = "<tool_call>\n<function=write>\n", "<parameter=path>\na\n</parameter>\n"


@pytest.mark.parametrize("text", [
    HEAD + ARGUMENT + "</function>",
    HEAD + ARGUMENT + "</tool_call>",
    HEAD + ARGUMENT,
    HEAD + "<parameter=path>\na\n</function>\n</tool_call>",
    HEAD + "<parameter=path>\na\n</tool_call>",
    HEAD + "<parameter=path>\na",
    HEAD + ARGUMENT + "</function>\n</tool_c",
    HEAD + ARGUMENT + "</func",
    HEAD + ARGUMENT + "<parameter=te",
    "<function=write>\n" + ARGUMENT + "</function>\n</tool_call>",
    "<function=write>\n" + ARGUMENT + "</function>",
    "<tool_call>\n<tool_call>\n<function=write>\n" + ARGUMENT + "</function>\n</tool_call>",
    "<tool_call>\n<function=write\n" + ARGUMENT + "</function>\n</tool_call>",
    "<tool_call>\n<function = \"write\" >\n" + ARGUMENT + "</function>\n</tool_call>",
    HEAD + "< parameter = path >\na\n</parameter>\n</function>\n</tool_call>",
    HEAD + "<parameter=path\na\n</parameter>\n</function>\n</tool_call>",
    "<tool_call><function=write><parameter=path>a</parameter></function></tool_call>",
])
def test_recovered(text):
    got = message(text)
    assert [(call.name, json.loads(call.arguments)) for call in got.tool_calls] == [("write", {"path": "a"})]
    assert got.content is None


@pytest.mark.parametrize("text", [
    HEAD + ARGUMENT + "<tool_call>\n<function=list_files>\n</function>\n</tool_call>",
    HEAD + ARGUMENT + "</function>\n<function=list_files>\n</function>\n</tool_call>",
    HEAD + ARGUMENT + "</function>\n</tool_call>\n\n<function=list_files>\n</function>",
    HEAD + "<parameter=path>\na\n</function>\n</tool_call>\n<tool_call>\n<function=list_files>\n</function>",
    HEAD + ARGUMENT + "</tool_call><tool_call><function=list_files></tool_call>",
])
def test_a_second_call_after_a_broken_one(text):
    assert calls(text) == [("write", {"path": "a"}), ("list_files", {})]
    assert message(text).content is None


def test_a_missing_end_of_a_parameter():
    text = HEAD + "<parameter=path>\na\n<parameter=text>\nb\n</parameter>\n</function>\n</tool_call>"
    assert calls(text) == [("write", {"path": "a", "text": "b"})]


@pytest.mark.parametrize("text", [
    "<tool_call> starts a call", "see <function=write> there", "<function=unknown>\n</function>", "a < b <t",
    "<tool_call>\n<function=>\n</function>\n</tool_call>", "<tool_call>\n<function=write>\n{\"path\": 1}\n</function>",
    "<tool_call>\n{\"name\": \"write\"}\n</tool_call>", "</tool_call>\n</function></parameter>", "<tool_call>", "\n \n",
])
def test_what_is_no_call_is_content(text):
    assert message(text).content == text
    assert not message(text).tool_calls


@pytest.mark.parametrize("text", [
    "<tool_call>\n{\"name\": \"f\", \"arguments\": [1]}\n</tool_call>", "<tool_call>\n{\"name\": 3, \"arguments\": {}}",
    "<tool_call>\n{\"arguments\": {}}\n</tool_call>", "<tool_call>\n{'name': 'f'}\n</tool_call>",
    "<tool_call>{\"name\"", "<tool_call>\n{\"name\": \"\", \"arguments\": {}}\n</tool_call>",
    "<tool_call>\n{\"name\": \"f\", \"arguments\": \"not json\"}", "<tool_call> is a tag", "[{\"name\": \"f\"}]",
])
def test_what_is_no_json_call_is_content(text):
    assert message(text, "hermes").content == text
    assert not message(text, "hermes").tool_calls


@pytest.mark.parametrize("text, arguments", [
    ('{"arguments": {"a": [1, {"b": "}"}]}, "name": "f"}', {"a": [1, {"b": "}"}]}),
    ('{"name": "f", "arguments": "{\\"a\\": 1}"}', {"a": 1}),
    ('{"name": "f"}', {}), ('{"name": "f", "arguments": null}', {}), ('{"name":"f","arguments":{}}', {}),
    ('{"id": 7, "type": "function", "name": "f", "arguments": {"a": -1.5e3}, "x": [{}]}', {"a": -1500.0}),
    ('{"name": "f", "arguments": {"a": "two\nlines"}}', {"a": "two\nlines"}),
    ('{"name": "f", "arguments": {"a": "\\ud83d\\ude00"}}', {"a": "😀"}),
    ('{"name": "f", "arguments": {"name": "g", "arguments": {"a": 1}}}', {"name": "g", "arguments": {"a": 1}}),
])
def test_json_wrappers(text, arguments):
    got = message(f"<tool_call>\n{text}\n</tool_call>\n", "hermes")
    assert [(call.name, json.loads(call.arguments), call.complete) for call in got.tool_calls] == [("f", arguments,
    True)]
    assert got.content is None


def test_broken_json_after_the_arguments_began():
    got = message('<tool_call>\n{"name": "f", "arguments": {"a": [1, "x"], "b": oops}}\n</tool_call>', "hermes")
    assert [(call.arguments, call.complete) for call in got.tool_calls] == [('{"a": [1, "x"]}', False)]
    assert got.content == ', "b": oops}}\n'


@pytest.mark.parametrize("inside", ['"x', '"x\\', '"x\\u00', "12", "tr", '[1, {"k', '[1, {"k":', "[1,", "-"])
def test_cut_off_json_is_closed(inside):
    got = message(f'<tool_call>\n{{"name": "f", "arguments": {{"a": {inside}', "hermes")
    assert got.content is None
    assert isinstance(json.loads(got.tool_calls[0].arguments), dict)
    assert not got.tool_calls[0].complete


def test_a_missing_brace_after_the_arguments():
    got = message('<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>\nbye', "hermes")
    assert [(call.arguments, call.complete) for call in got.tool_calls] == [('{"a": 1}', True)]
    assert got.content == "\nbye"


def test_text_around_calls():
    call = render_xml("list_files", {})
    assert message(f"before\n\n{call}\n{call}\n\nafter\n").content == "before\n\n\n\nafter\n"
    assert message(f"\n{call}\n \n{call}\n").content is None
    assert len(message(f"x{call}y{call}z").tool_calls) == 2
    assert message(f"x{call}y{call}z").content == "xyz"


def test_a_parameter_without_name_is_content():
    got = message(HEAD + ARGUMENT + "<parameter=>\nx\n</parameter>\n<parameter=mode>\n1\n</parameter>\n</function>")
    assert got.content == "\n<parameter=>\nx\n</parameter>"
    assert json.loads(got.tool_calls[0].arguments) == {"path": "a", "mode": 1}


def test_without_tools_any_name_is_a_call():
    parser = OutputParser(tools=make_tool_parser("qwen3_coder", None))
    got = parse(parser, "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>")
    assert got.tool_calls[0].arguments == '{"a": "1"}'


@pytest.mark.parametrize("name", ["qwen3_coder", "hermes"])
def test_noise_is_never_lost(name):
    rng = random.Random(11)
    tags = ["<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>", "{", '"name"',
            "}", "<", "write", ">", "\n", " ", ":", '"f"', "\\"]
    for _ in range(3000):
        raw = rng.randbytes(rng.randint(0, 30)).decode("utf-8", "replace")
        text = "".join(rng.choice((*tags, raw[:3], "é")) for _ in range(rng.randint(0, 20)))
        got = parse(Sample("", text, name, None).make(), text)
        if not got.tool_calls:
            assert (got.content or "") == text


@pytest.mark.parametrize("name, unit", [
    ("qwen3_coder", "word <b> \\ \"\n"), ("qwen3_coder", "<"), ("qwen3_coder", "\n"), ("qwen3_coder", "</parameter>"),
    ("hermes", "word <b> \\ \"\n"), ("hermes", "x"),
])
def test_a_megabyte_takes_seconds(name, unit):
    value = unit * (1_000_000 // len(unit))
    text = render_xml("write", {"text": value}) if name == "qwen3_coder" else render_hermes("write", {"text": value})
    begin = time.perf_counter()
    got = collect(stream(OutputParser(tools=make_tool_parser(name, TOOLS)), text, 4))
    assert json.loads(got.tool_calls[0].arguments) == {"text": value}
    assert time.perf_counter() - begin < 120  # work that grows with the square takes hours


@pytest.mark.parametrize("text", [
    "\n" * 500_000, "<tool_call>\n" * 40_000, "<tool_call>{\"name\": \"" + "x" * 500_000, HEAD + "\n" * 500_000,
    HEAD + "<parameter=tags>\n[" + "1, " * 150_000 + "1]\n</parameter>\n</function>\n</tool_call>",
    HEAD + "<parameter=mode>\n" + "1" * 500_000, "<function=" * 50_000, "<tool_call>{" * 50_000,
])
@pytest.mark.parametrize("name", ["qwen3_coder", "hermes"])
def test_nothing_is_quadratic(name, text):
    begin = time.perf_counter()
    stream(OutputParser(tools=make_tool_parser(name, TOOLS)), text, 4)
    assert time.perf_counter() - begin < 120  # work that grows with the square takes hours
