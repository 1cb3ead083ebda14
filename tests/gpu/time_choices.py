"""On a card: the plan of one token in every configuration of .gpu/tune, the whole step and each kernel, by events."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np


def seconds(device: Any, graph: Any, repeat: int = 20) -> float:
    """Median seconds of a graph."""
    first, last, found = device.event(), device.event(), []
    for _ in range(repeat):
        device.record(first)
        device.replay(graph)
        device.record(last)
        device.synchronize()
        found.append(device.seconds(first, last))
    return float(np.median(found))


def kernels(executable: Any, device: Any, plan: Any, least: int = 8) -> None:
    """Each kernel alone: all its launches of the step one after the other, every one with its own weights."""
    groups: dict[str, list[Any]] = defaultdict(list)
    counted: dict[str, int] = defaultdict(int)
    for launch, prepared in zip(plan.launches, executable._launches[plan.name], strict=True):
        groups[launch.kernel].append(prepared)
        counted[launch.kernel] += launch.bytes
    for symbol, launches in sorted(groups.items(), key=lambda item: -len(item[1])):
        if len(launches) < least and "N151936" not in symbol:
            continue
        graph = device.capture(lambda launches=launches: [device.launch(p) for p in launches])
        each = seconds(device, graph) / len(launches)
        row = device._functions[symbol].row
        config = row["config"]
        label = " ".join(f"{k}{config[k]}" for k in ("N", "K", "R", "RW", "GROUPS", "BV", "SPLITS", "AHEAD") if k in config)
        print(f"   {len(launches):3d} x {row['entry']:18s} {1e6 * each:7.2f} us  {label}", flush=True)


def main() -> None:
    """Usage: time_choices.py BUILD TUNE_FOLDER [names whose kernels are shown]."""
    from qcn_compile import load
    from qcn_compile.artifact import Plan

    build, folder, shown = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    with load(build, context_length=2048, max_running_requests=1) as model:
        executable, device = model.executable, model._device
        model.generate(list(range(1, 1025)), temperature=0.0, max_tokens=2).text()
        want = np.asarray(model.step([("a", [5])])[0][0])
        model.release("a")
        plans = {p.stem: Plan.from_json(json.loads(p.read_text())) for p in sorted(folder.glob("*.json"))}
        device.load(folder / "kernels", {launch.kernel for plan in plans.values() for launch in plan.launches})
        executable._base = device.allocate(max(plan.workspace_bytes for plan in plans.values()))
        model.generate(list(range(1, 1025)), temperature=0.0, max_tokens=2).text()
        rows = []
        for name, plan in plans.items():
            try:
                executable._launches[plan.name] = [executable._prepared(plan, i) for i in range(len(plan.launches))]
                graph = executable._capture(plan)
                took = seconds(device, graph)
                output = plan.outputs["logits"]
                raw = np.zeros(output["width"], np.uint16 if output["dtype"] == "bf16" else np.float32)
                device.driver("cuMemcpyDtoH", raw.ctypes.data, executable._base + int(output["offset"]), raw.nbytes)
                rows.append((took, name, len(plan.launches)))
                print(f"{name:28s} {1e3 * took:.3f} ms", flush=True)
                if name in shown:
                    kernels(executable, device, plan)
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        print(f"{device}: {want.shape[0]} logits; fastest first")
        for took, name, launches in sorted(rows):
            print(f"  {1e3 * took:.3f} ms {1 / took:6.0f} tok/s {name} ({launches} launches)")


if __name__ == "__main__":
    main()
