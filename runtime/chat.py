"""Chat templates, rendered as Hugging Face renders them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from qcn_compile.errors import UsageError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled template. It is untrusted code from a checkpoint, so it runs in jinja2's immutable sandbox."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._template = _compile(source)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None,
               add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt of a conversation. Raises UsageError with the template's own words when it refuses one."""
        import jinja2

        context = {**self._special_tokens, **variables}
        try:
            return self._template.render(messages=list(messages), tools=None if tools is None else list(tools),
                                         documents=None, add_generation_prompt=add_generation_prompt, **context)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise UsageError(f"the chat template refuses these messages: {error}") from None


def _compile(source: str) -> jinja2.Template:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[_generation_tag(), loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"the chat template of the build does not parse (line {error.lineno}): {error}") from None


def _generation_tag() -> type[jinja2.ext.Extension]:
    """`{% generation %}` marks what the assistant said for training; for rendering it is transparent."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
