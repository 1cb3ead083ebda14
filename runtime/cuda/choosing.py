"""A card that the build has no measurement of chooses among the kernels of a plan, once; later loads remember it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from qcn_compile import settings
from qcn_compile.artifact import Launch, Manifest, Plan
from qcn_compile.runtime.batch import Span
from qcn_compile.runtime.cuda.device import CudaDevice
from qcn_compile.runtime.memory import MemoryPlan

Picks = dict[str, int]  # role -> which of its kernels, 0 the plan's own


def roles(plan: Plan) -> Picks:
    """How many kernels each role of a plan has to choose from."""
    return {launch.role: 1 + len(launch.others) for launch in plan.launches if launch.others}


def kernels(plans: Sequence[Plan]) -> set[str]:
    """Every kernel that plans may launch."""
    launches = [launch for plan in plans for launch in plan.launches if launch.collective is None or launch.grid]
    return {name for launch in launches for name in (launch.kernel, *(other for other, _ in launch.others))}


def with_picks(plan: Plan, picks: Mapping[str, int]) -> Plan:
    """The plan with the kernels that were picked, and no others."""
    return replace(plan, launches=tuple(_picked(launch, picks) for launch in plan.launches))


def _picked(launch: Launch, picks: Mapping[str, int]) -> Launch:
    if not launch.others:
        return launch
    kernel, grid = [(launch.kernel, launch.grid), *launch.others][picks.get(launch.role, 0)]
    return replace(launch, kernel=kernel, grid=grid, role="", others=())


def kept_in(manifest: Manifest, card: str) -> Path:
    """The file of a card's picks for the kernels of a build."""
    kernels = json.dumps(sorted((name, row["sha256"]) for name, row in manifest.files.items()
                                if name in manifest.libraries))
    name = hashlib.sha256(f"{card}\n{kernels}".encode()).hexdigest()[:24]
    return settings.cache_home() / "qcn-compile" / "choices" / f"{name}.json"


def remembered(path: Path, sizes: Picks) -> Picks | None:
    """Picks of an earlier load; None when there are none that fit."""
    if not sizes:
        return {}
    try:
        picks = json.loads(path.read_text(encoding="utf-8"))["picks"]
        fit = picks.keys() == sizes.keys() and all(0 <= int(picks[role]) < sizes[role] for role in sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(picks) if fit else None


def remember(path: Path, card: str, picks: Picks) -> None:
    """Keep picks for the next load. Not being able to is told and no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"card": card, "picks": picks}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        print(f"qcn-run: cannot keep the choice of kernels in {path.parent}: {error.strerror}; the next start chooses "
              "again (set XDG_CACHE_HOME to a folder that can be written)", file=sys.stderr)


def fastest(plan: Plan, seconds: Callable[[Plan], float]) -> Picks:
    """Picks by the time of the whole plan, one role after the other; `seconds` measures a plan."""
    picks = dict.fromkeys(roles(plan), 0)
    best = seconds(with_picks(plan, picks))
    for role, count in roles(plan).items():
        for pick in range(1, count):
            took = seconds(with_picks(plan, {**picks, role: pick}))
            if took < best:
                best, picks[role] = took, pick
    return picks


def middling(memory: MemoryPlan) -> Span:
    """One token of a sequence with up to 1024."""
    pages = min(-(-1024 // memory.page_size), memory.pages, memory.context_length // memory.page_size)
    return Span([1], pages * memory.page_size - 1, 0, np.arange(pages, dtype=np.int32), 1)


def timed(device: CudaDevice, work: Callable[[], None]) -> float:
    """Seconds of what `work` puts into the stream, as a graph: the median of some replays after the first."""
    graph, first, last, found = device.capture(work), device.event(), device.event(), []
    for _ in range(12):
        device.record(first)
        device.replay(graph)
        device.record(last)
        device.synchronize()
        found.append(device.seconds(first, last))
    device.driver("cuGraphExecDestroy", graph)
    return median(found[2:])


def choose(plan: Plan, path: Path, card: str, seconds: Callable[[Plan], float]) -> Picks:
    """What `fastest` finds, kept in `path` and told."""
    began = time.perf_counter()
    picks = fastest(plan, seconds)
    remember(path, card, picks)
    print(f"qcn-run: chose kernels for {card} in {time.perf_counter() - began:.1f} s, once (the build has no "
          f"measurement of this card): {', '.join(f'{role} {pick}' for role, pick in sorted(picks.items()))}",
          file=sys.stderr)
    return picks
