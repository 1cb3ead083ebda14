"""The rewrite engine: applies rules, keeps users and order, says where a rule did not fire and why.

The rule language is described in `pattern.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qcn_compile.errors import IRError
from qcn_compile.ir.graph import Attr, Graph, Location, Op, Value
from qcn_compile.ir.match import Matcher, NoMatch
from qcn_compile.ir.optable import row
from qcn_compile.ir.pattern import Match, Node, Rule, literal
from qcn_compile.ir.verify import infer

__all__ = ["Fired", "Match", "Rewriter", "Rule", "remove_dead", "rewrite"]

KEEPS_NAME = {"linear", "slice", "reshape", "take_rows", "concat", "encode", "cast"}


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
        """Build the right side and put it in the place of the left. Returns the new root op.

        Raises IRError for a right side that uses what the left does not bind, or that loses an effect still needed.
        """
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
            kept = lasting(at) and at not in absorbed
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


def lasting(op: Op) -> bool:
    """Whether an op stays though nothing reads it: it changes a state, or other ranks wait for it."""
    return bool(row(op.name).effects) or row(op.name).collective


def remove_dead(graph: Graph) -> Graph:
    """Drop ops that are not `lasting` and whose results nothing reads."""
    live: set[Value] = set(graph.outputs)
    kept: list[Op] = []
    for op in reversed(graph.ops):
        if lasting(op) or any(v in live for v in op.results):
            kept.append(op)
            live.update(op.inputs)
    graph.ops = kept[::-1]
    return graph


@dataclass(frozen=True)
class Fired:
    """One application of a rule, or, with a reason, one place where it did not apply.

    rule: its name. where: location of the op in the traced model. value: name of its first result.
    """

    rule: str
    where: str
    value: str
    reason: str = ""


def rewrite(graph: Graph, rules: list[Rule]) -> list[Fired]:
    """Apply rules, in order, everywhere they match; report what fired and, at surviving markers, why not.

    Raises IRError for a rule with an op that no table has: it would never fire, or fail only where it does.
    """
    for rule in rules:
        for name in sorted(rule.ops):
            try:
                row(name)
            except IRError as error:
                raise IRError(f"rule {rule.name} ({rule.equation}): {error}") from None
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


