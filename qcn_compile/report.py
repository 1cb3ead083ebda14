"""report.json and ir/: what was decided and why, the memory plan, and the graph after every pass that changed it."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcn_compile.artifact import Plan, write_json
from qcn_compile.ir.graph import Graph, Value, count
from qcn_compile.ir.text import print_graph
from qcn_compile.lowering.decide import Decision
from qcn_compile.lowering.memory import Buffer, lower_bound
from qcn_compile.lowering.plan import make_plan
from qcn_compile.lowering.schedule import Schedule
from qcn_compile.passes.base import PassContext
from qcn_compile.pipeline import Tracing

LARGE = 1 << 20  # longer texts are compressed


def write_report(build: Path, graphs: Sequence[Graph], context: PassContext, decision: Decision,
                 schedules: Sequence[Schedule], tracing: Tracing, checkpoint: str = "") -> None:
    """No times are written, so that builds are reproducible."""
    write_stages(build / "ir", {**(tracing.stages or {}), **{graph.name: print_graph(graph) for graph in graphs}})
    memory = {}
    for item in schedules:
        plan, buffers = make_plan(item, _Any())
        memory[f"{plan.entry}-{plan.name}"] = _memory(plan, buffers)
    events = [{"pass": name, **asdict(event)} for name, event in context.log]
    write_json(build / "report.json", {"decision": decision.to_json(), "memory": memory, "events": events,
                                       "ops": {g.name: count(g.ops) for g in graphs},
                                       "checkpoint": checkpoint.splitlines(),
                                       "passes": [[n, a, b] for n, _, a, b in tracing.times]})


def write_stages(folder: Path, stages: dict[str, str]) -> None:
    """One .qir file a stage; long ones as .qir.gz, the same bytes every time."""
    folder.mkdir(exist_ok=True)
    for name, text in stages.items():
        if len(text) > LARGE:
            (folder / f"{name}.qir.gz").write_bytes(gzip.compress(text.encode(), compresslevel=6, mtime=0))
        else:
            (folder / f"{name}.qir").write_text(text, encoding="utf-8")


def _memory(plan: Plan, buffers: Sequence[Buffer]) -> dict[str, Any]:
    """layout: name, bytes, first and last step, offset of every buffer; a step is one launch of the plan."""
    layout = [[_name(b), b.bytes, b.first, b.last, b.offset] for b in buffers]
    return {"workspace_bytes": plan.workspace_bytes, "lower_bound_bytes": lower_bound(list(buffers)),
            "launches": len(plan.launches), "buffers": len(buffers), "layout": layout}


def _name(buffer: Buffer) -> str:
    return f"%{buffer.key.name}" if isinstance(buffer.key, Value) else f"scratch {buffer.key[1]}"


class _Any(dict):  # type: ignore[type-arg]
    """A name table for plans that are only measured."""

    def __missing__(self, key: object) -> str:
        return "weight"
