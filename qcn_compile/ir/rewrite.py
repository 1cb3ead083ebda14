"""Rewrite rules written as equations, and the engine that applies them and says why not.

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
from typing import Any

from qcn_compile.errors import IRError
from qcn_compile.ir.graph import Attr, Graph, Location, Op, Value
from qcn_compile.ir.optable import row
from qcn_compile.ir.text import _Attrs
from qcn_compile.ir.verify import infer

KEEPS_NAME = {"linear", "slice", "reshape", "take_rows", "concat", "encode", "cast"}
SKIPPED = {"cast?": ("cast",), "view?": ("reshape",)}


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
    """Variables, captured attributes and inner ops of one successful match."""

    values: dict[str, Value] = field(default_factory=dict)
    ops: dict[str, Op] = field(default_factory=dict)
    attrs: dict[str, Attr] = field(default_factory=dict)
    inner: list[Op] = field(default_factory=list)

    def copy(self) -> Match:
        return Match(dict(self.values), dict(self.ops), dict(self.attrs), list(self.inner))


Guard = Callable[[Match], str | None]


@dataclass(frozen=True)
class Rule:
    """An equation `left => right`.

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
        if self.equation not in _PARSED:
            left, arrow, right = self.equation.partition("=>")
            if not arrow:
                raise IRError(f"rule {self.name}: an equation needs '=>'")
            _PARSED[self.equation] = (_side(" ".join(left.split())), _side(" ".join(right.split())))
        return _PARSED[self.equation]


_PARSED: dict[str, tuple[Any, Any]] = {}


class NoMatch(Exception):
    """A pattern that does not fit; carries how deep it got and why it stopped."""

    def __init__(self, depth: int, reason: str) -> None:
        super().__init__(reason)
        self.depth = depth


class Matcher:
    """Matches one rule at one op."""

    def __init__(self, rule: Rule) -> None:
        (outputs, self.bindings), _ = rule.sides
        self.root: Node = outputs[0][1]
        self.rule = rule

    def at(self, op: Op) -> Match:
        """The match with `op` as root. Raises NoMatch."""
        found = self._op(self.root, op, Match(), 0)
        if self.rule.guard and (reason := self.rule.guard(found)):
            raise NoMatch(len(found.inner) + 1, reason)
        if self.rule.derive:
            found.attrs.update(self.rule.derive(found))
        return found

    def _op(self, node: Node, op: Op, match: Match, depth: int) -> Match:
        if op.name != node.op:
            raise NoMatch(depth, f"expected {node.op}, found {op.name} (%{op.results[0].name})")
        if len(op.operands) != len(node.args):
            raise NoMatch(depth, f"{op.name} has {len(op.operands)} operands, the rule wants {len(node.args)}")
        match = match.copy()
        match.inner.append(op)
        if node.var:
            match.ops[node.var] = op
            match.values[node.var] = op.results[0]
        self._attrs(node, op, match, depth)
        pairs = [(node.args, op.operands)]
        if row(op.name).commutative:
            pairs.append((node.args, op.operands[::-1]))
        failure = NoMatch(-1, "")
        for args, operands in pairs:
            try:
                trial = match
                for arg, operand in zip(args, operands, strict=True):
                    trial = self._value(arg, operand, trial, depth + 1)
                return trial
            except NoMatch as error:
                failure = max(failure, error, key=lambda e: e.depth)
        raise failure

    def _attrs(self, node: Node, op: Op, match: Match, depth: int) -> None:
        for key, text in node.attrs:
            have = op.attrs.get(key, row(op.name).attrs[key].default)
            if text.startswith("$"):
                if match.attrs.setdefault(text[1:], have) != have:
                    raise NoMatch(depth, f"{op.name}.{key} is {have!r} here and {match.attrs[text[1:]]!r} elsewhere")
                continue
            want = op.operands[0].tensor.rank - 1 if text == "last" and op.operands[0] else literal(text)
            if have != want:
                raise NoMatch(depth, f"{op.name}.{key} is {have!r}, the rule wants {text}")

    def _value(self, node: Node, value: Value | None, match: Match, depth: int) -> Match:
        if node.op is None:
            return self._variable(node, value, match, depth)
        if value is None:
            raise NoMatch(depth, f"expected {node.op}, the operand is absent")
        if node.op in SKIPPED:
            return self._skip(node, value, match, depth)
        if value.op is None:
            raise NoMatch(depth, f"expected {node.op}, found input %{value.name}")
        if value is not value.op.results[0]:
            raise NoMatch(depth, f"%{value.name} is not the first result of {value.op.name}")
        return self._op(node, value.op, match, depth)

    def _skip(self, node: Node, value: Value, match: Match, depth: int) -> Match:
        """Look through no, one or more ops of a kind; the longest way that fits wins."""
        chain, at = [value], value
        while at.op is not None and at.op.name in SKIPPED[str(node.op)] and at.op.operands[0] is not None:
            at = at.op.operands[0]
            chain.append(at)
        failure = NoMatch(-1, "")
        for candidate in reversed(chain):
            try:
                return self._value(node.args[0], candidate, match, depth)
            except NoMatch as error:
                failure = max(failure, error, key=lambda e: e.depth)
        raise failure

    def _variable(self, node: Node, value: Value | None, match: Match, depth: int) -> Match:
        if node.var == "none":
            if value is not None:
                raise NoMatch(depth, f"the rule wants no operand here, found %{value.name}")
            return match
        if value is None:
            raise NoMatch(depth, f"operand {node.var} is absent")
        if node.var in self.bindings:
            return self._bound(node, value, match, depth)
        seen = match.values.get(node.var)
        if seen is not None and seen is not value:
            raise NoMatch(depth, f"{node.var} is %{seen.name} in one place and %{value.name} in another")
        match = match.copy()
        match.values[node.var] = value
        return match

    def _bound(self, node: Node, value: Value, match: Match, depth: int) -> Match:
        if value.op is None or node.index >= len(value.op.results) or value.op.results[node.index] is not value:
            raise NoMatch(depth, f"%{value.name} is not result {node.index} of {self.bindings[node.var].op}")
        if node.var in match.ops:
            if match.ops[node.var] is not value.op:
                raise NoMatch(depth, f"{node.var} is two different ops")
            return match
        found = self._op(self.bindings[node.var], value.op, match, depth)
        found.ops[node.var] = value.op
        return found


