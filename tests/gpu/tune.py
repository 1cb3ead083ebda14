"""Other choices for the plan of one token, to choose between by measurement: `tune.py CHANGES.json` plans them (no
card, beside the build `full`), `tune.py emit` compiles what they launch, time_choices.py times them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Change = dict[str, dict[str, int]]


def plan(changes: dict[str, Change], out: Path, target: str) -> None:
    """One plan a configuration as out/NAME.json, the kernels of all in out/kernels."""
    from qcn_compile.compile import Options, optimised
    from qcn_compile.lowering.buckets import buckets_for
    from qcn_compile.lowering.plan import blobs_of, make_plan
    from qcn_compile.lowering.schedule import schedule
    from qcn_compile.lowering.weights import name_blobs
    from qcn_compile.targets.registry import load_target

    card = load_target(target)
    cuts = card.cuts
    graph = optimised(None, target, Options(quant="fp8", weights="dummy"))
    schedules = [schedule(graph, bucket, card) for bucket in buckets_for("gpu")]
    names = name_blobs(dict.fromkeys(key for s in schedules for key in blobs_of(s)))
    kernels: dict[Any, None] = {}
    out.mkdir(parents=True, exist_ok=True)
    for name, change in changes.items():
        card.cuts = {role: [{**usual[0], **change.get(role, {})}] for role, usual in cuts.items()}
        made = schedule(graph, buckets_for("gpu")[0], card)
        kernels |= dict.fromkeys(step.call.kernel for step in made.steps)
        (out / f"{name}.json").write_text(json.dumps(make_plan(made, names)[0].to_json()))
    rows = [[kernel.family, dict(kernel.params)] for kernel in kernels]
    (out / "kernels.list").write_text(json.dumps({"target": target, "kernels": rows}))
    print(f"{len(changes)} plans, {len(kernels)} kernels")


def emit(out: Path) -> None:
    """Compile what `plan` listed; the machine with the card may have more cores."""
    from qcn_compile.targets.base import Kernel
    from qcn_compile.targets.registry import load_target

    listed = json.loads((out / "kernels.list").read_text())
    load_target(listed["target"]).emit([Kernel.make(family, **params) for family, params in listed["kernels"]],
                                       out / "kernels")


def main() -> None:
    """With the word `emit`, compile; else plan the configurations of a JSON file {name: {role: {parameter: value}}}."""
    if sys.argv[1:] == ["emit"]:
        emit(Path(".gpu/tune"))
    else:
        plan({"own": {}, **json.loads(Path(sys.argv[1]).read_text())}, Path(".gpu/tune"), "h100")


if __name__ == "__main__":
    main()
