"""Hardware as data: one TOML file a family in targets/data, one table a chip, every figure with its source."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from qcn_compile import settings
from qcn_compile.errors import UsageError

FIGURES = ("cores", "bandwidth", "memory", "reserved", "link", "latency", "flops")
FORMATS = ("fp8", "int8", "fp4")  # of `rates`
KINDS = ("cpu", "gpu")
BACKENDS = ("triton", "tvm", "")
KEYS = ("kind", "vendor", "backend", "dtypes", "mcpu", "features", "aliases", "arch", "shared", "node", "rates",
        *FIGURES)
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class Hardware:
    """One chip; units as in data/README.md. A figure nobody knows is None.

    CPU: `mcpu` is LLVM's name of the processor ("" means: ask LLVM for the host's), `features` what kernels may use.
    GPU: `arch` is the compute capability times ten, `shared` the bytes of shared memory a block may ask for, `cores`
    the multiprocessors. `backend` "" means that no kernels are written for it: it is planned for, not built for.
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
    vendor: str = ""
    backend: str = ""
    node: int = 1
    reserved: Figure | None = None
    link: Figure | None = None
    latency: Figure | None = None
    rates: Mapping[str, Figure] = field(default_factory=dict, hash=False)

    def rate(self, format_: str) -> float:
        """GFLOP/s of products in a format: its own where known, else those of `flops`; 0 when nobody knows."""
        known = self.rates.get(format_) or self.flops
        return known.value if known else 0.0


@cache
def catalogue() -> dict[str, Hardware]:
    """All chips of all data files by name and alias; those of the folder QCN_TARGETS come last and win."""
    table: dict[str, Hardware] = {}
    folders = [DATA, *filter(None, [settings.targets_folder()])]
    for path in (p for folder in folders for p in sorted(folder.glob("*.toml"))):
        for chip in read_chips(path):
            for key in (chip.name, *chip.aliases):
                table[key] = chip
    return table


def read_chips(path: Path) -> list[Hardware]:
    """The chips of a data file. Raises UsageError naming the file, the chip, the key and the cure."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); name a hardware file such as those of "
                         f"{DATA}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: is no TOML ({error}); see {DATA / 'README.md'}") from None
    return [_hardware(path, name, row) for name, row in tables.items()]


def _hardware(path: Path, name: str, row: Any) -> Hardware:
    where = f"{path.name} [{name}]"
    if not isinstance(row, dict) or row.get("kind") not in KINDS or not row.get("dtypes"):
        raise UsageError(f"{where}: a chip is a table with at least kind (cpu or gpu) and dtypes; "
                         f"see {DATA / 'README.md'}")
    if unknown := set(row) - set(KEYS):
        raise UsageError(f"{where}: unknown key {', '.join(sorted(unknown))}; known: {', '.join(KEYS)}")
    if row.get("backend", "") not in BACKENDS:
        raise UsageError(f"{where}: backend {row['backend']!r}: choose triton, tvm or nothing")
    figures = {key: _figure(f"{where} {key}", row[key]) for key in FIGURES if key in row}
    rates = {key: _figure(f"{where} rates.{key}", value) for key, value in row.get("rates", {}).items()}
    if wrong := set(rates) - set(FORMATS):
        raise UsageError(f"{where}: rates of {', '.join(sorted(wrong))} mean nothing; known: {', '.join(FORMATS)}")
    return Hardware(name, str(row["kind"]), tuple(row["dtypes"]), str(row.get("mcpu", "")),
                    tuple(row.get("features", ())), aliases=tuple(row.get("aliases", ())),
                    arch=int(row.get("arch", 0)), shared=int(row.get("shared", 0)), vendor=str(row.get("vendor", "")),
                    backend=str(row.get("backend", "")), node=int(row.get("node", 1)), rates=rates, **figures)


def _figure(where: str, data: Any) -> Figure:
    try:
        figure = Figure(float(data["value"]), str(data["source"]))
    except (TypeError, KeyError, ValueError):
        raise UsageError(f'{where}: write {{ value = 1.0, source = "where it is from" }}') from None
    if figure.value <= 0 or len(figure.source) < 4:
        raise UsageError(f"{where}: {figure.value:g} from {figure.source!r}: a figure is positive and has a source")
    return figure


def hardware(name: str) -> Hardware:
    """The chip of that name, or of a file that ends in .toml. Raises UsageError listing the known ones."""
    if name.endswith(".toml"):
        chips = read_chips(Path(name))
        if len(chips) != 1:
            held = ", ".join(chip.name for chip in chips) or "no chip"
            raise UsageError(f"{name} holds {held}: a --target file holds one; "
                             "put several into a folder and name it in QCN_TARGETS")
        return chips[0]
    table = catalogue()
    if name not in table:
        raise UsageError(f"hardware {name!r} is unknown; known: {', '.join(sorted(table))}")
    return table[name]


def chip_of(name: str, mcpu: str | None = None) -> Hardware:
    """The hardware behind a target's name. Raises UsageError listing the known ones."""
    known = catalogue()
    if name == "cpu":
        return known.get(mcpu or "host") or known["host"]
    if name == "null":
        return known["host"]
    if name not in known and not name.endswith(".toml"):
        chips = ", ".join(dict.fromkeys(chip.name for chip in known.values()))
        raise UsageError(f"--target {name}: unknown; choose cpu, null, a hardware file (.toml) or one of {chips}")
    return hardware(name)
