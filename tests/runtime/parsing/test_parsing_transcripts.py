"""Real tool calls, rendered by the real chat template and parsed back."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from parsing_texts import counted_ids, parse, render_hermes

import qcn_compile
from qcn_compile.runtime.chat import ChatTemplate
from qcn_compile.runtime.parsing import OutputParser, make_tool_parser

ROOT = Path(qcn_compile.__file__).parent
MESSAGES = [json.loads(line) for line in
            (ROOT.parent / "tests/data/tau_bench_tool_calls.jsonl").read_text(encoding="utf-8").splitlines()]
TYPES = {str: "string", int: "integer", float: "number", list: "array", dict: "object", bool: "boolean"}


@cache
def template() -> ChatTemplate:
    source = ROOT / "assets" / "tiny-coder" / "chat_template.jinja"
    return ChatTemplate(source.read_text(encoding="utf-8"), {})


def tools() -> list[dict[str, Any]]:
    """Schemas by the arguments seen; the transcripts do not carry the tools themselves."""
    seen: dict[str, dict[str, set[str]]] = {}
    for message in MESSAGES:
        for call in message["tool_calls"]:
            parameters = seen.setdefault(call["name"], {})
            for key, value in call["arguments"].items():
                parameters.setdefault(key, set()).add(TYPES[type(value)])
    return [{"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {key: {"type": sorted(types)} for key, types in parameters.items()}}}}
        for name, parameters in seen.items()]


def rendered(message: dict[str, Any]) -> str:
    """What the model would have written to say this."""
    turns = [{"role": "user", "content": "u"},
             {"role": "assistant", "content": message["content"],
              "tool_calls": [{"type": "function", "function": call} for call in message["tool_calls"]]}]
    text = template().render(turns, tools(), add_generation_prompt=False)
    return text.rsplit("<|im_start|>assistant\n", 1)[1].removesuffix("<|im_end|>\n")


def as_hermes(message: dict[str, Any]) -> str:
    calls = [render_hermes(call["name"], call["arguments"]) for call in message["tool_calls"]]
    return "\n".join([(message["content"] or "").strip(), *calls])


def parser(name: str) -> OutputParser:
    return OutputParser(tools=make_tool_parser(name, tools(), counted_ids()))


@pytest.mark.parametrize("name", ["qwen3_coder", "hermes"])
def test_round_trip(name):
    rng = random.Random(3)
    assert len(MESSAGES) > 100
    for message in MESSAGES:
        text = rendered(message) if name == "qwen3_coder" else as_hermes(message)
        got = parse(parser(name), text)
        assert [{"name": call.name, "arguments": json.loads(call.arguments)} for call in got.tool_calls] \
            == message["tool_calls"], text
        assert (got.content or "").strip() == (message["content"] or "").strip()
        assert parse(parser(name), *text) == got
        for cut in rng.sample(range(len(text)), min(40, len(text))):
            assert parse(parser(name), text[:cut], text[cut:]) == got
