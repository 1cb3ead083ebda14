"""Which JSON types a tool's schema allows for a parameter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

Types = frozenset[str]

STRING: Types = frozenset({"string"})
ALL: Types = frozenset({"null", "integer", "number", "boolean", "object", "array", "string"})
_NOTHING: Types = frozenset()
_MAX_DEPTH = 64

_NAMES = (  # other words for types that tools in the wild use
    (re.compile(r"(?:u?int|long|short|unsigned)"), "integer"),
    (re.compile(r"(?:num|float|double|decimal)"), "number"),
    (re.compile(r"(?:bool|binary)"), "boolean"),
    (re.compile(r"(?:obj|dict|map)"), "object"),
    (re.compile(r"(?:arr|list|tuple|set)"), "array"),
    (re.compile(r"(?:null|none)"), "null"),
)


class ToolSchemas:
    """The tools of one request: {"type": "function", "function": {...}}, or flat with parameters or input_schema."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self._parameters: dict[str, Mapping[str, Any]] = {}
        for tool in tools or ():
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if isinstance(function, Mapping) and isinstance(name := function.get("name"), str):
                schema = function.get("parameters", function.get("input_schema"))
                self._parameters[name] = schema if isinstance(schema, Mapping) else {}
        self._types: dict[tuple[str, str], Types] = {}

    def __contains__(self, tool: str) -> bool:
        return tool in self._parameters

    def __bool__(self) -> bool:
        return bool(self._parameters)

    def declares(self, tool: str, parameter: str) -> bool:
        """Whether the tool has a parameter of this name. Of an unknown tool nothing is known: True."""
        if tool not in self._parameters:
            return True
        root = self._parameters[tool]
        return any(parameter in properties for properties in _property_tables(root, _Resolver(root)))

    def types(self, tool: str, parameter: str) -> Types:
        """The allowed types; string for what the schema does not describe."""
        key = (tool, parameter)
        if key not in self._types:
            self._types[key] = self._find_types(tool, parameter)
        return self._types[key]

    def _find_types(self, tool: str, parameter: str) -> Types:
        root = self._parameters.get(tool)
        if root is None:
            return STRING
        resolver = _Resolver(root)
        found = [table[parameter] for table in _property_tables(root, resolver) if parameter in table]
        if not found and "additionalProperties" in root:
            found = [root["additionalProperties"]]
        return _NOTHING.union(*(resolver.types(schema) for schema in found)) or STRING


class _Resolver:
    """Follows references within one schema. A reference is resolved once; one that contains itself adds nothing."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._types: dict[str, Types] = {}

    def types(self, schema: Any, depth: int = 0) -> Types:
        """Types a schema allows; empty where it does not say."""
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return _NOTHING
        found = _own_types(schema)
        if isinstance(reference := schema.get("$ref"), str):
            found |= self._reference_types(reference, depth)
        for key in ("anyOf", "oneOf"):
            found |= _NOTHING.union(*(self.types(part, depth + 1) for part in _parts(schema, key)))
        for part in _parts(schema, "allOf"):
            found = _both(found, self.types(part, depth + 1))
        return found | {"null"} if schema.get("nullable") is True and found else found

    def lookup(self, reference: str) -> Any:
        """What a local JSON pointer ("#/$defs/x") names, or None."""
        if not reference.startswith("#"):
            return None
        node: Any = self._root
        for part in unquote(reference[1:]).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, Mapping):
                node = node.get(key)
            elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
                node = node[int(key)]
            else:
                return None
        return node

    def _reference_types(self, reference: str, depth: int) -> Types:
        if reference not in self._types:
            self._types[reference] = _NOTHING
            self._types[reference] = self.types(self.lookup(reference), depth + 1)
        return self._types[reference]


def _property_tables(root: Mapping[str, Any], resolver: _Resolver) -> Iterator[Mapping[str, Any]]:
    """Every `properties` of the arguments object, also behind references and combinations."""
    pending: list[tuple[Any, int]] = [(root, 0)]
    seen: set[int] = set()
    while pending:
        schema, depth = pending.pop()
        if not isinstance(schema, Mapping) or id(schema) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(schema))
        if isinstance(properties := schema.get("properties"), Mapping):
            yield properties
        if isinstance(reference := schema.get("$ref"), str):
            pending.append((resolver.lookup(reference), depth + 1))
        pending.extend((part, depth + 1) for key in ("anyOf", "oneOf", "allOf") for part in _parts(schema, key))


def _own_types(schema: Mapping[str, Any]) -> Types:
    """Types by the keywords of this schema alone."""
    declared = schema.get("type")
    names = declared if isinstance(declared, list) else [declared]
    found = _NOTHING.union(*(_named(name) for name in names if isinstance(name, str)))
    if found:
        return found
    if isinstance(values := schema.get("enum"), list):
        return frozenset(_type_of(value) for value in values)
    if "const" in schema:
        return frozenset({_type_of(schema["const"])})
    if isinstance(schema.get("properties"), Mapping):
        return frozenset({"object"})
    return frozenset({"array"}) if "items" in schema or "prefixItems" in schema else _NOTHING


def _named(name: str) -> Types:
    lowered = name.strip().lower()
    if lowered == "any":
        return ALL
    return next((frozenset({kind}) for pattern, kind in _NAMES if pattern.match(lowered)), STRING)


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "object")


def _both(left: Types, right: Types) -> Types:
    """Types that satisfy both; a schema that says nothing, or contradicts, does not restrict."""
    if not left or not right:
        return left | right
    common = left & right
    if "integer" in left | right and "number" in left | right:
        common |= {"integer"}
    return common or left | right


def _parts(schema: Mapping[str, Any], key: str) -> list[Any]:
    parts = schema.get(key)
    return parts if isinstance(parts, list) else []
