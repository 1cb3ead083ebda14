"""Tool call parsers by the names that `--tool-call-parser` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcn_compile.errors import UsageError
from qcn_compile.runtime.parsing.hermes import HermesParser
from qcn_compile.runtime.parsing.qwen3_coder import Qwen3CoderParser
from qcn_compile.runtime.parsing.schema import ToolSchemas
from qcn_compile.runtime.parsing.tool_scanner import ToolScanner, random_call_id

TOOL_PARSERS: Mapping[str, tuple[str, ...]] = {
    "qwen3_coder": ("qwen_coder", "qwen3-coder", "qwen3coder"),
    "hermes": ("qwen", "qwen25", "qwen3"),
}
"""Canonical names and their aliases."""


def tool_parser_name(name: str) -> str:
    """The canonical name. Raises UsageError for one that is not known."""
    for canonical, aliases in TOOL_PARSERS.items():
        if name == canonical or name in aliases:
            return canonical
    known = "; ".join(f"{canonical} (also {', '.join(aliases)})" for canonical, aliases in TOOL_PARSERS.items())
    raise UsageError(f"unknown tool call parser {name!r}; known: {known}")


def make_tool_parser(name: str, tools: Sequence[Mapping[str, Any]] | None,
                     new_id: Callable[[], str] = random_call_id) -> ToolScanner:
    """A parser for one message, to be fed its text and then finished. `tools` as in an OpenAI or Anthropic request."""
    if tool_parser_name(name) == "hermes":
        return HermesParser(new_id)
    return Qwen3CoderParser(ToolSchemas(tools), new_id)
