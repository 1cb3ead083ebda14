"""A pass that counts: FLOPs per layer of one decode step, printed as a table.

    qcn-compile --plugin docs/examples/count_flops.py -o build
"""

from dataclasses import dataclass
from typing import ClassVar

import qcn_compile as qcn
from qcn_compile.ir.optable import row


def flops_per_layer(graph: qcn.Graph, tokens: int = 1) -> dict[str, int]:
    """FLOPs of each layer ("" for what is in none) when `tokens` tokens of one sequence go through the graph."""
    sizes, table = {"T": tokens, "S": 1, "R": 1}, {}
    for op in graph.ops:
        parts = op.loc.module.split(".")
        layer = ".".join(parts[:3]) if "layers" in parts else ""
        cost = row(op.name).cost([v.type if v else None for v in op.operands], [v.type for v in op.results],
                                 dict(op.attrs), sizes)
        weight_only = not any("T" in str(v.type) or "R" in str(v.type) for v in op.results)
        table[layer] = table.get(layer, 0) + (0 if weight_only else cost.flops)
    return table


@qcn.register_pass
@dataclass(frozen=True)
class CountFlops(qcn.Pass):
    """Changes nothing; prints a line a layer. Fields are options."""

    name: ClassVar[str] = "count-flops"
    tokens: int = 1

    def run(self, graph: qcn.Graph, context: qcn.PassContext) -> qcn.Graph:
        table = flops_per_layer(graph, self.tokens)
        for layer, flops in table.items():
            print(f"{layer or 'embedding, norm, head':24} {flops / 1e6:10.3f} MFLOP")
        print(f"{'total':24} {sum(table.values()) / 1e6:10.3f} MFLOP")
        return graph


def configure(pipeline: qcn.Pipeline) -> None:
    """Called for every build: count at the very end."""
    pipeline.insert(CountFlops())
