"""Grammars of tool calls: what `tool_choice` required or named, and `strict`, demand of the model's own format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qcn_compile.runtime.server.config import Limits
from qcn_compile.runtime.server.errors import bad_request
from qcn_compile.runtime.server.grammar import Grammar, check_schema, json_rule, quoted, require
from qcn_compile.runtime.server.schema.chat import Function
from qcn_compile.runtime.server.schema.common import JsonObject

Tag = Callable[[str], str]
_TEXT_VALUE = 'text[suffix="\\n</parameter>\\n"]: /(.|\\n)*/\n'
_DEFINITIONS = ("$defs", "definitions")


def tool_grammar(functions: Sequence[Function], parser: str, tag: Tag, limits: Limits, *, parallel: bool, param: str,
                 otherwise: Grammar | None = None) -> Grammar:
    """One call or, when `parallel`, several; or, with `otherwise`, an answer of that grammar."""
    require(param)
    for place, function in enumerate(functions):
        check_schema(function.parameters or {}, limits, f"tools[{place}].function.parameters")
    rules = _hermes_rules(functions) if parser == "hermes" else _coder_rules(functions)
    names = " | ".join(f"f{place}" for place in range(len(functions)))
    call = f"call: {tag('<tool_call>')} \"\\n\" ({names}) {tag('</tool_call>')}\n"
    calls = 'calls: call ("\\n" call)*\n' if parallel else "calls: call\n"
    if otherwise is None:
        return Grammar("calls", param, calls + call + rules)
    return Grammar("calls | other", param, f"{calls}{call}{rules}other: {otherwise.answer}\n{otherwise.rules}")


def free_text(param: str) -> Grammar:
    """Any text without the model's own tags, and calls after it."""
    return Grammar("TEXT calls?", param, "TEXT: /(.|\\n)*/\n")


def _hermes_rules(functions: Sequence[Function]) -> str:
    rules = []
    for place, function in enumerate(functions):
        schema = _root(function)
        inner = {key: schema.pop(key) for key in _DEFINITIONS if key in schema}
        whole = {"type": "object", "properties": {"name": {"const": function.name}, "arguments": schema}, **inner,
                 "required": ["name", "arguments"], "additionalProperties": False}
        rules.append(f'f{place}: {json_rule(whole)} "\\n"\n')
    return "".join(rules)


def _coder_rules(functions: Sequence[Function]) -> str:
    rules = [_TEXT_VALUE]
    for place, function in enumerate(functions):
        schema = _root(function)
        properties = schema.get("properties") or {}
        required = schema.get("required") or []
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise bad_request(f"tools: {function.name}: properties must be an object and required a list", "tools")
        parts = [f"p{place}_{i}" if key in required else f"p{place}_{i}?" for i, key in enumerate(properties)]
        if not properties and schema.get("additionalProperties") is not False:
            parts.append('("<parameter=" /[A-Za-z_][A-Za-z0-9_]*/ ">\\n" text)*')
        body = "".join(f" {part}" for part in parts)
        rules.append(f"f{place}: {quoted(f'<function={function.name}>' + chr(10))}{body} \"</function>\\n\"\n")
        for i, (key, value) in enumerate(properties.items()):
            rules.append(f"p{place}_{i}: {quoted(f'<parameter={key}>' + chr(10))} {_value(value, schema)}\n")
    return "".join(rules)


def _value(schema: Any, root: JsonObject) -> str:
    """The rule of a raw value: text where the schema allows a string, else JSON."""
    end = quoted("\n</parameter>\n")
    if not isinstance(schema, dict):
        return "text"
    choices = schema.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
        return "(" + " | ".join(map(quoted, choices)) + f") {end}"
    if isinstance(schema.get("const"), str):
        return f"{quoted(schema['const'])} {end}"
    if _may_be_text(schema, root, 0):
        return "text"
    definitions = {key: root[key] for key in _DEFINITIONS if key in root}
    return f"{json_rule({**schema, **definitions})} {end}"


def _may_be_text(schema: Any, root: JsonObject, level: int) -> bool:
    if not isinstance(schema, dict) or level > 8:
        return True
    kinds = schema.get("type")
    if kinds is not None:
        return "string" in (kinds if isinstance(kinds, list) else [kinds])
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list):
            return any(_may_be_text(part, root, level + 1) for part in schema[key])
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for step in reference[2:].split("/"):
            target = target.get(step) if isinstance(target, dict) else None
        return _may_be_text(target, root, level + 1)
    if "properties" in schema or "items" in schema:
        return False
    return "enum" not in schema and "const" not in schema


def _root(function: Function) -> JsonObject:
    return dict(function.parameters or {"type": "object", "properties": {}})
