"""What a pass is, and the record of what passes did and did not do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from qcn_compile.errors import PassError
from qcn_compile.ir.graph import Graph
from qcn_compile.ir.rewrite import Fired, Rule, rewrite


@dataclass
class PassContext:
    """What passes may know besides the graph: the target's name; and the log, (pass, event), of what they did."""

    target: str = "cpu"
    log: list[tuple[str, Fired]] = field(default_factory=list)

    def note(self, name: str, events: list[Fired]) -> None:
        """Record events of the pass `name`."""
        self.log += [(name, event) for event in events]

    def fired(self, name: str) -> list[Fired]:
        """What the pass did."""
        return [e for n, e in self.log if n == name and not e.reason]

    def refused(self, name: str) -> list[Fired]:
        """What the pass left alone, each with the reason."""
        return [e for n, e in self.log if n == name and e.reason]


@dataclass(frozen=True)
class Pass:
    """A graph-to-graph step. Fields of a subclass are its options. Valid IR in, valid IR out; the input is not kept.

    `name` is its name in pipelines; `after` lists passes that must have run earlier when they run at all.
    """

    name: ClassVar[str] = ""
    after: ClassVar[tuple[str, ...]] = ()

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The transformed graph. An error raised here reaches the user with the pass, its plugin and the op."""
        raise NotImplementedError


@dataclass(frozen=True)
class RulePass(Pass):
    """A pass that is a list of equations, `rules`, applied in order wherever they match."""

    rules: ClassVar[list[Rule]] = []

    def run(self, graph: Graph, context: PassContext) -> Graph:
        context.note(self.name, rewrite(graph, self.rules))
        return graph


REGISTRY: dict[str, type[Pass]] = {}


def register_pass(cls: type[Pass]) -> type[Pass]:
    """Make a pass known by name, so that command lines and plugins can use it.

    Raises PassError for a class without `name`, or with one that is taken.
    """
    if not cls.name:
        raise PassError(f"pass {cls.__name__} needs a class attribute `name`")
    if cls.name in REGISTRY and REGISTRY[cls.name] is not cls:
        raise PassError(f"a pass named {cls.name!r} is registered already; choose another name")
    REGISTRY[cls.name] = cls
    return cls
