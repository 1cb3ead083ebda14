"""Requests of /v1/responses as chat requests."""

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
from qcn_compile.runtime.server.schema.common import JsonSchema, ResponseFormat
from qcn_compile.runtime.server.schema.responses import (
    InputItem,
    ResponsesRequest,
    ResponsesTool,
    ResponsesToolChoice,
    TextOptions,
)


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """The same request in the words of a chat."""
    for name in ("previous_response_id", "conversation"):
        if getattr(body, name) is not None:
            raise unsupported(f"{name}: answers are not stored; send the whole conversation as input", name)
    if body.background:
        raise unsupported("background: read the answer as it comes, with stream", "background")
    messages = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    messages += [Message(role="user", content=body.input)] if isinstance(body.input, str) else _items(body.input)
    if not messages or not body.input:
        raise bad_request("input: empty", "input")
    return ChatRequest(
        messages=messages, tools=_tools(body.tools), tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls, max_tokens=body.max_output_tokens, temperature=body.temperature,
        top_p=body.top_p, stream=body.stream, response_format=_format(body.text),
        logprobs=body.top_logprobs is not None, top_logprobs=body.top_logprobs,
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort)


def _items(items: Sequence[InputItem]) -> list[Message]:
    """Items as messages: an assistant's thoughts, text and calls that follow one another are one message."""
    messages: list[Message] = []
    for place, item in enumerate(items):
        message = _item(item, f"input[{place}]")
        last = messages[-1] if messages else None
        if last is not None and last.role == message.role == "assistant" and _continues(last, message):
            messages[-1] = _joined(last, message)
        else:
            messages.append(message)
    return messages


def _item(item: InputItem, param: str) -> Message:
    if item.type == "message":
        if item.role is None:
            raise bad_request(f"{param}.role: missing", f"{param}.role", "missing_required_parameter")
        return Message(role=item.role, content=flat_text(item.content, f"{param}.content"))
    if item.type == "function_call":
        if item.name is None:
            raise bad_request(f"{param}.name: missing", f"{param}.name", "missing_required_parameter")
        function = FunctionCall(name=item.name, arguments=item.arguments)
        return Message(role="assistant", tool_calls=[ToolCall(id=item.call_id, function=function)])
    if item.type == "function_call_output":
        output = flat_text(item.output, f"{param}.output")
        return Message(role="tool", content=output, tool_call_id=item.call_id)
    if item.type == "reasoning":
        parts = item.content if isinstance(item.content, list) else item.summary
        return Message(role="assistant", reasoning_content=flat_text(parts, f"{param}.content"))
    raise unsupported(f"{param}.type: {item.type[:60]!r}; use message, function_call, function_call_output "
                      "or reasoning", f"{param}.type")


def _continues(last: Message, message: Message) -> bool:
    """Whether a message is the next part of the same turn: thoughts, then text, then calls."""
    if message.tool_calls:
        return True
    return not last.tool_calls and not last.content and bool(message.content)


def _joined(last: Message, message: Message) -> Message:
    calls = [*(last.tool_calls or []), *(message.tool_calls or [])]
    return Message(role="assistant", content=last.content or message.content, tool_calls=calls or None,
                   reasoning_content=last.reasoning_content or message.reasoning_content)


def _tools(tools: Sequence[ResponsesTool] | None) -> list[Tool] | None:
    if tools is None:
        return None
    plain = []
    for place, tool in enumerate(tools):
        if tool.type != "function":
            raise unsupported(f"tools[{place}].type: {tool.type[:60]!r}; only functions, which the client runs",
                              f"tools[{place}].type")
        if tool.name is None:
            raise bad_request(f"tools[{place}].name: missing", f"tools[{place}].name", "missing_required_parameter")
        plain.append(Tool(function=Function(name=tool.name, description=tool.description, parameters=tool.parameters,
                                            strict=tool.strict)))
    return plain


def _choice(choice: Any) -> Any:
    if not isinstance(choice, ResponsesToolChoice):
        return choice
    if choice.type != "function" or choice.name is None:
        raise unsupported(f"tool_choice.type: {choice.type[:60]!r}; use auto, none, required, or a function "
                          "with its name", "tool_choice")
    return NamedTool(function=FunctionName(name=choice.name))


def _format(text: TextOptions | None) -> ResponseFormat | None:
    if text is None or text.format is None:
        return None
    if text.format.type != "json_schema":
        return ResponseFormat(type=text.format.type)
    if text.format.schema_ is None:
        raise bad_request("text.format.schema: missing", "text.format.schema", "missing_required_parameter")
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=text.format.schema_))
