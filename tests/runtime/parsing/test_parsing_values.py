"""Raw parameter text becomes the type that the schema allows, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from parsing_texts import parse, render_xml

from qcn_compile.runtime.parsing import OutputParser, make_tool_parser
from qcn_compile.runtime.parsing.schema import ALL, ToolSchemas
from qcn_compile.runtime.parsing.values import may_be_typed, to_json

DEFS = {"$defs": {"count": {"type": "integer"}, "loop": {"anyOf": [{"$ref": "#/$defs/loop"}, {"type": "boolean"}]},
                  "self": {"$ref": "#/$defs/self"}, "a/b": {"type": "array"},
                  "maybe": {"type": "number", "nullable": True}}}


def value_of(schema: Any, text: str) -> Any:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"x": schema}, **DEFS}}}]
    raw = render_xml("f", {"x": text})
    whole = parse(OutputParser(tools=make_tool_parser("qwen3_coder", tools, lambda: "id")), raw)
    assert parse(OutputParser(tools=make_tool_parser("qwen3_coder", tools, lambda: "id")), *raw) == whole
    return json.loads(whole.tool_calls[0].arguments)["x"]


def t(*names: str) -> dict[str, Any]:
    return {"type": names[0] if len(names) == 1 else list(names)}


@pytest.mark.parametrize("schema, text, want", [
    (t("string"), "42", "42"), (t("string"), "null", "null"), (t("string"), "true", "true"),
    (t("string"), '{"a": 1}', '{"a": 1}'), (t("string"), "&lt;", "&lt;"), (t("str"), "1", "1"),
    (t("varchar"), "1", "1"), ({"enum": ["1", "2"]}, "1", "1"), (t("integer"), "42", 42), (t("int32"), "-7", -7),
    (t("uint8"), " 5 ", 5), (t("integer"), "5.0", 5), (t("long"), "+3", 3), (t("integer"), "5.5", "5.5"),
    (t("integer"), "abc", "abc"), (t("integer"), "1_000", "1_000"), (t("integer"), "", ""),
    (t("integer"), "null", "null"), (t("integer"), "9" * 400, int("9" * 400)), (t("integer"), "9" * 9000, "9" * 9000),
    (t("number"), "1.5", 1.5), (t("number"), "5.0", 5), (t("float"), "2", 2), (t("double"), ".5", 0.5),
    (t("number"), "1e3", 1000), (t("number"), "NaN", "NaN"), (t("number"), "inf", "inf"),
    (t("number"), "1e999", "1e999"), (t("number"), "x", "x"), (t("boolean"), "true", True),
    (t("bool"), "False", False), (t("boolean"), "1", True), (t("boolean"), "0", False), (t("boolean"), "yes", "yes"),
    (t("boolean"), "", ""), (t("null"), "null", None), (t("null"), "x", "x"),
    (t("object"), '{"a": [1, null]}', {"a": [1, None]}), (t("dict"), "{'a': True}", {"a": True}),
    (t("object"), '{"a": "two\nlines"}', {"a": "two\nlines"}), (t("object"), "{a: 1}", "{a: 1}"),
    (t("object"), "[1]", "[1]"), (t("object"), '{"a": NaN}', '{"a": NaN}'),
    (t("object"), "{'a': 1e999}", "{'a': 1e999}"), (t("object"), "{" * 9999, "{" * 9999),
    (t("array"), '["a", {"b": 2}]', ["a", {"b": 2}]), (t("list"), "['a', None]", ["a", None]),
    (t("array"), "a, b", "a, b"), (t("array"), "[" * 5000, "[" * 5000), (t("array"), "[1, 2", "[1, 2"),
    (t("array"), "[__import__('os')]", "[__import__('os')]"), (t("string", "null"), "null", None),
    (t("string", "null"), "NULL", None), (t("string", "null"), "nul", "nul"),
    (t("string", "null"), "nullable", "nullable"), (t("string", "null"), "none", "none"),
    (t("integer", "null"), "None", None), (t("string", "integer"), "12", 12), (t("string", "integer"), "007", "007"),
    (t("string", "integer"), "5.0", "5.0"), (t("string", "integer"), "12a", "12a"), (t("string", "integer"), "-", "-"),
    (t("string", "number"), "1.0", 1.0), (t("string", "boolean"), "true", True),
    (t("string", "boolean"), "truer", "truer"), (t("string", "boolean"), "1", "1"), (t("boolean", "integer"), "1", 1),
    (t("number", "integer"), "1.5", 1.5), (t("string", "array"), '["a"]', ["a"]), (t("string", "array"), "[a]", "[a]"),
    (t("string", "object"), " {}", {}), (t("any"), "3", 3), (t("any"), "x", "x"), (t("whatever"), "3", "3"),
    ({}, "3", "3"), (True, "3", "3"), (None, "3", "3"), ({"type": 3}, "3", "3"),
    ({"anyOf": [t("integer"), t("null")]}, "null", None), ({"anyOf": [t("integer"), t("null")]}, "3", 3),
    ({"oneOf": [t("array"), t("string")]}, "[1]", [1]), ({"anyOf": [{"anyOf": [t("boolean")]}]}, "true", True),
    ({"allOf": [{"$ref": "#/$defs/count"}], "description": "d"}, "4", 4),
    ({"allOf": [t("number"), t("integer")]}, "4", 4),
    ({"allOf": [t("string", "integer"), t("integer", "null")]}, "x7", "x7"),
    ({"type": "integer", "nullable": True}, "null", None), ({"const": 3}, "3", 3), ({"const": None}, "null", None),
    ({"enum": [1, 2, None]}, "2", 2), ({"enum": [1, 2, None]}, "null", None), ({"enum": ["a", 1]}, "a", "a"),
    ({"enum": ["a", True]}, "true", True), ({"enum": [[1]]}, "[1]", [1]), ({"$ref": "#/$defs/count"}, "7", 7),
    ({"$ref": "#/$defs/loop"}, "true", True), ({"$ref": "#/$defs/self"}, "7", "7"),
    ({"$ref": "#/$defs/a~1b"}, "[7]", [7]), ({"$ref": "#/$defs/maybe"}, "null", None),
    ({"$ref": "#/$defs/gone"}, "7", "7"), ({"$ref": "https://x/y"}, "7", "7"), ({"$ref": "#"}, "{}", {}),
    ({"properties": {}}, "{}", {}), ({"items": {}}, "[]", []),
])
def test_value(schema, text, want):
    got = value_of(schema, text)
    assert got == want
    assert isinstance(got, bool) == isinstance(want, bool)


def test_a_decimal_keeps_its_digits():
    assert to_json("0.12345678901234567890", frozenset({"number"})) == "0.12345678901234567890"
    assert to_json("150.0", frozenset({"number"})) == "150"


def test_where_parameters_are_declared():
    root = {"$ref": "#/$defs/args", "$defs": {"args": {"allOf": [{"properties": {"n": t("integer")}}, {"$ref": "#"}]}}}
    schemas = ToolSchemas([{"name": "flat", "parameters": root}, {"name": "claude", "input_schema": {
        "properties": {"n": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}}}])
    assert schemas.types("flat", "n") == schemas.types("claude", "n") == {"integer"}
    assert schemas.types("claude", "other") == {"boolean"}
    assert schemas.types("flat", "other") == schemas.types("unknown", "n") == {"string"}
    assert schemas.declares("flat", "n") and not schemas.declares("flat", "m") and schemas.declares("unknown", "m")


@pytest.mark.parametrize("tools", [None, [], [3], [{}], [{"function": None}],
                                   [{"function": {"name": "f", "parameters": 3}}],
                                   [{"name": "f", "parameters": {"properties": [], "allOf": 3, "$ref": 3}}]])
def test_odd_tools(tools):
    assert ToolSchemas(tools).types("f", "x") == {"string"}


def test_a_branching_web_of_references_ends():
    defs = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(60)}
    tools = [{"name": "f", "parameters": {"properties": {"x": {"$ref": "#/$defs/d0"}},
                                          "$defs": {**defs, "d60": t("integer")}}}]
    assert ToolSchemas(tools).types("f", "x") in ({"integer"}, {"string"})


@pytest.mark.parametrize("text", ["null", "-12.5e3", "true", "007", "1.0", " 1 ", "x", "{}", "[]", "nul l",
                                  "1\u00a0", "\n1", "none"])
def test_what_is_settled_as_a_string_ends_as_one(text):
    kinds = [frozenset({kind, *extra}) for kind in ALL for extra in ((), ("string",))]
    for types in kinds:
        settled = [not may_be_typed(text[:size], types) for size in range(len(text) + 1)]
        assert settled == sorted(settled)
        if any(settled) or types == {"string"}:
            assert json.loads(to_json(text, types)) == text
