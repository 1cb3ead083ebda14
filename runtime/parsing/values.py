"""Raw parameter text to JSON, by the types its schema allows."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from typing import Any

from qcn_compile.runtime.parsing.schema import Types

_SPACE = " \t\r\n"
_SCALAR_LIMIT = 4096
_LITERAL_LIMIT = 65536
_ORDER = ("null", "integer", "number", "boolean", "object", "array")
_WORDS = {"null": ("null", "none"), "boolean": ("true", "false", "1", "0")}
_NUMBER_CHARACTERS = re.compile(r"[-+.0-9eE \t\r\n]*")
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_LAX_INTEGER = re.compile(r"([-+]?[0-9]+)(?:\.0*)?")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_LAX_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")


def quote(text: str) -> str:
    """A JSON string. Each character is escaped by itself, so pieces may be quoted apart and joined."""
    return encodable(json.dumps(text, ensure_ascii=False))


def encodable(text: str) -> str:
    """JSON text without lone surrogates, which UTF-8 cannot carry."""
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def may_be_typed(start: str, types: Types) -> bool:
    """Whether a value that begins with `start` may become anything but a string. Once False, always False."""
    body = start.lstrip(_SPACE)
    if len(start) - len(body) > _SCALAR_LIMIT:
        return False
    if ("object" in types and body.startswith("{")) or ("array" in types and body.startswith("[")):
        return True
    if len(start) > _SCALAR_LIMIT:
        return False
    if not body:
        return bool(types - {"string"})
    if types & {"integer", "number"} and _NUMBER_CHARACTERS.fullmatch(start):
        return True
    word = body.rstrip(_SPACE).lower()
    return any(candidate.startswith(word) for kind in types for candidate in _WORDS.get(kind, ()))


def to_json(text: str, types: Types) -> str:
    """The value as JSON text: the first of null, integer, number, boolean, object, array that fits, else a string.

    Where a string is allowed too, only exact spellings count (`007` and ` 1 ` stay strings); else `+5`, `5.0` for an
    integer, `1` for a boolean and `None` for null are understood.
    """
    if may_be_typed(text, types):
        exact = "string" in types
        candidate = text if exact else text.strip(_SPACE)
        for kind in _ORDER:
            if kind in types and (converted := _convert(kind, candidate, exact)) is not None:
                return converted
    return quote(text)


def _convert(kind: str, text: str, exact: bool) -> str | None:
    if kind == "null":
        return "null" if text.lower() in (("null",) if exact else ("null", "none")) else None
    if kind == "boolean":
        word = text.lower() if exact else {"1": "true", "0": "false"}.get(text, text.lower())
        return word if word in ("true", "false") else None
    if kind == "integer":
        return _integer(text, exact)
    if kind == "number":
        return _number(text, exact)
    return _compound(text.strip(_SPACE), dict if kind == "object" else list)


def _integer(text: str, exact: bool) -> str | None:
    if len(text) > _SCALAR_LIMIT:
        return None
    if _INTEGER.fullmatch(text):
        return text
    found = None if exact else _LAX_INTEGER.fullmatch(text)
    return str(int(found[1])) if found else None


def _number(text: str, exact: bool) -> str | None:
    """Whole numbers lose their `.0` as in other servers; other digits are kept as written."""
    if not (_NUMBER if exact else _LAX_NUMBER).fullmatch(text):
        return None
    value = float(text)
    if not math.isfinite(value):
        return None
    if value.is_integer() and abs(value) < 2**53 and not exact:
        return str(int(value))
    return text if _NUMBER.fullmatch(text) else json.dumps(value)


def _compound(text: str, kind: type) -> str | None:
    """JSON as written; JSON with raw newlines in its strings, or a Python literal, as clean JSON."""
    value = _load(text, strict=True)
    if isinstance(value, kind):
        return encodable(text)
    value = _load(text, strict=False)
    if not isinstance(value, kind):
        value = _literal(text)
    if not isinstance(value, kind):
        return None
    try:
        return encodable(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return None


def _load(text: str, strict: bool) -> Any:
    try:
        return json.loads(text, strict=strict, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _literal(text: str) -> Any:
    if len(text) > _LITERAL_LIMIT:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "invalid escape sequence" would print the user's text
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
