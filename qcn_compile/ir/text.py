"""The text form of a graph, `.qir`: prints and parses exactly.

    graph @main(%tokens: i32[T], %positions: i32[T], %batch: batch) {
      state @kv.model.layers.3.self_attn : kv f32[2,64]
      %0 : f32[4096,192] = weight() {name="model.embed_tokens.weight", dtype=f32, shape=(4096,192)}
      %1 : f32[T,192] = embedding(%tokens, %0)  ; model.embed_tokens (modeling.py:41)
      return %1
    }
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from qcn_compile.errors import IRError
from qcn_compile.ir.graph import Attr, Graph, Location, Op, Value
from qcn_compile.ir.types import DTYPES, DType, StateKind, StateRef, StateType, Sym, parse_dim, parse_type


def format_attr(value: Attr | Sym) -> str:
    """One attribute value as text."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, DType):
        return value.value
    if isinstance(value, tuple):
        return "(" + ",".join(format_attr(v) for v in value) + ("," if len(value) == 1 else "") + ")"
    return repr(value) if isinstance(value, float) else str(value)


def format_op(op: Op) -> str:
    """One line of text: results, op, operands, attributes, location."""
    left = ", ".join(f"%{v.name} : {v.type}" for v in op.results)
    args = ", ".join("none" if v is None else f"%{v.name}" for v in op.operands)
    attrs = ", ".join(f"{key}={format_attr(value)}" for key, value in op.attrs.items())
    tail = f"  ; {op.loc}" if str(op.loc) else ""
    return f"{left} = {op.name}({args})" + (f" {{{attrs}}}" if attrs else "") + tail


def print_graph(graph: Graph) -> str:
    """The whole graph as `.qir` text."""
    head = ", ".join(f"%{v.name}: {v.type}" for v in graph.inputs)
    lines = [f"graph @{graph.name}({head}) {{"]
    lines += [f"  state @{name} : {state}" for name, state in graph.states.items()]
    lines += [f"  {format_op(op)}" for op in graph.ops]
    lines += ["  return " + ", ".join(f"%{v.name}" for v in graph.outputs), "}"]
    return "\n".join(lines) + "\n"


