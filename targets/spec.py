"""Hardware as data: one TOML file a family in targets/data, one table a chip, every figure with its source."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from qcn_compile.errors import UsageError

FIGURES = ("cores", "bandwidth", "flops", "memory")
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class Hardware:
    """One chip. Bandwidth in GB/s, flops in GFLOP/s (f32 on a CPU, dense bf16 on a GPU), memory in GB; a figure
    nobody knows is None.

    CPU: `mcpu` is LLVM's name of the processor ("" means: ask LLVM for the host's), `features` what kernels may use.
    GPU: `arch` is the compute capability times ten, `shared` the bytes of shared memory a block may ask for, `cores`
    the multiprocessors.
    """

    name: str
    kind: str
    dtypes: tuple[str, ...]
    mcpu: str = ""
    features: tuple[str, ...] = ()
    cores: Figure | None = None
    bandwidth: Figure | None = None
    flops: Figure | None = None
    memory: Figure | None = None
    aliases: tuple[str, ...] = field(default=())
    arch: int = 0
    shared: int = 0


@cache
def catalogue() -> dict[str, Hardware]:
    """All chips of all data files by name and alias."""
    table: dict[str, Hardware] = {}
    for path in sorted(DATA.glob("*.toml")):
        for name, row in tomllib.loads(path.read_text(encoding="utf-8")).items():
            chip = _hardware(name, row)
            for key in (name, *chip.aliases):
                table[key] = chip
    return table


def _hardware(name: str, row: dict[str, Any]) -> Hardware:
    figures = {key: Figure(float(row[key]["value"]), str(row[key]["source"]))
               for key in FIGURES if key in row}
    return Hardware(name, str(row["kind"]), tuple(row["dtypes"]), str(row.get("mcpu", "")),
                    tuple(row.get("features", ())), figures.get("cores"), figures.get("bandwidth"),
                    figures.get("flops"), figures.get("memory"), tuple(row.get("aliases", ())),
                    int(row.get("arch", 0)), int(row.get("shared", 0)))


def hardware(name: str) -> Hardware:
    """The chip of that name. Raises UsageError listing the known ones."""
    table = catalogue()
    if name not in table:
        raise UsageError(f"hardware {name!r} is unknown; known: {', '.join(sorted(table))}")
    return table[name]