def literal(text: str) -> Attr:
    """An attribute value written in a pattern."""
    return _Attrs(text).value()


class Rewriter:
    """Applies rules to a graph in place, keeping users up to date; `finish` restores order and drops dead ops."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.users = {value: list(ops) for value, ops in graph.users().items()}
        self.place: dict[Op, tuple[float, int]] = {op: (float(i), 0) for i, op in enumerate(graph.ops)}
        self.names = {v.name for v in graph.inputs} | {v.name for op in graph.ops for v in op.results}
        self.fresh = 0

    def name(self, op_name: str, hint: str) -> str:
        """A value name not used yet: views and weights keep the name they stand for, other ops bring their own."""
        stem = re.sub(r"_\d+$", "", hint)
        if op_name not in KEEPS_NAME:
            prefix, dot, _ = hint.rpartition(".") if re.match(r"L\d+\.", hint) else ("", "", "")
            stem = f"{prefix}{dot}{op_name}"
        if stem not in self.names:
            self.names.add(stem)
            return stem
        while True:
            self.fresh += 1
            if (candidate := f"{stem}_{self.fresh}") not in self.names:
                self.names.add(candidate)
                return candidate

    def make(self, op_name: str, operands: list[Value | None], attrs: dict[str, Attr], loc: Location,
             hint: str = "v") -> Op:
        """A new op, placed right after the last of its operands."""
        op = Op(op_name, operands, [], attrs, loc)
        op.results = [Value(self.name(op_name, hint), t, op) for t in infer(op_name, operands, attrs)]
        for value in dict.fromkeys(op.inputs):
            self.users.setdefault(value, []).append(op)
        for value in op.results:
            self.users[value] = []
        last = max((self.place[v.op] for v in op.inputs if v.op is not None), default=(-1.0, 0))
        self.fresh += 1
        self.place[op] = (last[0], self.fresh)
        self.graph.ops.append(op)
        return op

    def after(self, op: Op, anchor: Op) -> None:
        """Move an op to right after another (for effects: not before the op it replaces)."""
        self.fresh += 1
        self.place[op] = (max(self.place[op], self.place[anchor])[0], self.fresh)

    def replace(self, old: Value, new: Value) -> None:
        """All readers of `old` read `new`."""
        for user in self.users.get(old, []):
            user.operands = [new if v is old else v for v in user.operands]
            if user not in self.users.setdefault(new, []):
                self.users[new].append(user)
        self.users[old] = []
        self.graph.outputs = [new if v is old else v for v in self.graph.outputs]

    def apply(self, rule: Rule, match: Match, root: Op) -> Op:
        """Build the right side and put it in the place of the left. Returns the new root op."""
        _, (outputs, bindings) = rule.sides
        ops: dict[str, Op] = {}
        effects = [op for op in match.inner if row(op.name).effects]

        def value(node: Node) -> Value | None:
            if node.op is None:
                if node.var == "none":
                    return None
                if node.var in bindings:
                    if node.var not in ops:
                        ops[node.var] = build(bindings[node.var])
                    return ops[node.var].results[node.index]
                if node.var not in match.values:
                    raise IRError(f"rule {rule.name}: {node.var} is not bound on the left side")
                return match.values[node.var]
            return build(node).results[0]

        def build(node: Node) -> Op:
            attrs = {k: match.attrs[t[1:]] if t.startswith("$") else literal(t) for k, t in node.attrs}
            op = self.make(str(node.op), [value(a) for a in node.args], attrs, root.loc, root.results[0].name)
            if row(op.name).effects:
                for old in effects:
                    self.after(op, old)
            return op

        new_root: Op | None = None
        for label, tree in outputs:
            fresh = value(tree)
            assert fresh is not None
            old = match.values[label] if label else root.results[0]
            new_root = fresh.op if not label else new_root
            self.replace(old, fresh)
        self.prune(root, set(effects))
        for op in effects:
            if op in self.place:
                raise IRError(f"rule {rule.name}: {op.name} %{op.results[0].name} is still read after the rewrite")
        assert new_root is not None
        return new_root

    def ordered(self, name: str | None) -> list[Op]:
        """The ops of a name, in order."""
        return sorted((op for op in self.place if op.name == name), key=lambda op: self.place[op])

    def prune(self, op: Op, absorbed: set[Op]) -> None:
        """Erase an op that nothing reads, then its producers that nothing reads any more.

        Ops with effects go only when a rewrite `absorbed` them.
        """
        work = [op]
        while work:
            at = work.pop()
            kept = bool(row(at.name).effects) and at not in absorbed
            if kept or at not in self.place or any(self.users.get(v) or v in self.graph.outputs for v in at.results):
                continue
            del self.place[at]
            for value in dict.fromkeys(at.inputs):
                self.users[value] = [u for u in self.users[value] if u is not at]
                if value.op is not None:
                    work.append(value.op)

    def finish(self) -> Graph:
        """Order restored, dead pure ops removed."""
        self.graph.ops = sorted(self.place, key=lambda op: self.place[op])
        return remove_dead(self.graph)


def remove_dead(graph: Graph) -> Graph:
    """Drop ops without effects whose results nothing reads."""
    live: set[Value] = set(graph.outputs)
    kept: list[Op] = []
    for op in reversed(graph.ops):
        if row(op.name).effects or any(v in live for v in op.results):
            kept.append(op)
            live.update(op.inputs)
    graph.ops = kept[::-1]
    return graph


@dataclass(frozen=True)
class Fired:
    """One application of a rule, or, with a reason, one place where it did not apply."""

    rule: str
    where: str
    value: str
    reason: str = ""


def rewrite(graph: Graph, rules: list[Rule]) -> list[Fired]:
    """Apply rules, in order, everywhere they match; report what fired and, at surviving markers, why not."""
    rewriter, log = Rewriter(graph), []
    missed: dict[tuple[str, Op], NoMatch] = {}
    for rule in rules:
        matcher = Matcher(rule)
        for op in rewriter.ordered(matcher.root.op):
            if op not in rewriter.place:  # absorbed by a match just before
                continue
            try:
                match = matcher.at(op)
                _check_single(rewriter, rule, match)
            except NoMatch as error:
                _remember(missed, rule, op, error)
                continue
            rewriter.apply(rule, match, op)
            log.append(Fired(rule.name, str(op.loc), op.results[0].name))
    rewriter.finish()
    return log + _not_fired(graph, rules, missed)


def _check_single(rewriter: Rewriter, rule: Rule, match: Match) -> None:
    for label in rule.single:
        value = match.values[label]
        readers = rewriter.users[value]
        if len(readers) > 1 or value in rewriter.graph.outputs:
            raise NoMatch(len(match.inner), f"%{value.name} has another reader, {readers[-1].name if readers else ''}")


def _remember(missed: dict[tuple[str, Op], NoMatch], rule: Rule, root: Op, error: NoMatch) -> None:
    if not rule.marker:
        return
    seen, frontier = set(), [root]
    for _ in range(8):
        frontier = [v.op for op in frontier for v in op.inputs if v.op is not None and v.op not in seen]
        seen.update(frontier)
    for op in {root, *seen}:
        if op.name == rule.marker:
            best = missed.get((rule.name, op))
            if best is None or error.depth > best.depth:
                missed[rule.name, op] = error


def _not_fired(graph: Graph, rules: list[Rule], missed: dict[tuple[str, Op], NoMatch]) -> list[Fired]:
    log = []
    for rule in rules:
        for op in graph.ops:
            if rule.marker and op.name == rule.marker and (rule.name, op) in missed:
                log.append(Fired(rule.name, str(op.loc), op.results[0].name, str(missed[rule.name, op])))
    return log


