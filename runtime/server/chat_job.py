"""A chat request as a job for the engine: prompt, sampling, parser and grammar."""

from __future__ import annotations

import json
from typing import Any

from qcn_compile.runtime.server.errors import bad_request, unsupported
from qcn_compile.runtime.server.generation import Job, PlainText
from qcn_compile.runtime.server.grammar import Grammar, json_grammar, lark_grammar, regex_grammar
from qcn_compile.runtime.server.prompts import chat_messages, template_tools
from qcn_compile.runtime.server.sampling import sampling_params
from qcn_compile.runtime.server.schema.chat import ChatRequest, NamedTool, Tool
from qcn_compile.runtime.server.schema.common import Guided, ResponseFormat
from qcn_compile.runtime.server.service import Service
from qcn_compile.runtime.server.tool_grammar import free_text, tool_grammar


async def chat_job(service: Service, body: ChatRequest, param: str = "messages") -> Job:
    """The job. Raises ApiError for what cannot be done; `param` is what the API calls the conversation."""
    _check(body)
    tools = _tools(service, body)
    text = await chat_prompt(service, body, tools)
    prompt = await service.encode(text)
    service.check_prompt(prompt, param)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = sampling_params(body, service.sampling, service.vocab_size, service.config.limits, limit, logprobs)
    grammar = _grammar(service, body, tools)
    if grammar is not None and params.ignore_eos:
        raise bad_request("ignore_eos: cannot go together with a grammar, which ends the answer", "ignore_eos")
    constraint = await service.constraint(grammar, service.thinks(text))
    plain = body.separate_reasoning is False and not tools
    parser = PlainText if plain else service.parser(text, template_tools(tools))
    return Job([prompt], params, body.n or 1, parser, constraint, body.parallel_tool_calls is not False)


async def chat_prompt(service: Service, body: ChatRequest, tools: list[Tool] | None) -> str:
    """The conversation in the model's template."""
    variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none":
            variables.setdefault("enable_thinking", False)
    if body.enable_thinking is not None:
        variables["enable_thinking"] = body.enable_thinking
    return await service.prompt(chat_messages(body.messages), template_tools(tools), variables)


def _check(body: ChatRequest) -> None:
    if body.functions is not None or body.function_call is not None:
        name = "functions" if body.functions is not None else "function_call"
        raise unsupported(f"{name}: use tools and tool_choice", name)
    if body.modalities is not None and set(body.modalities) - {"text"}:
        raise unsupported("modalities: this model writes text only", "modalities")
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs: needs logprobs true", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options: only with stream true", "stream_options")


def _tools(service: Service, body: ChatRequest) -> list[Tool] | None:
    """The tools that the model sees."""
    tools = body.tools or []
    if len(tools) > service.config.limits.tools:
        raise bad_request(f"tools: {len(tools)}, at most {service.config.limits.tools}", "tools")
    for place, tool in enumerate(tools):
        name = tool.function.name
        if not 0 < len(name) <= 128 or not all(c.isalnum() or c in "_-./:" for c in name):
            where = f"tools[{place}].function.name"
            raise bad_request(f"{where}: 1 to 128 letters, digits and _-./:", where)
    if body.tool_choice in (None, "auto"):
        return tools or None
    if body.tool_choice == "none":
        return None
    if not tools:
        raise bad_request("tool_choice: there are no tools to choose from", "tool_choice")
    if service.tool_parser is None:
        raise bad_request("tool_choice: the server runs without a tool call parser; start it with --tool-call-parser",
                          "tool_choice")
    if isinstance(body.tool_choice, NamedTool):
        wanted = body.tool_choice.function.name
        if all(tool.function.name != wanted for tool in tools):
            raise bad_request(f"tool_choice: no tool is named {wanted[:128]!r}", "tool_choice")
    return tools


def _grammar(service: Service, body: ChatRequest, tools: list[Tool] | None) -> Grammar | None:
    """What the answer is bound to: forced or strict tool calls, a response format, or both."""
    limits = service.config.limits
    content = content_grammar(service, body.response_format, body)
    if not tools or service.tool_parser is None:
        return content
    functions = [tool.function for tool in tools]
    parallel = body.parallel_tool_calls is not False
    if body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool):
        if isinstance(body.tool_choice, NamedTool):
            functions = [f for f in functions if f.name == body.tool_choice.function.name][:1]
            parallel = False
        return tool_grammar(functions, service.tool_parser, service.grammars.tag, limits, parallel=parallel,
                            param="tool_choice")
    if content is None and not any(function.strict for function in functions):
        return None
    return tool_grammar(functions, service.tool_parser, service.grammars.tag, limits, parallel=parallel, param="tools",
                        otherwise=content or free_text("tools"))


def content_grammar(service: Service, wanted: ResponseFormat | None, guided: Guided) -> Grammar | None:
    """The grammar of the content, by any of the names it has."""
    limits = service.config.limits
    found = [] if wanted is None or wanted.type == "text" else [_response_format(service, wanted)]
    for name in ("json_schema", "guided_json"):
        if (schema := getattr(guided, name)) is not None:
            found.append(json_grammar(_schema(schema, name), limits, name))
    for name in ("regex", "guided_regex"):
        if (pattern := getattr(guided, name)) is not None:
            found.append(regex_grammar(pattern, limits, name))
    for name in ("ebnf", "guided_grammar"):
        if (text := getattr(guided, name)) is not None:
            found.append(lark_grammar(text, limits, name))
    if len(found) > 1:
        raise bad_request(f"{found[1].param}: the answer has a grammar already, of {found[0].param}", found[1].param)
    return found[0] if found else None


def _response_format(service: Service, wanted: ResponseFormat) -> Grammar:
    limits = service.config.limits
    if wanted.type == "json_object":
        return json_grammar({"type": "object"}, limits, "response_format")
    if wanted.type == "regex":
        return regex_grammar(wanted.pattern or "", limits, "response_format.pattern")
    if wanted.type == "grammar":
        return lark_grammar(wanted.grammar or "", limits, "response_format.grammar")
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise bad_request("response_format.json_schema.schema: missing", "response_format.json_schema.schema",
                          "missing_required_parameter")
    return json_grammar(wanted.json_schema.schema_, limits, "response_format.json_schema.schema")


def _schema(given: str | dict[str, Any], param: str) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        raise bad_request(f"{param}: no JSON", param) from None
