"""GPU kernels of a build: what kernels.json says of each, and its SASS counted when nvdisasm is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qcn_compile.inspect.build import Build

LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)")
CLASSES = {"tensor": ("HGMMA", "HMMA", "QGMMA", "QMMA", "IMMA", "UTCHMMA"), "fma": ("FFMA", "HFMA2", "DFMA"),
           "memory": ("LDG", "STG", "LDS", "STS", "LDGSTS", "LDL", "STL", "UTMALDG", "LDSM", "ATOMG", "RED"),
           "branches": ("BRA", "BRX", "CALL", "WARPSYNC", "BSYNC")}


def gpu_code(build: Build) -> dict[str, dict[str, Any]]:
    """By symbol: source, registers, shared memory, spills, threads, code bytes, and counts of instructions."""
    table = build.path / "kernels/kernels.json"
    if not table.is_file():
        return {}
    tool, rows = disassembler(), {}
    for symbol, entry in json.loads(table.read_text(encoding="utf-8")).items():
        file = build.path / "kernels" / entry["file"]
        facts = {key: entry[key] for key in ("registers", "shared", "stack", "threads") if key in entry}
        rows[symbol] = {"source": f"kernels/{entry['source']}" if "source" in entry else "",
                        "code": {"bytes": file.stat().st_size, **facts, **(counts(tool, file) if tool else {})}}
    return rows


def disassembler() -> str | None:
    """nvdisasm from PATH, or the one that comes with Triton (which is not imported)."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/nvdisasm" if spec and spec.origin else None
    return str(bundled) if bundled and bundled.is_file() else None


def counts(tool: str, file: Path) -> dict[str, int]:
    """Instructions of a cubin by class; empty when it cannot be read."""
    done = subprocess.run([tool, "-c", str(file)], capture_output=True, text=True, check=False)
    codes = [m[1] for line in done.stdout.splitlines() if (m := LINE.match(line))]
    if done.returncode or not codes:
        return {}
    return {"instructions": len(codes), **{kind: sum(c in names for c in codes) for kind, names in CLASSES.items()}}
