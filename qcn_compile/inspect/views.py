"""What qcn-inspect shows, as plain data: each function returns what `--json` prints."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from qcn_compile.artifact import Plan
from qcn_compile.errors import UsageError
from qcn_compile.inspect.build import Build
from qcn_compile.runtime.cuda.footprint import RESERVE, footprint
from qcn_compile.runtime.cuda.weights import host_bytes, look_ups
from qcn_compile.runtime.memory import plan_memory

LAYER = re.compile(r"layers\.(\d+)(?:\.|$)")
SELECTS = ("select-", "keep-")  # passes that choose formats; their events are decisions, not fusions


def summary(build: Build) -> dict[str, Any]:
    """Model, target, decisions, sizes, and the work of each plan."""
    manifest = build.manifest
    return {"path": str(build.path), "model": manifest.model["name"], "target": manifest.target,
            "context_length": manifest.context_length, "vocab_size": manifest.vocab_size,
            "weights": manifest.weights["mode"], "decision": build.report["decision"], "tools": manifest.tools,
            "bytes": {part: _bytes(build, part) for part in ("weights", "kernels", "plan", "ir", "tokenizer")},
            "caches": dict(Counter(cache.kind for cache in manifest.caches)),
            "cache_bytes": {kind: sum(c.unit_bytes for c in manifest.caches if c.kind == kind)
                            for kind in dict.fromkeys(c.kind for c in manifest.caches)},
            "plans": [plan_work(plan) for plan in build.plans]}


def _bytes(build: Build, part: str) -> int:
    return sum(e["bytes"] for name, e in build.manifest.files.items() if name.startswith(part + "/"))


def plan_work(plan: Plan) -> dict[str, Any]:
    """Launches, bytes and FLOPs of a plan at its capacity."""
    bytes_, flops = sum(x.bytes for x in plan.launches), sum(x.flops for x in plan.launches)
    return {"plan": f"{plan.entry}-{plan.name}", "tokens": plan.tokens, "launches": len(plan.launches),
            "workspace_bytes": plan.workspace_bytes, "bytes": bytes_, "flops": flops,
            "intensity": flops / bytes_ if bytes_ else 0.0}


def ops(build: Build) -> dict[str, Any]:
    """Ops of each graph by name, and the work of each op of each plan."""
    table = {}
    for plan in build.plans:
        rows: dict[str, dict[str, int]] = {}
        for launch in plan.launches:
            row = rows.setdefault(launch.op.split()[0], {"launches": 0, "bytes": 0, "flops": 0})
            row["launches"] += 1
            row["bytes"] += launch.bytes
            row["flops"] += launch.flops
        table[f"{plan.entry}-{plan.name}"] = dict(sorted(rows.items(), key=lambda kv: -kv[1]["bytes"]))
    return {"graphs": build.report["ops"], "plans": table}


def memory(build: Build) -> dict[str, Any]:
    """Per plan: bytes planned, the lower bound, the buffers, and bytes alive at each step."""
    result = {}
    for name, plan in build.report["memory"].items():
        layout = [dict(zip(("name", "bytes", "first", "last", "offset"), row, strict=True))
                  for row in plan.get("layout", [])]
        steps = plan["launches"] + 1
        alive = [sum(b["bytes"] for b in layout if b["first"] <= at <= b["last"]) for at in range(steps)]
        result[name] = {**{k: v for k, v in plan.items() if k != "layout"}, "layout": layout, "alive": alive}
    return result


def device(build: Build, context_length: int | None, sequences: int, embedding_on_host: bool = False) -> dict[str, Any]:
    """Device bytes of a loaded GPU build that holds so many whole contexts. Raises UsageError for another target."""
    if build.manifest.target.get("kind") != "gpu":
        raise UsageError(f"{build.path} is for {build.manifest.target['name']}, not for a GPU; see qcn-inspect memory")
    memory = plan_memory(build.manifest, context_length, sequences, 1 << 60)
    on_host = look_ups(build.plans) if embedding_on_host else frozenset()
    taken = footprint(build.path, build.manifest, build.plans, memory, on_host)
    return {"bytes": taken, "host": host_bytes(build.path, build.manifest.weights, on_host), "reserve": RESERVE,
            "caches": str(memory)}


def decisions(build: Build) -> dict[str, Any]:
    """What was chosen with the reason, how each weight is stored, and what was left alone with the reason."""
    chosen = build.report["decision"]
    stored: dict[str, dict[str, Any]] = {}
    left = []
    for event in build.report["events"]:
        if event["pass"].startswith(SELECTS) and event["rule"] not in ("gather first",):
            key = f"{event['rule']}: {event['reason'] or 'as asked'}"
            stored.setdefault(key, {"format": event["rule"], "reason": event["reason"] or "as asked", "weights": []})
            stored[key]["weights"].append(event["value"])
        elif event["reason"]:
            left.append(event)
    return {"chosen": {k: v for k, v in chosen.items() if k != "reasons"}, "reasons": chosen["reasons"],
            "weights": list(stored.values()), "rejected": left}


def passes(build: Build) -> list[dict[str, Any]]:
    """The passes in order: ops before and after, what fired how often, what did not and why."""
    events: dict[str, list[dict[str, str]]] = {}
    for event in build.report["events"]:
        events.setdefault(event["pass"], []).append(event)
    rows, seen = [], set()
    for name, before, after in build.report["passes"]:
        own = [] if name in seen else events.get(name, [])
        seen.add(name)
        format_only = name.startswith(SELECTS)
        fired = Counter(e["rule"] for e in own if (format_only or not e["reason"]) and e["rule"] != "clean up")
        rows.append({"pass": name, "before": before, "after": after, "fired": dict(fired),
                     "refused": [] if format_only else [e for e in own if e["reason"]]})
    return rows


def verify(build: Build) -> dict[str, Any]:
    """Every file against its hash, every kept graph against the verifier's structural rules."""
    stages = {}
    for name in build.stages():
        graph = build.graph(name)
        stages[name] = len(graph.ops)
    checked = Build.open(build.path, deep=True)
    return {"files": len(checked.manifest.files), "bytes": sum(e["bytes"] for e in checked.manifest.files.values()),
            "plans": len(build.plans), "graphs": stages, "ok": True}


