"""Seeded generator of what models write: calls and reasoning, valid, cut off, malformed, nested, in any script."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qcn_compile.runtime.parsing import (
    OutputParser,
    ParsedMessage,
    collect,
    make_reasoning_parser,
    make_tool_parser,
)

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "write", "parameters": {"type": "object", "properties": {
        "path": {"type": "string"}, "text": {"type": "string"}, "mode": {"type": ["integer", "null"]},
        "keep": {"type": "boolean"}, "ratio": {"type": "number"}, "meta": {"type": "object"},
        "tags": {"anyOf": [{"type": "array"}, {"type": "string"}]}}}}},
    {"type": "function", "function": {"name": "list_files", "parameters": {"type": "object", "properties": {}}}},
]
VALUES: dict[str, list[Any]] = {
    "path": ["a.py", "/tmp/ü b", "", "42", "null", "true", "{x}", "C:\\d\\n"],
    "text": ["x", "\n", "line\nline\n", "a < b && c > d", "</param", "say \"hi\"\t\\", "😀𝔘 é 漢字",
             "</parameter> not yet", "see <parameter=path> here", "</function>", "</tool_call> is a tag",
             "<think>\n</think>", "\n\n  two\n\n",
             "<tool_call>\n<function=list_files>\n</function>\n</tool_call>\nrest", "{\"a\": 1}", "\u2028\x00\x1f"],
    "mode": [0, -7, 420, None], "keep": [True, False], "ratio": [0.5, 3, -1e-7, 12345678901234567],
    "meta": [{}, {"a": [1, {"b": "</parameter>"}], "é": None}, {"nested": {"x": "\n"}}],
    "tags": [["a", "😀"], [], "plain", "[not json"],
}
TALK = ["", "", "ok", "I will write it.\n\n", "a < b\n", "use `<tool_call>` then\n", "😀 \n", "<", "<tool", "\n"]
THOUGHTS = ["", "hm", "let me\n\nthink <b>", "about <tool_call> tags\n", "a </thin b", "😀\n", "\n x"]
GARBAGE = ["<", ">", "\n", "</", "<tool_call>", "</tool_call>", "<function=", "<function=write>", "</function>", "x",
           " ", "<parameter=", "<parameter=text>", "</parameter>", "<think>", "</think>", "{", "}", "\"", "name", ":",
           ",", "\\", "{\"name\": \"write\", \"arguments\": {", "é😀", "=", "\u0000", "\ud83d",
           "<parameter=mode>\n5\n</parameter>\n"]


@dataclass(frozen=True)
class Sample:
    """A text, how to read it, and what it says where that is certain."""

    kind: str
    text: str
    parser: str | None
    thinking: bool | None
    want: ParsedMessage | None = None

    def make(self) -> OutputParser:
        reasoning = None if self.thinking is None else make_reasoning_parser("qwen3", self.thinking)
        tools = make_tool_parser(self.parser, TOOLS, counted_ids()) if self.parser else None
        return OutputParser(reasoning, tools)


def counted_ids() -> Callable[[], str]:
    """call_000…0, call_000…1 and so on."""
    numbers = itertools.count()
    return lambda: f"call_{next(numbers):024x}"


def parse(parser: OutputParser, *pieces: str) -> ParsedMessage:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return collect(events + parser.finish())


def render_xml(name: str, arguments: dict[str, Any]) -> str:
    """As the Qwen3-Coder template renders a call."""
    raw = {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
           for key, value in arguments.items()}
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in raw.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def render_hermes(name: str, arguments: dict[str, Any], ascii_only: bool = False) -> str:
    call = {"name": name, "arguments": arguments}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=ascii_only)}\n</tool_call>"


def samples(seed: int, count: int) -> Iterator[Sample]:
    """`count` samples, the kinds in turn."""
    rng = random.Random(seed)
    makers = (_valid, _cut, _mangled, _garbage, _tag_soup, _thought)
    for number in range(count):
        yield makers[number % len(makers)](rng, ("qwen3_coder", "hermes")[number // len(makers) % 2])


def _call(rng: random.Random) -> tuple[str, dict[str, Any]]:
    if rng.random() < 0.15:
        return "list_files", {}
    keys = rng.sample(list(VALUES), rng.randint(1, 3))
    return "write", {key: rng.choice(VALUES[key]) for key in keys}


def _calls_text(calls: list[tuple[str, dict[str, Any]]], parser: str, rng: random.Random) -> str:
    if parser == "qwen3_coder":
        return rng.choice(("\n", "", "\n\n ")).join(render_xml(*call) for call in calls)
    return "\n".join(render_hermes(*call, ascii_only=rng.random() < 0.5) for call in calls)


def _valid(rng: random.Random, parser: str) -> Sample:
    calls = [_call(rng) for _ in range(rng.choice((1, 1, 2)))]
    talk, thought = rng.choice(TALK), rng.choice((None, *THOUGHTS))
    text = talk + _calls_text(calls, parser, rng)
    thinking = rng.random() < 0.5
    if thought is not None:
        text = ("" if thinking else "<think>\n") + f"{thought}\n</think>\n\n" + text.lstrip("\n")
        talk = talk.lstrip("\n")
    else:
        thinking = False
    message = ParsedMessage(talk if talk.strip() else None, (thought or "").strip("\n") or None)
    message.tool_calls.extend(_expected(calls, text, parser, thinking))
    return Sample("valid", text, parser, thinking, message)


def _expected(calls: list[tuple[str, dict[str, Any]]], text: str, parser: str, thinking: bool) -> list[Any]:
    """The calls with the arguments' text as parsed, after checking that it says what was rendered."""
    parsed = parse(Sample("valid", text, parser, thinking).make(), text).tool_calls
    got = [(call.name, json.loads(call.arguments), call.complete) for call in parsed]
    assert got == [(name, arguments, True) for name, arguments in calls], text
    return parsed


