"""Rewrite rules written as equations: the pattern language.

    linear_add: add(r, linear(x, w)) => linear_add(x, w, r)
    moe:        moe_experts(x, t.1, div(t.0, sum(t.0){axis=last}), gu, dn) where t = topk(p){k=$k} => ...

Pattern syntax: `op(args){attr=value}`. A bare word is a variable (the same word is the same value); `$word` captures an
attribute; `last` is the last axis of the first operand; `cast?(p)` and `view?(p)` look through casts and reshapes;
`none` is an absent optional operand; `s:op(...)` names an inner value so that the right side may replace it too;
`t.i` is result i of the op bound by `where t = op(...)`. Commutative ops match in either order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qcn_compile.errors import IRError
from qcn_compile.ir.graph import Attr, Op, Value
from qcn_compile.ir.text import AttrReader


@dataclass(frozen=True)
class Node:
    """A pattern tree: an op with arguments, or a variable (no args, `op` is None)."""

    op: str | None
    var: str = ""
    index: int = 0
    args: tuple[Node, ...] = ()
    attrs: tuple[tuple[str, str], ...] = ()


_LEX = re.compile(r"\s*([\w.]+\?|[\w.]+:|\$?[\w.+-]+|[(){},=]|\"[^\"]*\")")


class _Reader:
    """Parser of one pattern expression."""

    def __init__(self, text: str) -> None:
        self.tokens = _LEX.findall(text)
        if "".join(self.tokens) != re.sub(r"\s+", "", text):
            raise IRError(f"cannot read pattern {text!r}")
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, want: str = "") -> str:
        token = self.peek()
        if want and token != want:
            raise IRError(f"pattern: expected {want!r}, found {token!r}")
        self.at += 1
        return token

    def node(self) -> Node:
        label = self.take()[:-1] if self.peek().endswith(":") else ""
        name = self.take()
        if self.peek() != "(":
            head, _, index = name.partition(".")
            return Node(None, head, int(index or 0))
        self.take("(")
        args: list[Node] = []
        while self.peek() != ")":
            args.append(self.node())
            if self.peek() == ",":
                self.take()
        self.take(")")
        return Node(name, label, 0, tuple(args), tuple(self._attrs()))

    def _attrs(self) -> Iterator[tuple[str, str]]:
        if self.peek() != "{":
            return
        self.take("{")
        while self.peek() != "}":
            key = self.take()
            self.take("=")
            yield key, self.take()
            if self.peek() == ",":
                self.take()
        self.take("}")


def _side(text: str) -> tuple[list[tuple[str, Node]], dict[str, Node]]:
    """Outputs (label, tree) and `where` bindings of one side of an equation."""
    head, _, tail = text.partition(" where ")
    bindings = {}
    for part in filter(None, (p.strip() for p in tail.split(";"))):
        name, _, body = part.partition(" = ")
        bindings[name.strip()] = _Reader(body).node()
    outputs = []
    for part in (p.strip() for p in head.split(";")):
        label, eq, body = part.partition(" <- ")
        outputs.append((label.strip(), _Reader(body).node()) if eq else ("", _Reader(part).node()))
    return outputs, bindings


@dataclass
class Match:
    """One successful match: values by variable, ops by `where` name, attrs captured by `$word`, inner ops."""

    values: dict[str, Value] = field(default_factory=dict)
    ops: dict[str, Op] = field(default_factory=dict)
    attrs: dict[str, Attr] = field(default_factory=dict)
    inner: list[Op] = field(default_factory=list)

    def copy(self) -> Match:
        return Match(dict(self.values), dict(self.ops), dict(self.attrs), list(self.inner))


Guard = Callable[[Match], str | None]


@dataclass(frozen=True)
class Rule:
    """An equation `left => right`, read as the head of this file says. name: what logs and reports call it.

    guard(match): may refuse with a reason. derive(match): further `$words` for the right side, from shapes.
    single: labels of inner values that must have no other reader. marker: the op whose survival means that the rule
    did not fire where it could have.
    """

    name: str
    equation: str
    guard: Guard | None = None
    derive: Callable[[Match], dict[str, Attr]] | None = None
    single: tuple[str, ...] = ()
    marker: str = ""

    @property
    def sides(self) -> tuple[Any, Any]:
        """Both sides, parsed once. Raises IRError for an equation that cannot be read."""
        if self.equation not in _PARSED:
            left, arrow, right = self.equation.partition("=>")
            if not arrow:
                raise IRError(f"rule {self.name}: an equation needs '=>'")
            _PARSED[self.equation] = (_side(" ".join(left.split())), _side(" ".join(right.split())))
        return _PARSED[self.equation]

    @cached_property
    def ops(self) -> frozenset[str]:
        """Names of the ops on both sides; the marker too."""
        trees = [tree for outputs, bound in self.sides for tree in (*(t for _, t in outputs), *bound.values())]
        return frozenset(filter(None, (self.marker, *(name for tree in trees for name in _ops(tree)))))


def _ops(node: Node) -> Iterator[str]:
    if node.op is not None and not node.op.endswith("?"):
        yield node.op
    for part in node.args:
        yield from _ops(part)


_PARSED: dict[str, tuple[Any, Any]] = {}


def literal(text: str) -> Attr:
    """An attribute value written in a pattern."""
    return AttrReader(text).value()
