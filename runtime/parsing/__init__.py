"""The model's text to content, reasoning and tool calls, while it is written."""

from qcn_compile.runtime.parsing.pipeline import OutputParser, ParsedMessage, ToolCall, collect
from qcn_compile.runtime.parsing.reasoning import REASONING_PARSERS, make_reasoning_parser
from qcn_compile.runtime.parsing.tool_calls import TOOL_PARSERS, make_tool_parser, tool_parser_name

__all__ = [
    "OutputParser",
    "ParsedMessage",
    "REASONING_PARSERS",
    "TOOL_PARSERS",
    "ToolCall",
    "collect",
    "make_reasoning_parser",
    "make_tool_parser",
    "tool_parser_name",
]
