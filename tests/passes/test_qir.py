"""Every .qir case: run its passes, check the text, what fired and what was refused, and that numbers did not change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qcn_compile.ir.batch import TORCH, Batch, Caches
from qcn_compile.ir.graph import Graph
from qcn_compile.ir.interpret import run, run_ranks
from qcn_compile.ir.text import parse_graph, print_graph
from qcn_compile.ir.types import BatchType
from qcn_compile.passes.base import PassContext
from qcn_compile.pipeline import Pipeline, Tracing, passes_by_name

CASES = sorted((Path(__file__).parent / "qir").glob("*.qir"))
LENGTHS = [3, 1, 4]


def directives(text: str, key: str) -> list[str]:
    """Values of `// KEY: value` lines."""
    return [m.strip() for m in re.findall(rf"^// {key}: (.*)$", text, re.M)]


def ranks(text: str) -> dict[str, int]:
    """Options of `// RANKS: tp=4,ep=2`, or of `// RANKS: pp=2` for stages."""
    given = directives(text, "RANKS")
    return {key: int(n) for key, n in (item.split("=") for item in given[0].split(","))} if given else {}


def optimise(text: str, context: PassContext, **options: object) -> Graph:
    passes = list(passes_by_name(directives(text, "RUN")[0].split(",")))
    pipeline = Pipeline(passes)
    for option in directives(text, "OPTIONS"):
        pipeline.replace(passes[-1].name, **dict([option.split("=")]))
    if options:
        pipeline.replace(passes[-1].name, **options)
    return pipeline.run(parse_graph(text), context, Tracing(verify=True))


def check_lines(text: str, out: str) -> None:
    """CHECK lines appear in order; CHECK-NOT lines nowhere."""
    at = 0
    for line in directives(text, "CHECK"):
        found = out.find(line, at)
        assert found >= 0, f"CHECK {line!r} not found after offset {at} in\n{out}"
        at = found
    for line in directives(text, "CHECK-NOT"):
        assert line not in out, f"CHECK-NOT {line!r} found in\n{out}"


def random_inputs(graph: Graph) -> dict[str, object]:
    tokens, values = sum(LENGTHS), {}
    for value in graph.inputs:
        if isinstance(value.type, BatchType):
            values[value.name] = batch_for(graph)
        elif value.name == "positions":
            values[value.name] = torch.cat([torch.arange(n, dtype=torch.int32) for n in LENGTHS])
        elif value.type.dtype.is_float:
            shape = [d if isinstance(d, int) else d.at({"T": tokens}) for d in value.type.shape]
            values[value.name] = torch.randn(shape).to(TORCH[value.type.dtype.value])
        else:
            values[value.name] = torch.arange(tokens, dtype=torch.int32)
    return values


def batch_for(graph: Graph) -> Batch:
    batch = Batch.fresh(LENGTHS)
    batch.caches = Caches(graph.states, slots=4, pages=8, page_size=2)
    batch.block_tables = [[0, 3], [5], [1, 2]]
    return batch


def weights_for(*graphs: Graph) -> dict[str, torch.Tensor]:
    table: dict[str, torch.Tensor] = {}
    for graph in graphs:
        for op in graph.ops:
            if op.name == "weight":
                table.setdefault(op.attrs["name"], torch.randn(op.attrs["shape"]).to(TORCH[op.attrs["dtype"].value]))
    return table


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_case(path: Path) -> None:
    text = path.read_text()
    context = PassContext()
    many = ranks(text)
    after = optimise(text, context, **many)
    check_lines(text, print_graph(after))
    for name in directives(text, "FIRED"):
        assert any(e.rule == name and not e.reason for _, e in context.log), (name, context.log)
    for reason in directives(text, "REFUSED"):
        assert any(reason in e.reason for _, e in context.log), (reason, context.log)
    which, count = ("stage", many["pp"]) if "pp" in many else ("rank", many.get("tp", 1))
    others = [optimise(text, PassContext(), **{which: number}, **many) for number in range(1, count)]
    same_numbers(parse_graph(text), [after, *others], float((directives(text, "TOLERANCE") or ["0"])[0]))


def same_numbers(before: Graph, after: list[Graph], tolerance: float) -> None:
    """The graph after a pass, or those of all ranks, compute what the graph before it does."""
    torch.manual_seed(0)
    weights = weights_for(before)
    inputs = random_inputs(before)
    want = run(before, inputs, weights.__getitem__)
    extra = {"rows": torch.arange(sum(LENGTHS), dtype=torch.int32)}
    have = run_ranks(after, [{**extra, **inputs, **fresh_batch(graph)} for graph in after], weights.__getitem__)
    for outputs in have:
        for a, b in zip(want, outputs, strict=True):
            limit = tolerance or (2e-2 if a.dtype == torch.bfloat16 else 1e-5)
            assert torch.norm((a - b).float()) <= limit * torch.norm(a.float()) + 1e-9


def fresh_batch(graph: Graph) -> dict[str, object]:
    """The batch input with empty caches of the graph's own sizes, where it has states."""
    return {v.name: batch_for(graph) for v in graph.inputs if isinstance(v.type, BatchType)} if graph.states else {}
