"""Expert pruning by routing statistics: the runtime counts which experts a text uses, layers drop the least used.

    python docs/examples/prune_experts.py            # statistics, pruned build, and what it costs in perplexity

or, with text of your own:

    qcn-run build/ --batch requests.jsonl --expert-statistics routing.json
    qcn-compile --plugin docs/examples/prune_experts.py -o pruned

Pruning is lossy: tokens that wanted a dropped expert get the next best one.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import qcn_compile as qcn
from qcn_compile.errors import UsageError
from qcn_compile.ir.graph import Op
from qcn_compile.ir.rewrite import Fired, Rewriter
from qcn_compile.runtime.routing import read

STATISTICS = "routing.json"


def collect(build: str | Path, texts: list[str], file: str | Path) -> dict[str, list[int]]:
    """Run texts through a build while it counts; the counts go to `file` and are returned, per layer and expert."""
    with qcn.load(build) as model:
        model.count_experts(file)
        for text in texts:
            model.logits(model.encode(text))
    return read(file)


@qcn.register_pass
@dataclass(frozen=True)
class PruneExperts(qcn.Pass):
    """Rows of the router and slices of the experts that remain: take_rows, evaluated at build time."""

    name: ClassVar[str] = "prune-experts"
    after: ClassVar[tuple[str, ...]] = ("fuse-moe",)
    statistics: str = STATISTICS
    keep: int = 12

    def run(self, graph: qcn.Graph, context: qcn.PassContext) -> qcn.Graph:
        table = read(self.statistics)
        rewriter = Rewriter(graph)
        for experts in [op for op in graph.ops if op.name == "moe_experts"]:
            route = experts.operands[1].op
            counts = table.get(route.loc.module)
            if counts is None:
                raise UsageError(f"{self.statistics} has no counts of {route.loc.module}; is it of another model?")
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


def main(folder: str = "pruned-builds", keep: str = "12") -> dict[str, float]:
    """Count on some held-out texts, measure on others: prints a line a build, returns their perplexities."""
    from measure import held_out, report

    texts, file = held_out(12), Path(folder) / STATISTICS
    qcn.compile(None, "cpu", f"{folder}/whole")
    collect(f"{folder}/whole", texts[:4], file)
    pipeline = qcn.Pipeline.default(base="bf16").insert(PruneExperts(str(file), int(keep)), after="fuse-moe")
    qcn.compile(None, "cpu", f"{folder}/pruned", pipeline=pipeline)
    return {name: report(name, f"{folder}/{build}", texts[4:])
            for name, build in (("all experts", "whole"), (f"{keep} experts a layer", "pruned"))}


if __name__ == "__main__":
    main(*sys.argv[1:])
