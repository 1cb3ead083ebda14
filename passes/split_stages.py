"""split-stages: the graph of a model becomes that of one stage of a pipeline, which has some consecutive layers.

What the first layer of a stage reads comes from the stage before, and so on; the embedding is in the first stage, norm
and output projection in the last, which hands the logits to all others: rank 0 returns them, and cards choose tokens on
every rank alike. The draft head stays whole on every stage, since all draft alike, too: the last hands its hidden
states to the others, then. What depends on neither tokens nor states (rotary tables) every stage makes for itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from qcn_compile.errors import PassError, UsageError
from qcn_compile.ir.graph import Attr, Graph, Location, Op, Value
from qcn_compile.ir.optable import row
from qcn_compile.ir.rewrite import Fired, remove_dead
from qcn_compile.ir.types import StateRef, Sym
from qcn_compile.ir.verify import infer
from qcn_compile.passes.base import Pass, PassContext, register_pass
from qcn_compile.targets.layout import Layout

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")
DRAFT = "mtp"  # the graph of the draft head
FREE = -1  # the stage of what every stage makes for itself


@register_pass
@dataclass(frozen=True)
class SplitStages(Pass):
    """Stage `stage` of `pp`; `part` is the rank's place among the `tp` ranks of a stage. `draft`: there is a draft
    head, which reads the last hidden states."""

    name: ClassVar[str] = "split-stages"
    after: ClassVar[tuple[str, ...]] = ("shard", "fuse-attention", "fuse-deltanet", "fuse-moe", "fuse-epilogue",
                                        "select-rows")
    stage: int = 0
    pp: int = 1
    part: int = 0
    tp: int = 1
    draft: bool = False

    def run(self, graph: Graph, context: PassContext) -> Graph:
        if self.pp == 1 or graph.name == DRAFT:
            return graph
        stages = stages_of(graph, self.pp)
        ops = [op for op in graph.ops if stages[op] in (FREE, self.stage)]
        ends, last, (logits, *hidden) = _Ends(graph), self.pp - 1, graph.outputs
        if self.stage > 0:
            ends.receive(boundary(graph, stages, self.stage), self._rank(self.stage - 1))
        if self.stage < last:
            sent = ends.send(boundary(graph, stages, self.stage + 1), self._rank(self.stage + 1))
            wanted = graph.outputs if self.draft else [logits]
            came = [ends.receive(value, self._rank(last)) for value in wanted]
            graph.outputs = [*came, *[sent][:len(graph.outputs) - len(came)]]
        else:
            graph.outputs = [self._spread(ends, logits), *(self._spread(ends, h) if self.draft else h for h in hidden)]
        graph.ops = [*ends.first, *ops, *ends.then]
        ends.rename(ops)
        used = {ref.name for op in graph.ops for ref in op.attrs.values() if isinstance(ref, StateRef)}
        graph.states = {name: state for name, state in graph.states.items() if name in used}
        context.note(self.name, [Fired("stage", graph.name, f"{len(ops)} of {len(stages)} ops")])
        return remove_dead(graph)

    def _spread(self, ends: _Ends, value: Value) -> Value:
        """The value, after all other stages have it, too."""
        for other in range(self.pp - 1):
            value = ends.send(value, self._rank(other))
        return value

    def _rank(self, stage: int) -> int:
        return stage * self.tp + self.part


def stages_of(graph: Graph, pp: int) -> dict[Op, int]:
    """The stage of every op: of its layer, or of what it reads. Raises UsageError for more stages than layers."""
    layers = 1 + max((int(found[1]) for op in graph.ops if (found := _LAYER.search(op.loc.module))), default=-1)
    if pp > layers:
        raise UsageError(f"--pp {pp}: @{graph.name} has {layers} layers; choose at most {layers} stages")
    place = {layer: stage for stage in range(pp) for layer in Layout(pp=pp).stage(stage, layers)}
    stages: dict[Op, int] = {}
    for op in graph.ops:
        before = max((stages[v.op] for v in op.inputs if v.op is not None), default=FREE)
        if before == FREE and op.name != "embedding" and not row(op.name).effects:
            stages[op] = FREE
            continue
        found = _LAYER.search(op.loc.module)
        stages[op] = max(before, place[int(found[1])] if found else 0)
    return stages


def boundary(graph: Graph, stages: dict[Op, int], stage: int) -> Value:
    """What a stage reads of the one before. Raises PassError when it is not one value."""
    read = [v for op in graph.ops if stages[op] == stage for v in op.inputs]
    read += graph.outputs if stage == max(stages.values()) else []
    found = list(dict.fromkeys(v for v in read if v.op is not None and stages[v.op] not in (FREE, stage)))
    if len(found) != 1 or found[0].op is None or stages[found[0].op] != stage - 1:
        raise PassError(f"split-stages: stage {stage} reads {', '.join(f'%{v.name}' for v in found)} of stages before; "
                        "only one value may go on, the sum behind a layer; keep the fusions in the pipeline")
    return found[0]


class _Ends:
    """The first and last ops of a stage: what comes and goes, each after the one before."""

    def __init__(self, graph: Graph) -> None:
        self.first: list[Op] = []
        self.then: list[Op] = []
        self._names = {v.name for op in graph.ops for v in op.results} | {v.name for v in graph.inputs}
        self._last, self._new = graph.inputs[0], dict[Value, Value]()

    def receive(self, value: Value, source: int) -> Value:
        """The value, from another rank."""
        rows, width = value.tensor.shape
        if not isinstance(rows, Sym) or not isinstance(width, int):
            raise PassError(f"split-stages: {value!r} cannot go from stage to stage; only rows of T or R can")
        attrs: dict[str, Attr] = {"source": source, "rows": rows.name, "width": width, "dtype": value.tensor.dtype}
        fresh = self._make("recv", self._last, attrs, value, self.then if self.then else self.first)
        self._new[value] = fresh
        return fresh

    def send(self, value: Value, to: int) -> Value:
        """The value, after it went to another rank, too."""
        return self._make("send", value, {"to": to}, value, self.then)

    def _make(self, name: str, operand: Value, attrs: dict[str, Attr], like: Value, ops: list[Op]) -> Value:
        number = next(n for n in range(len(self._names)) if f"{like.name}_{name}{n}" not in self._names)
        op = Op(name, [operand], [], attrs, like.op.loc if like.op is not None else Location())
        made = Value(f"{like.name}_{name}{number}", infer(name, [operand], attrs)[0], op)
        op.results.append(made)
        self._names.add(made.name)
        ops.append(op)
        self._last = made
        return made

    def rename(self, ops: Iterable[Op]) -> None:
        """Ops read what came in place of what another stage made."""
        for op in ops:
            op.operands = [self._new.get(v, v) if v is not None else None for v in op.operands]
