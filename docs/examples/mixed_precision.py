"""A pass that keeps the first and the last layer in bf16 while the rest is int4.

    qcn-compile --quant int4 --plugin docs/examples/mixed_precision.py -o build
"""

import re
import sys
from dataclasses import dataclass
from typing import ClassVar

import qcn_compile as qcn
from qcn_compile.ir.rewrite import Fired

LAYER = re.compile(r"layers\.(\d+)(?:\.|$)")


@qcn.register_pass
@dataclass(frozen=True)
class KeepEnds(qcn.Pass):
    """encode {format="int4"} => encode {format="bf16"} in the first and last `layers` layers."""

    name: ClassVar[str] = "keep-ends"
    after: ClassVar[tuple[str, ...]] = ("select-quantization",)
    layers: int = 1

    def run(self, graph: qcn.Graph, context: qcn.PassContext) -> qcn.Graph:
        found = {op: int(m[1]) for op in graph.ops if op.name == "encode" and (m := LAYER.search(op.loc.module))}
        count = max(found.values(), default=0) + 1
        for op, layer in found.items():
            if op.attrs["format"] == "int4" and (layer < self.layers or layer >= count - self.layers):
                op.attrs |= {"format": "bf16", "activations": "f32"}
                context.note(self.name, [Fired("keep bf16", str(op.loc), op.result.name)])
        return graph


def configure(pipeline: qcn.Pipeline) -> None:
    """Before merge-linears, which joins only weights that are stored alike."""
    pipeline.insert(KeepEnds(), after="select-quantization")


def main(folder: str = "mixed-builds", *only: str) -> dict[str, float]:
    """Three builds (or those named), compared on held-out text: returns their perplexities."""
    from measure import held_out, report

    builds = {"bf16": {"quant": "none"}, "int4": {"quant": "int4"},
              "int4, ends in bf16": {"quant": "int4", "plugins": (__file__,)}}
    texts, found = held_out(), {}
    for name in only or builds:
        path = f"{folder}/{re.sub(r'[ ,]+', '-', name)}"
        qcn.compile(None, "cpu", path, **builds[name])
        found[name] = report(name, path, texts)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
