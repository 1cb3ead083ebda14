"""The limits a build is measured against: those of the machine at the time, or those on file for the hardware."""

from __future__ import annotations

from typing import Any

from qcn_compile.inspect.build import Build
from qcn_compile.inspect.profile import Measured


def roof(build: Build, measured: Measured | None = None) -> dict[str, Any] | None:
    """name, bandwidth in GB/s, flops in GFLOP/s and where they come from; None when nobody knows them.

    A CPU build without figures of its own is drawn under those that the planner took for this machine.
    """
    from qcn_compile.targets.spec import catalogue

    if measured is not None and measured.limits:
        return {"name": "this machine", "bandwidth": measured.limits["read"], "flops": measured.limits["flops"],
                "source": "read of memory and fp32 products, measured with the profile"}
    target = build.manifest.target
    for name in (target.get("mcpu"), target.get("name"), "host" if target.get("kind") == "cpu" else None):
        chip = catalogue().get(str(name))
        if chip is not None and chip.bandwidth is not None and chip.flops is not None:
            return {"name": chip.name, "bandwidth": chip.bandwidth.value, "flops": chip.flops.value,
                    "source": f"{chip.bandwidth.source}; {chip.flops.source}"}
    return None


def least_seconds(bytes_: float, flops: float, limits: dict[str, Any]) -> float:
    """The time that the limits allow: that of the slower of memory and arithmetic."""
    return max(bytes_ / limits["bandwidth"], flops / limits["flops"]) / 1e9
