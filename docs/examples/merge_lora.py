"""LoRA at compile time: w + scale * B A as weight-only IR, which the build evaluates; kernels never see it.

    LORA=adapter/ qcn-compile --plugin docs/examples/merge_lora.py -o build

`adapter/` is what PEFT saves: adapter_config.json and adapter_model.safetensors.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from safetensors import safe_open
from torch import Tensor

import qcn_compile as qcn
from qcn_compile.errors import ModelError
from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.optable import same
from qcn_compile.ir.rewrite import Fired
from qcn_compile.ir.types import DType, TensorType

PEFT = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight$")


@qcn.register_op("file_tensor", "", file=str, key=str, shape=tuple,
                 infer=lambda *, file, key, shape: TensorType(DType.f32, shape))
def file_tensor(*, file: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a safetensors file that is not the checkpoint."""
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(key).float()


@qcn.register_op("lora", "w, a, b", scale=float, infer=same())
def lora(w: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """w + scale * b a. w [N, K], a [r, K], b [N, r]."""
    return (w.float() + scale * (b @ a)).to(w.dtype)


@qcn.register_pass
@dataclass(frozen=True)
class MergeLora(qcn.Pass):
    """weight => lora(weight, A, B) for every module the adapter names. Runs first: others fuse the merged weights."""

    name: ClassVar[str] = "merge-lora"
    adapter: str = ""

    def run(self, graph: qcn.Graph, context: qcn.PassContext) -> qcn.Graph:
        weights = {str(op.attrs["name"]): op for op in graph.ops if op.name == "weight"}
        for module, pair, scale in read_adapter(Path(self.adapter)):
            target = weights.get(f"{module}.weight")
            if target is None:
                raise ModelError(f"{self.adapter} adapts {module}, which the model lacks; is it for another model?")
            insert(graph, target, pair, scale)
            context.note(self.name, [Fired("merge", str(target.loc), target.result.name)])
        return graph


def read_adapter(folder: Path) -> Iterator[tuple[str, tuple[Op, Op], float]]:
    """Module path, the two `file_tensor` ops (A, B) and the scale, for each adapted module."""
    config = json.loads((folder / "adapter_config.json").read_text())
    rank = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    file, found = folder / "adapter_model.safetensors", {}
    with safe_open(file, framework="np") as tensors:
        for key in tensors.keys():  # noqa: SIM118 (not a dict)
            if m := PEFT.match(key):
                shape = tuple(tensors.get_slice(key).get_shape())
                op = Op("file_tensor", [], [], {"file": str(file), "key": key, "shape": shape})
                op.results = [Value(f"lora.{m['module']}.{m['part']}", TensorType(DType.f32, shape), op)]
                found.setdefault(m["module"], {})[m["part"]] = op
    for module, parts in found.items():
        yield module, (parts["A"], parts["B"]), config["lora_alpha"] / rank


def insert(graph: qcn.Graph, target: Op, pair: tuple[Op, Op], scale: float) -> None:
    """Readers of a weight read lora(weight, a, b) instead."""
    merged = Op("lora", [], [], {"scale": float(scale)}, target.loc)
    merged.results = [Value(f"{target.result.name}.merged", target.result.type, merged)]
    graph.replace_uses(target.result, merged.result)
    merged.operands = [target.result, pair[0].result, pair[1].result]
    at = graph.ops.index(target) + 1
    graph.ops[at:at] = [*pair, merged]


def configure(pipeline: qcn.Pipeline) -> None:
    """First of all passes. The adapter's folder comes from the environment."""
    pipeline.passes.insert(0, MergeLora(os.environ["LORA"]))
