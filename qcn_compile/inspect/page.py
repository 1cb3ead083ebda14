"""`--html`: one self-contained page about a build. The data is here, the drawing in page.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcn_compile.artifact import Plan
from qcn_compile.errors import UsageError
from qcn_compile.inspect import profile, views
from qcn_compile.inspect.build import Build
from qcn_compile.inspect.kernels import kernels
from qcn_compile.inspect.profile import Measured
from qcn_compile.inspect.roof import roof
from qcn_compile.ir.graph import Graph, Op
from qcn_compile.ir.view import bytes_of, critical_path, digraph, is_static, layers

TEMPLATE = Path(__file__).parent / "page.html"
LARGEST = 2500  # ops of a traced graph that are still drawn


def write_page(build: Build, file: Path, measured: Path | None = None) -> None:
    """Write the page. `measured`: a profile as `qcn-inspect profile --json` prints it. Raises UsageError."""
    data = page_data(build, profile.read(measured) if measured else Measured())
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    try:
        file.write_text(TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", text), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}; name another file") from None


def page_data(build: Build, measured: Measured) -> dict[str, Any]:
    """Everything the page draws."""
    stages = build.stages()
    before = build.graph("00-traced") if "00-traced" in stages else None
    after = build.graph("main")
    old = {op.name for op in before.ops} if before is not None else set()
    graphs = {"final": drawn(after, build.plans[0] if build.plans else None, old, measured)}
    if before is not None and len(before.ops) <= LARGEST:
        graphs["as traced"] = drawn(before, None, old, Measured())
    return {"summary": views.summary(build), "passes": views.passes(build), "decisions": views.decisions(build),
            "memory": views.memory(build), "graphs": graphs, "roof": roof(build, measured),
            "ops": points(build, measured), "kernels": kernels(build, measured)}


def drawn(graph: Graph, plan: Plan | None, old: set[str], measured: Measured) -> dict[str, Any]:
    """Nodes with a place and edges. A column is a layer of the model, a row a step of the longest way through it."""
    view, sizes = digraph(graph), {"T": 1, "S": 1, "R": 1}
    view.remove_nodes_from([n for n, op in view.nodes(data="op") if is_static(op)])
    work = _work(plan)
    cost = {n: float(work.get(_key(op), {}).get("bytes", bytes_of(op, sizes))) for n, op in view.nodes(data="op")}
    path = set(critical_path(view, cost))
    columns = _columns(view)
    rows = {n: depth for column in dict.fromkeys(columns.values())
            for n, depth in layers(view.subgraph([m for m in columns if columns[m] == column])).items()}
    taken: dict[tuple[int, int], int] = {}
    nodes = []
    times = measured.op_seconds(f"{plan.entry}-{plan.name}") if plan else {}
    for n, op in view.nodes(data="op"):
        place = (columns[n], rows[n])
        taken[place] = taken.get(place, -1) + 1
        extra = work.get(_key(op), {})
        nodes.append({"id": n, "op": op.name, "value": op.results[0].name, "column": place[0], "row": place[1],
                      "lane": taken[place], "fused": bool(old) and op.name not in old, "critical": n in path,
                      "loc": str(op.loc), "results": [f"%{v.name}: {v.type}" for v in op.results],
                      "operands": [f"%{v.name}: {v.type}" for v in op.inputs], "bytes": cost[n],
                      "seconds": times.get(extra.get("kernels", ())), "flops": extra.get("flops", 0),
                      "kernels": list(extra.get("kernels", ()))})
    edges = [[a, b, int("state" in kind)] for a, b, kind in view.edges(data=True)]
    return {"nodes": nodes, "edges": edges, "columns": _names(view, columns)}


def _key(op: Op) -> str:
    return f"%{op.results[0].name}"


def _columns(view: Any) -> dict[int, int]:
    """Column of each op: its layer of the model plus one; what is before the layers 0, what reads them the last."""
    found = {n: int(m[1]) + 1 for n, op in view.nodes(data="op") if (m := views.LAYER.search(op.loc.module))}
    last = max(found.values(), default=0) + 1
    for n in view.nodes:  # in the order of the graph, so producers come first
        if n not in found:
            found[n] = last if any(found[p] > 0 for p in view.predecessors(n)) else 0
    return found


def _names(view: Any, columns: dict[int, int]) -> dict[int, str]:
    last = max(columns.values(), default=0)
    inner = {c: f"layer {c - 1}" for c in sorted(set(columns.values()))}
    return {**inner, **({0: "input"} if 0 in inner else {}), **({last: "output"} if last else {})}


def _work(plan: Plan | None) -> dict[str, dict[str, Any]]:
    """Kernels, bytes and FLOPs of each op of a plan, by its first result: a target may have renamed the op."""
    table: dict[str, dict[str, Any]] = {}
    for launch in plan.launches if plan else ():
        name, _, value = launch.op.partition(" ")
        row = table.setdefault(value, {"op": name, "kernels": (), "bytes": 0, "flops": 0})
        row["kernels"] += (launch.kernel,)
        row["bytes"] += launch.bytes
        row["flops"] += launch.flops
    return table


def points(build: Build, measured: Measured) -> dict[str, list[dict[str, Any]]]:
    """Per plan, one point for each kind of op and kernels: calls, bytes and FLOPs of a call, measured seconds."""
    result: dict[str, list[dict[str, Any]]] = {}
    for plan in build.plans:
        times = measured.op_seconds(f"{plan.entry}-{plan.name}")
        rows: dict[Any, dict[str, Any]] = {}
        for row in _work(plan).values():
            key = (row["op"], row["kernels"])
            entry = rows.setdefault(key, {"op": key[0], "kernels": list(key[1]), "calls": 0, "bytes": row["bytes"],
                                          "flops": row["flops"], "seconds": times.get(key[1])})
            entry["calls"] += 1
        result[f"{plan.entry}-{plan.name}"] = list(rows.values())
    return result
