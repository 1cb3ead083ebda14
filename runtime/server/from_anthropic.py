"""Anthropic's requests as chat requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcn_compile.runtime.server.errors import bad_request, unsupported
from qcn_compile.runtime.server.prompts import flat_text
from qcn_compile.runtime.server.schema.chat import (
    ChatRequest,
    Function,
    FunctionCall,
    FunctionName,
    Message,
    NamedTool,
    Tool,
    ToolCall,
)
from qcn_compile.runtime.server.schema.messages import (
    AnthropicMessage,
    AnthropicTool,
    AnthropicToolChoice,
    Block,
    CountRequest,
    MessagesRequest,
)


def chat_request(body: CountRequest) -> ChatRequest:
    """The same request in the words of a chat."""
    messages = [] if body.system is None else [Message(role="system", content=flat_text(body.system, "system"))]
    for place, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{place}]")
    fields: dict[str, Any] = {"messages": messages, "tools": _tools(body.tools), **_choice(body.tool_choice)}
    if body.thinking is not None:
        fields["enable_thinking"] = body.thinking.type != "disabled"
    if isinstance(body, MessagesRequest):
        fields |= {"max_tokens": body.max_tokens, "temperature": body.temperature, "top_p": body.top_p,
                   "top_k": body.top_k, "stop": body.stop_sequences, "stream": body.stream}
    return ChatRequest(**fields)


def _messages(message: AnthropicMessage, param: str) -> list[Message]:
    """One message may be several: results of tools first, then what the user says."""
    if isinstance(message.content, str):
        return [Message(role=message.role, content=message.content)]
    results: list[Message] = []
    texts: list[Block] = []
    calls: list[ToolCall] = []
    thoughts: list[str] = []
    for place, block in enumerate(message.content):
        where = f"{param}.content[{place}]"
        if block.type == "tool_result":
            results.append(_result(block, where))
        elif block.type == "tool_use":
            calls.append(_call(block, where))
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type != "redacted_thinking":
            flat_text([block], f"{param}.content")
            texts.append(block)
    said = Message(role=message.role, content=flat_text(texts, f"{param}.content"), tool_calls=calls or None,
                   reasoning_content="\n".join(thoughts) or None)
    return [*results, said] if texts or calls or not results else results


def _result(block: Block, param: str) -> Message:
    if block.tool_use_id is None:
        raise bad_request(f"{param}.tool_use_id: missing", f"{param}.tool_use_id", "missing_required_parameter")
    return Message(role="tool", content=flat_text(block.content, f"{param}.content"), tool_call_id=block.tool_use_id)


def _call(block: Block, param: str) -> ToolCall:
    if block.name is None:
        raise bad_request(f"{param}.name: missing", f"{param}.name", "missing_required_parameter")
    return ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=block.input or {}))


def _tools(tools: Sequence[AnthropicTool] | None) -> list[Tool] | None:
    if tools is None:
        return None
    plain = []
    for place, tool in enumerate(tools):
        if tool.type not in (None, "custom"):
            raise unsupported(f"tools[{place}].type: tools that the server runs ({tool.type[:60]})",
                              f"tools[{place}].type")
        plain.append(Tool(function=Function(name=tool.name, description=tool.description,
                                            parameters=tool.input_schema)))
    return plain


def _choice(choice: AnthropicToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    if choice.type == "tool" and choice.name is None:
        raise bad_request("tool_choice.name: missing", "tool_choice.name", "missing_required_parameter")
    names = {"auto": "auto", "any": "required", "none": "none"}
    value = names.get(choice.type) or NamedTool(function=FunctionName(name=choice.name or ""))
    return {"tool_choice": value, "parallel_tool_calls": not choice.disable_parallel_tool_use}
