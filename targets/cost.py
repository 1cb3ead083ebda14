"""What work costs on a chip: its bytes and FLOPs against peak rates, scaled by measured efficiencies kept as data.

    seconds of an op = fixed + max(bytes / (share * bandwidth), FLOPs / (rate * peak)) + steps * step

`fixed` is the launch edges and the latency of its kernels, `step` the latency of one step of a recurrence. The limit of
the hardware is the same formula with fixed = step = 0 and share = rate = 1.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from qcn_compile.errors import UsageError
from qcn_compile.targets.spec import Hardware

EFFICIENCY = Path(__file__).parent / "efficiency"
LINKS = ("all_reduce", "all_gather", "send")
REGIMES = ("one", "few", "many")


@dataclass(frozen=True)
class Work:
    """`count` equal ops: `name` in the op table (or a collective), bytes and FLOPs of one, the rate its products could
    reach (`math`), a `role` where ops of a name differ, and `steps` of a recurrence that follow one another."""

    name: str
    count: int
    bytes: float
    flops: float = 0.0
    math: str = "bf16"
    role: str = ""
    steps: int = 0


@dataclass(frozen=True)
class Efficiency:
    """Of one kernel class: microseconds an op, share of bandwidth, share of its math's peak, microseconds a step."""

    fixed: float = 0.0
    share: float = 1.0
    rate: float = 1.0
    step: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class Parts:
    """Seconds by what bounds them: fixed costs of kernels, memory, arithmetic, links between chips."""

    latency: float = 0.0
    memory: float = 0.0
    compute: float = 0.0
    links: float = 0.0

    @property
    def seconds(self) -> float:
        return self.latency + self.memory + self.compute + self.links

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.latency + other.latency, self.memory + other.memory, self.compute + other.compute,
                     self.links + other.links)

    @property
    def bound(self) -> str:
        """The largest part, with its share."""
        named = {"kernel latency": self.latency, "memory bandwidth": self.memory, "arithmetic": self.compute,
                 "links": self.links}
        name = max(named, key=lambda key: named[key])
        return f"{name} ({named[name] / max(self.seconds, 1e-12):.0%})"


@cache
def efficiencies(kind: str) -> dict[str, Any]:
    """The data file of a kind of target: regime -> kernel class -> Efficiency, and `math`, `step`, `small`."""
    data = tomllib.loads((EFFICIENCY / f"{kind}.toml").read_text(encoding="utf-8"))
    table: dict[str, Any] = {name: data[name] for name in ("math", "step", "small")}
    for regime in REGIMES:
        table[regime] = {name: Efficiency(**row) for name, row in data[regime].items()}
    return table


def regime_of(tokens: int, small: int) -> str:
    """Which kernels a step of that many tokens runs: one token, up to `small`, many."""
    return "one" if tokens == 1 else "few" if tokens <= small else "many"


def cost(work: Iterable[Work], chip: Hardware, tokens: int, ranks: int = 1) -> Parts:
    """Predicted seconds of a step on one of `ranks` chips. Raises UsageError when a figure is missing."""
    data = efficiencies(chip.kind)
    table = data[regime_of(tokens, data["small"])]
    total = Parts(latency=data["step"] * 1e-6)
    for item in work:
        if item.name in LINKS:
            total += _link(item, chip, ranks)
        else:
            math = data["math"].get(item.math, item.math)
            total += _op(replace(item, math=math), chip, table.get(item.role) or table.get(item.name) or table["other"])
    return total


def limit(work: Iterable[Work], chip: Hardware, ranks: int = 1) -> Parts:
    """The least that the hardware allows: every byte at full bandwidth, every product at its format's peak."""
    total = Parts()
    for item in work:
        if item.name in LINKS:
            total += replace(_link(item, chip, ranks), latency=0.0)
        else:
            total += _op(item, chip, Efficiency())
    return total


def _op(item: Work, chip: Hardware, known: Efficiency) -> Parts:
    memory = item.bytes / (known.share * _figure(chip, "bandwidth") * 1e9)
    compute = item.flops / (known.rate * chip.rate(item.math) * 1e9) if item.flops else 0.0
    latency = (known.fixed + known.step * item.steps) * 1e-6
    if memory >= compute:
        return Parts(item.count * latency, item.count * memory)
    return Parts(item.count * latency, compute=item.count * compute)


def _link(item: Work, chip: Hardware, ranks: int) -> Parts:
    """An all-reduce passes 2 (n-1)/n of its bytes over a link, an all-gather (n-1)/n, a send all of them."""
    passed = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": (ranks - 1) / ranks, "send": 1.0}[item.name]
    seconds = _figure(chip, "latency") * 1e-6 + passed * item.bytes / (_figure(chip, "link") * 1e9)
    return Parts(links=item.count * seconds)


def _figure(chip: Hardware, name: str) -> float:
    figure = getattr(chip, name)
    if figure is None:
        raise UsageError(f"{chip.name}: its {name} is not on file, so nothing can be predicted; name a fuller target, "
                         "or write a hardware file with it (--target FILE.toml)")
    return float(figure.value)