_TOKEN = re.compile(r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*")
    |(?P<number>-?(?:\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+|inf|nan|\d+)(?![*\w]))
    |(?P<dim>(?:\d+\*)?[A-Z][A-Za-z0-9_]*(?:[+-]\d+)?)|(?P<ref>@[\w.]+)
    |(?P<word>[a-z][\w]*)|(?P<mark>[(),={}]))""", re.X)


class AttrReader:
    """Recursive reader of `key=value, ...`."""

    def __init__(self, text: str) -> None:
        self.tokens = list(self._scan(text))
        self.at = 0

    @staticmethod
    def _scan(text: str) -> Iterator[tuple[str, str]]:
        at = 0
        while at < len(text.rstrip()):
            found = _TOKEN.match(text, at)
            if not found:
                raise IRError(f"cannot read attributes at {text[at:at + 20]!r}")
            at = found.end()
            yield str(found.lastgroup), found[str(found.lastgroup)]

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def take(self) -> tuple[str, str]:
        if self.at >= len(self.tokens):
            raise IRError("attributes end too early")
        self.at += 1
        return self.tokens[self.at - 1]

    def pairs(self) -> dict[str, Attr]:
        result: dict[str, Attr] = {}
        while self.peek():
            key = self.take()[1]
            if self.take()[1] != "=":
                raise IRError(f"attribute {key!r} lacks '='")
            result[key] = self.value()
            if self.peek() == ",":
                self.take()
        return result

    def value(self) -> Attr:
        kind, text = self.take()
        if kind == "string":
            return str(json.loads(text))
        if kind == "number":
            return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
        if kind == "dim":
            return parse_dim(text)  # type: ignore[return-value]
        if kind == "ref":
            return StateRef(text[1:])
        if text == "(":
            return self._tuple()
        return self._word(text)

    def _tuple(self) -> Attr:
        items: list[Attr] = []
        while self.peek() != ")":
            items.append(self.value())
            if self.peek() == ",":
                self.take()
        self.take()
        return tuple(items)

    @staticmethod
    def _word(text: str) -> Attr:
        words: dict[str, Attr] = {"none": None, "true": True, "false": False, "inf": float("inf")}
        if text in words:
            return words[text]
        if text in DTYPES:
            return DType(text)
        raise IRError(f"attribute value {text!r} is unknown")


_HEAD = re.compile(r"graph @([\w.-]+)\((.*)\) \{$")
_STATE = re.compile(r"state @([\w.]+) : (\w+) (.+)$")
_OP = re.compile(r"(?P<left>%.+?) = (?P<name>[\w.]+)\((?P<args>[^)]*)\)(?: \{(?P<attrs>.*?)\})?(?:  ; (?P<loc>.*))?$")
_LOC = re.compile(r"(?P<module>.*?)(?: \((?P<source>[^()]*)\))?$")
_RESULT = re.compile(r"%([\w.]+) : (\w+\[[^\]]*\]|batch)")


def _split_inputs(text: str) -> list[tuple[str, str]]:
    return re.findall(r"%([\w.]+): (\w+\[[^\]]*\]|batch)", text)


class _Parser:
    def __init__(self, text: str) -> None:
        self.lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1)]
        self.lines = [(i, line) for i, line in self.lines if line and not line.startswith("//")]
        self.values: dict[str, Value] = {}

    def parse(self) -> Graph:
        number, line = self.lines[0] if self.lines else (1, "")
        found = _HEAD.match(line)
        if not found:
            raise IRError(f"line {number}: expected 'graph @name(...) {{', found {line!r}")
        graph = Graph(found[1])
        for name, type_ in _split_inputs(found[2]):
            graph.inputs.append(self._define(number, Value(name, parse_type(type_))))
        for number, line in self.lines[1:]:
            try:
                if self._line(graph, number, line):
                    return graph
            except IRError as error:
                raise IRError(f"line {number}: {error}") from None
        raise IRError(f"graph @{graph.name} has no closing '}}'")

    def _line(self, graph: Graph, number: int, line: str) -> bool:
        if line == "}":
            return True
        if found := _STATE.match(line):
            tensor = parse_type(found[3])
            graph.states[found[1]] = StateType(StateKind(found[2]), tensor.dtype, tensor.shape)  # type: ignore
        elif line.startswith("return"):
            graph.outputs = [self._use(n) for n in re.findall(r"%([\w.]+)", line)]
        elif found := _OP.match(line):
            graph.ops.append(self._op(number, found))
        else:
            raise IRError(f"cannot read {line!r}")
        return False

    def _op(self, number: int, found: re.Match[str]) -> Op:
        args = [a.strip() for a in found["args"].split(",")] if found["args"].strip() else []
        operands = [None if a == "none" else self._use(a[1:]) for a in args]
        place = _LOC.match(found["loc"] or "")
        loc = Location(place["module"] or "", place["source"] or "") if place else Location()
        op = Op(found["name"], operands, [], AttrReader(found["attrs"] or "").pairs(), loc)
        for name, type_ in _RESULT.findall(found["left"]):
            op.results.append(self._define(number, Value(name, parse_type(type_), op)))
        return op

    def _define(self, number: int, value: Value) -> Value:
        if value.name in self.values:
            raise IRError(f"line {number}: %{value.name} is defined twice")
        self.values[value.name] = value
        return value

    def _use(self, name: str) -> Value:
        if name not in self.values:
            raise IRError(f"%{name} is used before it is defined")
        return self.values[name]


def parse_graph(text: str) -> Graph:
    """Inverse of `print_graph`. Raises IRError with the line number."""
    return _Parser(text).parse()
