"""Other tile sizes for the kernels that a build launches for one token, to choose between by measurement."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcn_compile.targets.base import Kernel, Param

TILES = ((4, 512, 1), (2, 1024, 1), (4, 1024, 2), (2, 1024, 2), (4, 2048, 4), (8, 2048, 4), (16, 2048, 8), (1, 2048, 4),
         (2, 2048, 4), (1, 2048, 2), (2, 2048, 2), (8, 1024, 2), (2, 4096, 4), (4, 4096, 8), (1, 4096, 4), (8, 2048, 8))
CHOICES: dict[str, tuple[dict[str, int], ...]] = {
    "gemv": tuple({"BN": n, "BK": k, "WARPS": w} for n, k, w in TILES),
    "gemv_pair": tuple({"BN": n, "BK": k, "WARPS": w} for n, k, w in TILES),
    "moe_up": tuple({"BF": n, "BK": k, "WARPS": w} for n, k, w in TILES),
    "moe_down": tuple({"BH": n, "WARPS": w} for n, w in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))),
    "delta_one": tuple({"WARPS": w} for w in (4, 8, 16)),
    "moe_route": tuple({"WARPS": w} for w in (1, 2, 4)),
    "rope_append": tuple({"WARPS": w} for w in (1, 2, 4)),
    "rms_norm": tuple({"WARPS": w} for w in (1, 4, 8)),
    "attention_split": tuple({"BS": k, "WARPS": w} for k in (16, 32, 64) for w in (4, 8)),
    "attention_combine": tuple({"WARPS": w} for w in (2, 4, 8)),
}


@dataclass(frozen=True)
class Variant:
    """A launch that could stand for that of kernel `base`: same pointers, other tiles and grid."""

    base: str
    kernel: Kernel
    grid: tuple[int, ...]
    bytes: int
    label: str

    def to_json(self) -> dict[str, Any]:
        return {"base": self.base, "family": self.kernel.family, "params": dict(self.kernel.params),
                "grid": self.grid, "bytes": self.bytes, "label": self.label}

    @staticmethod
    def from_json(row: dict[str, Any]) -> Variant:
        kernel = Kernel.make(row["family"], **row["params"])
        return Variant(row["base"], kernel, tuple(row["grid"]), row["bytes"], row["label"])


def grid(kernel: Kernel, old: tuple[int, ...]) -> tuple[int, ...]:
    """The grid of a kernel whose tiles changed."""
    p: dict[str, Any] = dict(kernel.params)
    if kernel.family == "gemv":
        return (-(-p["N"] // p["BN"]), *old[1:])
    if kernel.family == "gemv_pair":
        return (-(-p["N"] // p["BN"]) + -(-p["N2"] // p["BN2"]),)
    if kernel.family == "moe_up":
        return (-(-p["F"] // p["BF"]), *old[1:])
    if kernel.family == "moe_down":
        return (-(-p["H"] // p["BH"]), *old[1:])
    return old


def _bytes(kernel: Kernel, counted: int) -> int:
    """Bytes of a launch. The plan counts them by op, at its first launch."""
    p: dict[str, Any] = dict(kernel.params)
    width = 1 if p.get("SCALED") else 2
    if kernel.family in ("gemv", "gemv_pair"):
        return int(p["N"] * p["K"] * width + p.get("N2", 0) * p["K"] * 2)
    if kernel.family in ("moe_up", "moe_down"):
        return int(p["SLOTS"] * p["H"] * p["F"] * width * (2 if kernel.family == "moe_up" else 1))
    return counted


def variants(build: Path) -> list[Variant]:
    """Every choice for every kernel of the plan for one token, the build's own first."""
    plan = json.loads((build / "plan" / "main-decode-1.json").read_text())
    index = json.loads((build / "kernels" / "kernels.json").read_text())
    found: dict[tuple[str, str], Variant] = {}
    for launch in {row["kernel"]: row for row in plan["launches"]}.values():
        params: dict[str, Param] = index[launch["kernel"]]["config"]
        family = index[launch["kernel"]]["entry"]
        for change in ({}, *CHOICES.get(family, ())):
            if change.get("BK", 0) > max(2048, int(params.get("K", 0))):
                continue
            kernel = Kernel.make(family, **{**params, **change})
            label = " ".join(f"{k}={v}" for k, v in kernel.params if k in ("BN", "BK", "BF", "BH", "BS", "WARPS"))
            made = Variant(launch["kernel"], kernel, grid(kernel, tuple(launch["grid"])),
                           _bytes(kernel, launch["bytes"]), label)
            found.setdefault((launch["kernel"], kernel.symbol), made)
    return list(found.values())
