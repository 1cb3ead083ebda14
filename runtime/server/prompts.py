"""Conversations as templates want them: flat text, one system message, arguments as objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qcn_compile.errors import UsageError
from qcn_compile.runtime.server.errors import bad_request, unsupported
from qcn_compile.runtime.server.schema.chat import ContentPart, Message, Tool, ToolCall
from qcn_compile.runtime.server.schema.common import JsonObject

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "self"})
_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text"})
_IMAGE_PARTS = {"image_url": "images", "input_image": "images", "image": "images", "input_audio": "audio",
                "file": "files", "input_file": "files", "document": "documents", "video_url": "video"}


class Part(Protocol):
    """A part of a message of any API."""

    type: str
    text: str | None


class Template(Protocol):
    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
               add_generation_prompt: bool = True, **variables: Any) -> str: ...


def flat_text(content: str | Sequence[Part] | None, param: str) -> str:
    """Content as one string; parts on lines of their own."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_part_text(part, f"{param}[{place}]") for place, part in enumerate(content))


def _part_text(part: Part, param: str) -> str:
    if part.type in _IMAGE_PARTS:
        raise unsupported(f"{param}: this model reads text only, no {_IMAGE_PARTS[part.type]}", f"{param}.type")
    if part.type not in _TEXT_PARTS:
        raise bad_request(f"{param}.type: unknown part {part.type!r}; use text", f"{param}.type")
    text = part.refusal if isinstance(part, ContentPart) and part.type == "refusal" else part.text
    if text is None:
        raise bad_request(f"{param}.text: missing", f"{param}.text", "missing_required_parameter")
    return text


def chat_messages(messages: Sequence[Message], param: str = "messages") -> list[JsonObject]:
    """Messages for a template. Developer messages are system messages; leading ones become one."""
    plain = [_message(message, f"{param}[{place}]") for place, message in enumerate(messages)]
    leading = next((i for i, m in enumerate(plain) if m["role"] != "system"), len(plain))
    return _merged(plain[:leading]) + plain[leading:]


def _message(message: Message, param: str) -> JsonObject:
    if message.content is None and message.role != "assistant":
        raise bad_request(f"{param}.content: missing", f"{param}.content", "missing_required_parameter")
    if message.tool_calls and message.role != "assistant":
        raise bad_request(f"{param}.tool_calls: only an assistant calls tools", f"{param}.tool_calls")
    role = "system" if message.role == "developer" else message.role
    plain: JsonObject = {"role": role, "content": flat_text(message.content, f"{param}.content")}
    if message.tool_calls:
        plain["tool_calls"] = [_tool_call(call, f"{param}.tool_calls[{place}].function")
                               for place, call in enumerate(message.tool_calls)]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            plain[name] = value
    return plain


def _tool_call(call: ToolCall, param: str) -> JsonObject:
    arguments = arguments_object(call.function.arguments, f"{param}.arguments")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def arguments_object(arguments: str | JsonObject | None, param: str) -> JsonObject:
    """A call's arguments as templates want them. Nothing and "" mean no arguments; other JSON is a 400."""
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        value = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        raise bad_request(f"{param}: no JSON; it must be an object, written out", param) from None
    if not isinstance(value, dict):
        raise bad_request(f"{param}: must be a JSON object, not {type(value).__name__}", param)
    return value


def _merged(system: list[JsonObject]) -> list[JsonObject]:
    """Several system messages as one."""
    if not system:
        return []
    return [{"role": "system", "content": "\n\n".join(message["content"] for message in system)}]


def template_tools(tools: Sequence[Tool] | None) -> list[JsonObject] | None:
    """Tools for a template, with the fields that were given; `strict` is for the server alone."""
    if not tools:
        return None
    return [{"type": "function", "function": tool.function.model_dump(exclude_none=True, exclude={"strict"})}
            for tool in tools]


def render(template: Template, messages: Sequence[JsonObject], tools: Sequence[JsonObject] | None,
           variables: Mapping[str, Any], add_generation_prompt: bool = True) -> str:
    """The prompt. When a template takes a system message at the start only, later ones are moved there."""
    wrong = sorted(_RESERVED & set(variables))
    if wrong:
        raise bad_request(f"chat_template_kwargs: {wrong[0]} is set by the server", f"chat_template_kwargs.{wrong[0]}")
    try:
        return template.render(messages, tools, add_generation_prompt, **variables)
    except UsageError as error:
        system = [message for message in messages if message["role"] == "system"]
        others = [message for message in messages if message["role"] != "system"]
        if not system or (messages[0]["role"] == "system" and len(system) == 1):
            raise bad_request(str(error), "messages") from None
    try:
        return template.render(_merged(system) + others, tools, add_generation_prompt, **variables)
    except UsageError as error:
        raise bad_request(str(error), "messages") from None
