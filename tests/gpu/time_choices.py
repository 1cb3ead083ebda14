"""On a card: the whole step of one token in every configuration that tune.py planned, by events."""

from __future__ import annotations

import json
import sys
from functools import partial
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


def main() -> None:
    """Usage: time_choices.py BUILD TUNE_FOLDER."""
    from qcn_compile import load
    from qcn_compile.artifact import Plan

    build, folder = Path(sys.argv[1]), Path(sys.argv[2])
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
                executable._launches[plan.key] = [executable._prepared(plan, i) for i in range(len(plan.launches))]
                graph = device.capture(partial(executable.run_launches, plan))
                took = seconds(device, graph)
                output = plan.outputs["logits"]
                raw = np.zeros(output["width"], np.uint16 if output["dtype"] == "bf16" else np.float32)
                device.driver("cuMemcpyDtoH", raw.ctypes.data, executable._base + int(output["offset"]), raw.nbytes)
                rows.append((took, name, len(plan.launches)))
                print(f"{name:28s} {1e3 * took:.3f} ms", flush=True)
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        print(f"{device}: {want.shape[0]} logits; fastest first")
        for took, name, launches in sorted(rows):
            print(f"  {1e3 * took:.3f} ms {1 / took:6.0f} tok/s {name} ({launches} launches)")


if __name__ == "__main__":
    main()
