"""Expert pruning by routing statistics: count which experts a text uses, then drop the least used ones of each layer.

    python docs/examples/prune_experts.py            # statistics, pruned build, and what it costs in perplexity

The statistics come from the graph itself, run by the interpreter up to the routers, so any text may be counted. Pruning
is lossy: tokens that wanted a dropped expert get the next best one.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import qcn_compile as qcn
from qcn_compile.errors import UsageError
from qcn_compile.ir.graph import Op
from qcn_compile.ir.interpret import default_inputs, run
from qcn_compile.ir.rewrite import Fired, Rewriter

STATISTICS = "routing.json"


def routers(graph: qcn.Graph) -> dict[str, Op]:
    """The moe_route op of every layer, by the layer's module path."""
    return {op.loc.module: op for op in graph.ops if op.name == "moe_route"}


def collect(graph: qcn.Graph, weights: Any, sequences: list[list[int]]) -> dict[str, list[int]]:
    """How often each expert was chosen, per layer. `graph` has passed fuse-moe; a shared expert is not counted."""
    names = {op: name for name, op in routers(graph).items()}
    counts: dict[str, Counter[int]] = {name: Counter() for name in names.values()}

    def watch(op: Op, results: list[Any]) -> None:
        if op in names:
            counts[names[op]].update(results[0][:, :int(op.attrs["top_k"])].flatten().tolist())

    run(graph, default_inputs(graph, sequences), weights, watch)
    experts = {name: int(op.operands[0].tensor.shape[1]) - int(op.attrs["shared"]) for op, name in names.items()}
    return {name: [counts[name][e] for e in range(experts[name])] for name in counts}


@qcn.register_pass
@dataclass(frozen=True)
class PruneExperts(qcn.Pass):
    """Rows of the router and slices of the experts that remain: take_rows, evaluated at build time."""

    name: ClassVar[str] = "prune-experts"
    after: ClassVar[tuple[str, ...]] = ("fuse-moe",)
    statistics: str = STATISTICS
    keep: int = 12

    def run(self, graph: qcn.Graph, context: qcn.PassContext) -> qcn.Graph:
        table = json.loads(Path(self.statistics).read_text())
        rewriter = Rewriter(graph)
        for experts in [op for op in graph.ops if op.name == "moe_experts"]:
            route = experts.operands[1].op
            counts = table[route.loc.module]
            if not int(route.attrs["top_k"]) <= self.keep <= len(counts):
                raise UsageError(f"prune-experts: keep={self.keep} must lie between top_k={route.attrs['top_k']} and "
                                 f"{len(counts)} experts of {route.loc.module}")
            kept = sorted(sorted(range(len(counts)), key=lambda e: -counts[e])[:self.keep])
            prune(rewriter, experts, route, kept, len(counts))
            share = sum(counts[e] for e in kept) / max(sum(counts), 1)
            context.note(self.name, [Fired(f"keep {self.keep} of {len(counts)}, {share:.1%} of the choices",
                                           str(experts.loc), experts.result.name)])
        return rewriter.finish()


def prune(rewriter: Rewriter, experts: Op, route: Op, kept: list[int], total: int) -> None:
    """Replace one moe_experts and its router by smaller ones. A shared expert is the last row and stays."""
    rows = [*kept, total] if route.attrs["shared"] else kept
    runs = tuple((row, 1) for row in rows)
    linear = route.operands[0].op
    take = lambda value: rewriter.make("take_rows", [value], {"runs": runs}, experts.loc, value.name).result  # noqa: E731
    logits = rewriter.make("linear", [linear.operands[0], take(linear.operands[1])], {}, linear.loc, "router").result
    fresh = rewriter.make("moe_route", [logits], dict(route.attrs), route.loc, "route")
    x, _, _, gate_up, down = experts.operands
    smaller = rewriter.make("moe_experts", [x, *fresh.results, take(gate_up), take(down)], dict(experts.attrs),
                            experts.loc, experts.result.name)
    rewriter.replace(experts.result, smaller.result)
    rewriter.prune(experts, set())


def configure(pipeline: qcn.Pipeline) -> None:
    """Right after fuse-moe, while every layer still has one router and one bank of experts."""
    pipeline.insert(PruneExperts(), after="fuse-moe")


def statistics(texts: list[str], tokenizer: Any) -> dict[str, list[int]]:
    """Routing counts of the bundled model over some texts."""
    from qcn_compile.compile import Options, optimised
    from qcn_compile.frontend import trace_model
    from qcn_compile.frontend.checkpoint import locate
    from qcn_compile.pipeline import Tracing

    graph = optimised(None, "cpu", Options(tracing=Tracing(stop_after="fuse-moe")))
    weights = trace_model(locate(None, "cpu")).weights
    return collect(graph, weights.get, [tokenizer(text) for text in texts])


def main(folder: str = "pruned-builds", keep: str = "12") -> None:
    """Count on some held-out texts, measure on others."""
    from measure import held_out, report

    texts = held_out(12)
    qcn.compile(None, "cpu", f"{folder}/whole")
    with qcn.load(f"{folder}/whole") as model:
        table = statistics(texts[:4], model.encode)
    file = Path(folder) / STATISTICS
    file.write_text(json.dumps(table))
    pipeline = qcn.Pipeline.default("bf16").insert(PruneExperts(str(file), int(keep)), after="fuse-moe")
    qcn.compile(None, "cpu", f"{folder}/pruned", pipeline=pipeline)
    report("all experts", f"{folder}/whole", texts[4:])
    report(f"{keep} experts a layer", f"{folder}/pruned", texts[4:])


if __name__ == "__main__":
    main(*sys.argv[1:])