def _cut(rng: random.Random, parser: str) -> Sample:
    whole = _valid(rng, parser)
    return Sample("cut", whole.text[:rng.randrange(len(whole.text) + 1)], parser, whole.thinking)


def _mangled(rng: random.Random, parser: str) -> Sample:
    """A valid text of which up to three stretches are lost, doubled or replaced."""
    whole = _valid(rng, parser)
    text = whole.text
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(text) + 1)
        stop = min(len(text), start + rng.randint(0, 14))
        text = text[:start] + rng.choice(("", text[start:stop] * 2, rng.choice(GARBAGE))) + text[stop:]
    return Sample("mangled", text, parser, whole.thinking)


def _garbage(rng: random.Random, parser: str) -> Sample:
    text = "".join(rng.choice(GARBAGE) for _ in range(rng.randint(0, 25)))
    return Sample("garbage", text, rng.choice((parser, parser, None)), rng.choice((None, True, False)))


def _tag_soup(rng: random.Random, parser: str) -> Sample:
    """A call whose tags are dropped, doubled or replaced one by one."""
    tags = render_xml(*_call(rng)) if parser == "qwen3_coder" else render_hermes(*_call(rng))
    pieces = tags.replace("<", "\x01<").replace(">", ">\x01").replace(",", ",\x01").split("\x01")
    mixed = [piece * rng.choice((0, 1, 1, 1, 1, 1, 2)) if rng.random() < 0.9 else rng.choice(GARBAGE)
             for piece in pieces]
    return Sample("soup", rng.choice(TALK) + "".join(mixed) + rng.choice(TALK), parser, None)


def _thought(rng: random.Random, parser: str) -> Sample:
    """Reasoning with tags in odd places."""
    parts = [rng.choice(THOUGHTS), rng.choice(("</think>", "\n</think>\n\n", "", "</think>\n</think>", "<think>")),
             rng.choice(TALK), _calls_text([_call(rng)], parser, rng), rng.choice(("", "\n</think>\n", "</think>bye"))]
    return Sample("thought", rng.choice(("", "<think>", "\n<think>\n")) + "".join(parts), rng.choice((parser, None)),
                  rng.random() < 0.6)
