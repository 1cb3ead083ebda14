"""Matching a rule's left side against a graph, with the deepest reason where it does not fit."""

from __future__ import annotations

from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.optable import row
from qcn_compile.ir.pattern import Match, Node, Rule, literal

SKIPPED = {"cast?": ("cast",), "view?": ("reshape",)}


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
