"""Random inputs and weights for any graph, so that it can be interpreted without a checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from qcn_compile.errors import UsageError
from qcn_compile.ir.batch import TORCH, Batch, Caches
from qcn_compile.ir.graph import Graph, Value
from qcn_compile.ir.types import BatchType, DType, TensorType, size_of

LENGTHS = (3, 1, 4)  # tokens of the sequences of the sample batch
LIMIT = 4 << 30  # bytes of weights that are still made


def sample_inputs(graph: Graph, seed: int = 0) -> dict[str, Any]:
    """Inputs for sequences of LENGTHS tokens that start from nothing; every token's logits are wanted."""
    made = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS)
    sizes = {"T": tokens, "R": tokens, "S": len(LENGTHS)}
    values: dict[str, Any] = {}
    for value in graph.inputs:
        if isinstance(value.type, BatchType):
            values[value.name] = sample_batch(graph)
        elif value.name == "positions":
            values[value.name] = torch.cat([torch.arange(n, dtype=torch.int32) for n in LENGTHS])
        elif value.tensor.dtype.is_float:
            values[value.name] = _normal(value.tensor, sizes, made)
        else:
            values[value.name] = _indices(value.tensor, sizes, _bound(graph, value))
    return values


def _indices(type_: TensorType, sizes: dict[str, int], bound: int) -> torch.Tensor:
    shape = [d if isinstance(d, int) else d.at(sizes) for d in type_.shape]
    return (torch.arange(size_of(type_.shape, sizes)) % bound).reshape(shape).to(TORCH[type_.dtype.value])


def sample_batch(graph: Graph) -> Batch:
    """A ragged batch of LENGTHS, with caches for the states of the graph: four tokens a page."""
    batch = Batch.fresh(list(LENGTHS))
    batch.caches = Caches(graph.states, slots=len(LENGTHS), pages=len(LENGTHS), page_size=4)
    batch.block_tables = [[2], [0], [1]]
    return batch


def sample_weights(graph: Graph, seed: int = 1) -> dict[str, torch.Tensor]:
    """Every weight of the graph, normal with deviation 1/sqrt(last size). Raises UsageError for too many bytes."""
    types = {str(op.attrs["name"]): op.result.tensor for op in graph.ops if op.name == "weight"}
    total = sum(t.bytes() for t in types.values())
    if total > LIMIT:
        raise UsageError(f"@{graph.name} has {total / 1e9:.1f} GB of weights, more than the {LIMIT / 1e9:.0f} GB "
                         "that are made up for a run; use a smaller model")
    made = torch.Generator().manual_seed(seed)
    return {name: _normal(type_, {}, made) for name, type_ in sorted(types.items())}


def _normal(type_: TensorType, sizes: dict[str, int], made: torch.Generator) -> torch.Tensor:
    shape = [d if isinstance(d, int) else d.at(sizes) for d in type_.shape]
    scale = 1.0 if sizes or not shape else float(shape[-1]) ** -0.5
    return (torch.randn(shape, generator=made) * scale).to(TORCH[type_.dtype.value])


def _bound(graph: Graph, value: Value) -> int:
    """Indices stay below what the op that reads them can take."""
    bound = sum(LENGTHS)
    for op in graph.ops:
        if op.name == "embedding" and op.operands[0] is value and op.operands[1] is not None:
            bound = min(bound, int(op.operands[1].tensor.shape[0]))  # type: ignore[arg-type]
        if op.name in ("moe_experts", "moe_add") and op.operands[1] is value and op.operands[3] is not None:
            bound = min(bound, int(op.operands[3].tensor.shape[0]))  # type: ignore[arg-type]
    return 2 if value.tensor.dtype is DType.i1 else bound
