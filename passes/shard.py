"""shard: the graph of the whole model becomes the graph of one rank.

Each op that works head by head or expert by expert takes a share; what feeds it is followed back to the weights, of
which only the wanted rows are kept. The projection behind it keeps the matching columns, and an `all_reduce` adds up
what the ranks hold. A residual is added by rank 0 alone, before the sum, so that every fused kernel stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcn_compile.errors import UsageError
from qcn_compile.ir.graph import Attr, Graph, Op, Value
from qcn_compile.ir.rewrite import Fired, Rewriter
from qcn_compile.ir.types import R, StateRef, StateType
from qcn_compile.passes.base import Pass, PassContext, register_pass
from qcn_compile.passes.narrow import Run, columns, rows, slab


@dataclass(frozen=True)
class Share:
    """The heads of one rank: `count` from `first` on. When there are more ranks than heads, `parts` ranks compute the
    same head and each hands on part `part` of its columns."""

    first: int
    count: int
    part: int = 0
    parts: int = 1

    def runs(self, width: int, start: int = 0) -> tuple[Run, ...]:
        """Columns of the heads, each `width` wide, the first head's at `start`."""
        return ((start + self.first * width, self.count * width),)


def share(heads: int, rank: int, ranks: int, what: str) -> Share:
    """The rank's share of `heads`. Raises UsageError when neither number divides the other."""
    if heads % ranks == 0:
        return Share(rank * heads // ranks, heads // ranks)
    if ranks % heads == 0:
        parts = ranks // heads
        return Share(rank // parts, 1, rank % parts, parts)
    raise UsageError(f"--tp {ranks}: {heads} {what} cannot be shared evenly among {ranks} ranks; "
                     f"choose a --tp that divides {heads} or is a multiple of it")


@register_pass
@dataclass(frozen=True)
class Shard(Pass):
    """Rank `rank` of `tp`; the experts are spread over `ep` groups of ranks, which cut each expert in tp/ep slices."""

    name: ClassVar[str] = "shard"
    after: ClassVar[tuple[str, ...]] = ("fuse-attention", "fuse-deltanet", "fuse-moe", "fuse-epilogue", "select-rows")
    rank: int = 0
    tp: int = 1
    ep: int = 1

    def run(self, graph: Graph, context: PassContext) -> Graph:
        if self.tp == 1:
            return graph
        if self.tp % self.ep:
            raise UsageError(f"--ep {self.ep}: the {self.tp} ranks of --tp {self.tp} cannot form {self.ep} equal "
                             f"groups; choose a divisor of {self.tp}")
        worker = _Sharder(graph, self, context)
        steps = {"rope_append": worker.rope_append, "delta_net": worker.delta_net, "moe_experts": worker.experts,
                 "moe_add": worker.experts, "embedding": worker.embedding, "silu_mul": worker.mlp}
        for op in list(graph.ops):
            if op.name in steps:
                steps[op.name](op)
        worker.head()
        return worker.rewriter.finish()


class _Sharder:
    """One run of the pass over one graph."""

    def __init__(self, graph: Graph, options: Shard, context: PassContext) -> None:
        self.graph, self.context = graph, context
        self.rank, self.ranks, self.groups = options.rank, options.tp, options.ep
        self.rewriter = Rewriter(graph)

    def note(self, rule: str, op: Op, reason: str = "") -> None:
        self.context.note(Shard.name, [Fired(rule, str(op.loc), op.results[0].name, reason)])

    def make(self, name: str, operands: list[Value | None], attrs: dict[str, Attr], op: Op) -> Value:
        """A new op with the location of an old one; its first result."""
        return self.rewriter.make(name, operands, attrs, op.loc, op.results[0].name).results[0]

    # ---- token mixers ----

    def rope_append(self, op: Op) -> None:
        """Query heads, and the key and value heads they read, with the attention that follows."""
        q, k, v = (operand for operand in op.operands[:3])
        assert q is not None and k is not None and v is not None
        heads, kv_heads, dim = int(q.tensor.shape[1]), int(k.tensor.shape[1]), int(q.tensor.shape[2])  # type: ignore
        mine = share(heads, self.rank, self.ranks, "query heads")
        group = heads // kv_heads
        first = mine.first // group
        kv = Share(first, (mine.first + mine.count - 1) // group - first + 1)
        if mine.count % kv.count or (kv.count > 1 and mine.first % group):
            raise UsageError(f"--tp {self.ranks}: {mine.count} query heads a rank straddle {kv.count} key heads of "
                             f"{kv_heads}; choose a --tp that divides {kv_heads} or is a multiple of it")
        parts = [self._heads(x, of, dim, op) for x, of in ((q, mine), (k, kv), (v, kv))]
        fresh = self.rewriter.make("rope_append", [*parts, *op.operands[3:]], dict(op.attrs), op.loc,
                                   op.results[0].name)
        self.rewriter.after(fresh, op)
        self._state(op, "state", (kv.count, dim))
        for user in list(self.rewriter.users[op.result]):
            if user.name != "paged_attention":
                raise UsageError(f"shard: {user.name} reads the query of {op.loc}; keep the pass fuse-attention")
            self._attend(user, fresh.result, mine, dim)
        self.rewriter.prune(op, {op})
        self.note("heads" if kv.count * self.ranks == kv_heads else "heads, key heads replicated", op)

    def _heads(self, value: Value, mine: Share, dim: int, op: Op) -> Value:
        flat = columns(self.rewriter, value, mine.runs(dim))
        shape = (value.tensor.shape[0], mine.count, dim)
        return self.make("reshape", [flat], {"shape": shape}, op)  # type: ignore[dict-item]

    def _attend(self, op: Op, query: Value, mine: Share, dim: int) -> None:
        gate = op.operands[1]
        gate = columns(self.rewriter, gate, mine.runs(dim)) if gate is not None else None
        fresh = self.rewriter.make("paged_attention", [query, gate, *op.operands[2:]], dict(op.attrs), op.loc,
                                   op.result.name)
        self.rewriter.after(fresh, op)
        self._project(op, fresh.result, mine, dim)

    def delta_net(self, op: Op) -> None:
        """Value heads with their key heads: rows of qkvz and ba, channels of the convolution, decay, states."""
        number = {key: int(op.attrs[key]) for key in ("key_heads", "value_heads", "key_dim", "value_dim")}  # type: ignore
        key_heads, dim, wide = number["key_heads"], number["key_dim"], number["value_dim"]
        mine = share(number["value_heads"], self.rank, self.ranks, "DeltaNet value heads")
        group = number["value_heads"] // key_heads
        keys = Share(mine.first // group, max(1, mine.count // group))
        if mine.count % group and group % mine.count:
            raise UsageError(f"--tp {self.ranks}: {mine.count} DeltaNet value heads a rank do not fit the {group} of a "
                             f"key head; choose a --tp that divides {key_heads}")
        span = key_heads * dim
        channels = (*keys.runs(dim), *keys.runs(dim, span), *mine.runs(wide, 2 * span))
        qkv, z, b, a, conv, decay, bias, norm, batch = op.operands
        assert qkv and z and b and a and conv and decay and bias
        cut = self.rewriter
        operands: list[Value | None] = [
            columns(cut, qkv, channels), columns(cut, z, mine.runs(wide)), columns(cut, b, mine.runs(1)),
            columns(cut, a, mine.runs(1)), rows(cut, conv, channels), rows(cut, decay, mine.runs(1)),
            rows(cut, bias, mine.runs(1)), norm, batch]
        attrs = {**op.attrs, "key_heads": keys.count, "value_heads": mine.count}
        fresh = cut.make("delta_net", operands, attrs, op.loc, op.result.name)
        cut.after(fresh, op)
        self._state(op, "conv", (sum(n for _, n in channels), *self._shape(op, "conv")[1:]))
        self._state(op, "delta", (mine.count, dim, wide))
        self._project(op, fresh.result, mine, wide)
        self.note("heads" if keys.count * self.ranks == key_heads else "heads, key heads replicated", op)

    def _shape(self, op: Op, attr: str) -> tuple[int, ...]:
        ref = op.attrs[attr]
        return self.graph.states[ref.name].shape if isinstance(ref, StateRef) else (0, 0)

    def _state(self, op: Op, attr: str, shape: tuple[int, ...]) -> None:
        ref = op.attrs[attr]
        if isinstance(ref, StateRef):
            old = self.graph.states[ref.name]
            self.graph.states[ref.name] = StateType(old.kind, old.dtype, shape)

    # ---- what reads a share ----

    def _project(self, op: Op, fresh: Value, mine: Share, width: int) -> None:
        """`fresh` holds the heads `mine` of what `op` made; projections that read it keep their columns of these."""
        (start, count), = mine.runs(width)
        if mine.parts > 1:
            if width % mine.parts:
                raise UsageError(f"--tp {self.ranks}: {mine.parts} ranks would share a head of {width} channels; "
                                 "choose a smaller --tp")
            count = width // mine.parts
            at = mine.part * count
            fresh = self.make("slice", [fresh], {"axis": 1, "start": at, "stop": at + count}, op)
            start += at
        for user in list(self.rewriter.users[op.result]):
            if user.name not in ("linear", "linear_add") or user.operands[0] is not op.result:
                raise UsageError(f"shard: {user.name} reads the heads of {op.loc}; only a projection may")
            weight = user.operands[1]
            assert weight is not None
            self._sum(user, fresh, slab(self.rewriter, weight, 1, ((start, count),)))
        self.rewriter.prune(op, {op})

    def _sum(self, op: Op, x: Value, weight: Value) -> None:
        """A projection of which every rank holds some columns: products, rank 0's with the residual or bias, summed."""
        extra = op.operands[2] if len(op.operands) > 2 and self.rank == 0 else None
        name = "linear" if extra is None else op.name
        product = self.make(name, [x, weight, extra] if extra is not None else [x, weight], {}, op)
        self._reduce(op, product)

    def _reduce(self, op: Op, partial: Value) -> None:
        total = self.rewriter.make("all_reduce", [partial], {"ranks": self.ranks}, op.loc, op.results[0].name)
        self.rewriter.replace(op.results[0], total.result)
        self.rewriter.prune(op, set())

    # ---- experts ----

    def experts(self, op: Op) -> None:
        """Whole experts by group, slices of the inner dimension within a group."""
        x, ids, weights, gate_up, down = op.operands[:5]
        assert x and ids and weights and gate_up and down
        slices = self.ranks // self.groups
        group, part = divmod(self.rank, slices)
        if self.groups > 1:
            ids, weights, gate_up, down = self._group(op, group, (ids, weights, gate_up, down))
        inner = int(down.tensor.shape[2])  # type: ignore[arg-type]
        if inner % slices:
            raise UsageError(f"--tp {self.ranks} --ep {self.groups}: experts of {inner} channels cannot be cut into "
                             f"{slices} slices; choose a --ep of at least {self.ranks // _divisor(inner, slices)}")
        count = inner // slices
        run = (part * count, count)
        gate_up = slab(self.rewriter, gate_up, 1, (run, (inner + run[0], count)))
        down = slab(self.rewriter, down, 2, (run,))
        operands: list[Value | None] = [x, ids, weights, gate_up, down]
        with_residual = op.name == "moe_add" and self.rank == 0
        if with_residual:
            operands.append(op.operands[5])
        self._reduce(op, self.make("moe_add" if with_residual else "moe_experts", operands, dict(op.attrs), op))
        self.note(f"experts in {self.groups} groups, {slices} slices" if self.groups > 1 else "experts sliced", op)

    def _group(self, op: Op, group: int, operands: tuple[Value, Value, Value, Value]) -> tuple[Value, ...]:
        """The routing and the weights of one group's experts; a shared expert is every group's last."""
        ids, weights, gate_up, down = operands
        router = ids.op
        shared = router is not None and router.attrs.get("shared") is True
        total = int(down.tensor.shape[0])  # type: ignore[arg-type]
        routed = total - int(shared)
        first, stop = (g * routed // self.groups for g in (group, group + 1))
        if routed < self.groups:
            raise UsageError(f"--ep {self.groups}: the model has {routed} experts; choose a smaller --ep")
        attrs: dict[str, Attr] = {"first": first, "count": stop - first, "shared": routed if shared else -1,
                                  "group": group, "groups": self.groups}
        local = self.rewriter.make("local_experts", [ids, weights], attrs, op.loc, op.results[0].name)
        runs = ((first, stop - first), (routed, 1)) if shared else ((first, stop - first),)
        return (*local.results, rows(self.rewriter, gate_up, runs), rows(self.rewriter, down, runs))

    def mlp(self, op: Op) -> None:
        """A dense SwiGLU: rows of gate and up, columns of down."""
        gate, up = op.operands
        assert gate is not None and up is not None
        readers, width = self.rewriter.users[op.result], int(op.result.tensor.shape[-1])  # type: ignore[arg-type]
        plain = all(v.op is not None and v.op.name == "linear" for v in (gate, up))
        if not plain or any(user.name not in ("linear", "linear_add") for user in readers) or width % self.ranks:
            self.note("columns", op, f"{width} columns between other ops than projections, or not a multiple of "
                                     f"{self.ranks}: every rank computes it")
            return
        mine = share(width, self.rank, self.ranks, "columns")
        halves = [columns(self.rewriter, v, mine.runs(1)) for v in (gate, up)]
        self._project(op, self.make("silu_mul", list(halves), {}, op), mine, 1)
        self.note("columns", op)

    # ---- vocabulary ----

    def embedding(self, op: Op) -> None:
        """Rows of the table; what the ranks found is added up."""
        ids, table = op.operands
        assert ids is not None and table is not None
        size = int(table.tensor.shape[0])  # type: ignore[arg-type]
        if size % self.ranks:
            self.note("vocabulary", op, f"{size} tokens are no multiple of {self.ranks}: every rank holds the table")
            return
        run = (self.rank * size // self.ranks, size // self.ranks)
        part = self.make("embedding", [ids, rows(self.rewriter, table, (run,))], {"first": run[0]}, op)
        self._reduce(op, part)
        self.note("vocabulary", op)

    def head(self) -> None:
        """Rows of the output projection; the logits are gathered."""
        logits = self.graph.outputs[0]
        op = logits.op
        if op is None or op.name != "linear" or logits.tensor.shape[0] != R:
            return
        x, weight = op.inputs[:2]
        size = int(weight.tensor.shape[0])  # type: ignore[arg-type]
        if size % self.ranks:
            self.note("vocabulary", op, f"{size} tokens are no multiple of {self.ranks}: every rank makes all logits")
            return
        run = (self.rank * size // self.ranks, size // self.ranks)
        part = self.make("linear", [x, rows(self.rewriter, weight, (run,))], {}, op)
        self.rewriter.replace(logits, self.make("all_gather", [part], {"ranks": self.ranks}, op))
        self.rewriter.prune(op, set())
        self.note("vocabulary", op)


def _divisor(size: int, most: int) -> int:
    """The largest number up to `most` that divides `size` and is a divisor of `most`."""
    return next(n for n in range(most, 0, -1) if most % n == 0 and size % n == 0)