def targets() -> list[dict[str, Any]]:
    """The chips that are known, each figure with its source; `builds` tells whether kernels are written for it."""
    from qcn_compile.targets.spec import FIGURES, catalogue

    rows = {}
    for chip in catalogue().values():
        known = {name: getattr(chip, name) for name in FIGURES} | {f"{n} rate": f for n, f in chip.rates.items()}
        rows[chip.name] = {"name": chip.name, "kind": chip.kind, "builds": bool(chip.backend),
                           "dtypes": list(chip.dtypes), "aliases": list(chip.aliases), "features": list(chip.features),
                           "figures": {k: {"value": f.value, "source": f.source} for k, f in known.items() if f}}
    return list(rows.values())


def diff(a: Build, b: Build) -> dict[str, Any]:
    """What differs between two builds: decisions, ops, passes, plans, kernels, sizes, tools."""
    old, new = summary(a), summary(b)
    plans = {p["plan"]: p for p in old["plans"]}, {p["plan"]: p for p in new["plans"]}
    kernels = [{x.kernel for plan in build.plans for x in plan.launches} for build in (a, b)]
    graphs = {name: _changes(a.report["ops"].get(name, {}), b.report["ops"].get(name, {}))
              for name in {**a.report["ops"], **b.report["ops"]}}
    changed = {"decision": _changes(_flat(old["decision"]), _flat(new["decision"])), "bytes": _changes(
        old["bytes"], new["bytes"]), "tools": _changes(old["tools"], new["tools"]),
        "target": _changes(_flat(old["target"]), _flat(new["target"])),
        "passes": _changes(_counts(a), _counts(b)),
        "plans": {n: c for n in {**plans[0], **plans[1]} if (c := _changes(plans[0].get(n, {}), plans[1].get(n, {})))},
        "ops": {n: c for n, c in graphs.items() if c},
        "kernels": {"only in the first": sorted(kernels[0] - kernels[1]),
                    "only in the second": sorted(kernels[1] - kernels[0])}}
    same = not any(v for k, v in changed.items() if k != "kernels") and kernels[0] == kernels[1]
    return {"a": str(a.path), "b": str(b.path), "same": same, **changed}


def _counts(build: Build) -> dict[str, int]:
    """Ops after each pass; the second canonicalize is "canonicalize 2", wherever another pass was put before it."""
    table: dict[str, int] = {}
    for name, _, after in build.report["passes"]:
        times = sum(key.split(" ")[0] == name for key in table) + 1
        table[name if times == 1 else f"{name} {times}"] = after
    return table


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in data.items() if not isinstance(v, dict)}


def _changes(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    return {key: [a.get(key), b.get(key)] for key in {**a, **b} if a.get(key) != b.get(key)}
