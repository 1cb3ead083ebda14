"""The kernels of a build: source, code bytes and instruction statistics of CPU code, calls and work per plan."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qcn_compile.errors import UsageError
from qcn_compile.inspect.build import Build
from qcn_compile.inspect.profile import Measured
from qcn_compile.inspect.roof import least_seconds, roof
from qcn_compile.inspect.sass import gpu_code

HEAD = re.compile(r"^([0-9a-f]+) <(.+)>:$")
LINE = re.compile(r"^\s+([0-9a-f]+):\s+(?:[0-9a-f]{2} )*\s*(\S+)(?:\s+(.*))?$")


def kernels(build: Build, measured: Measured | None = None) -> list[dict[str, Any]]:
    """One row a kernel, by bytes moved in all plans. `code` is absent when there is no objdump or no CPU code.

    predicted, measured: seconds of a launch by plan; the first from bytes, FLOPs and the
    limits of the hardware where they are known, the second from a profile.
    """
    table: dict[str, dict[str, Any]] = {}
    limits, spent = roof(build, measured), measured.kernel_seconds() if measured else {}
    for plan in build.plans:
        for launch in plan.launches:
            row = table.setdefault(launch.kernel, {"kernel": launch.kernel, "ops": [], "launches": {}, "bytes": {},
                                                   "flops": {}, "predicted": {}, "measured": {}})
            name = f"{plan.entry}-{plan.name}"
            row["launches"][name] = row["launches"].get(name, 0) + 1
            row["bytes"][name] = row["bytes"].get(name, 0) + launch.bytes
            row["flops"][name] = row["flops"].get(name, 0) + launch.flops
            if (op := launch.op.split()[0]) not in row["ops"]:
                row["ops"].append(op)
    for row in table.values():
        for name, count in row["launches"].items():
            if limits is not None and row["bytes"][name]:
                row["predicted"][name] = least_seconds(row["bytes"][name], row["flops"][name], limits) / count
            if (name, row["kernel"]) in spent:
                row["measured"][name] = spent[name, row["kernel"]]
    code, gpu = instructions(build, list(table)), gpu_code(build)
    for name, row in table.items():
        row["source"] = source(build, name)
        if name in code:
            row["code"] = code[name]
        row |= gpu.get(name, {})
    return sorted(table.values(), key=lambda row: -max(row["bytes"].values()))


def text_of(build: Build, kernel: str) -> str:
    """The source of the kernel whose name begins so. Raises UsageError when there are none or several."""
    names = sorted({x.kernel for plan in build.plans for x in plan.launches if x.kernel.startswith(kernel)})
    if kernel not in names and len(names) != 1:
        raise UsageError(f"--source {kernel}: {'no kernel begins so' if not names else 'several kernels begin so'}"
                         f"{': ' + ', '.join(names[:8]) if names else ''}; qcn-inspect kernels {build.path} lists them")
    name = kernel if kernel in names else names[0]
    path = source(build, name) or str(gpu_code(build).get(name, {}).get("source", ""))
    if not path:
        raise UsageError(f"--source {kernel}: the build keeps no source of it; it was built for the null target")
    return (build.path / path).read_text(encoding="utf-8")


def source(build: Build, kernel: str) -> str:
    """Path of a kernel's source in the build, "" when there is none."""
    for path in (*build.path.glob(f"kernels/source/{kernel}.*"), *build.path.glob(f"kernels/{kernel}.*")):
        if path.suffix not in (".cubin", ".hsaco", ".so"):
            return str(path.relative_to(build.path))
    return ""


def instructions(build: Build, names: list[str]) -> dict[str, dict[str, int]]:
    """Statistics of every kernel's machine code, its parallel bodies included."""
    library = build.path / "kernels/libkernels.so"
    if not library.is_file() or shutil.which("objdump") is None:
        return {}
    ordered = sorted(names, key=len, reverse=True)
    found: dict[str, dict[str, int]] = {}
    for symbol, lines in functions(library):
        bare = symbol.removeprefix("__tvm_ffi_")
        owner = next((name for name in ordered if bare.startswith(name)), None)
        if owner is not None:
            row = found.setdefault(owner, dict.fromkeys(
                ("bytes", "instructions", "vector", "fma", "memory", "branches", "calls", "widest"), 0))
            _count(row, lines)
    return found


def functions(library: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and disassembly of each function."""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True,
                          check=True).stdout
    name, lines = "", list[str]()
    for line in text.splitlines():
        if head := HEAD.match(line):
            if name:
                yield name, lines
            name, lines = head[2], []
        elif line.startswith(" "):
            lines.append(line)
    if name:
        yield name, lines


def _count(row: dict[str, int], lines: list[str]) -> None:
    places = [int(m[1], 16) for line in lines if (m := LINE.match(line))]
    row["bytes"] += places[-1] - places[0] if places else 0
    for line in lines:
        if not (found := LINE.match(line)):
            continue
        code, operands = found[2], found[3] or ""
        width = 512 if "%zmm" in operands else 256 if "%ymm" in operands else 128 if "%xmm" in operands else 0
        scalar = code.endswith(("ss", "sd")) or code in ("vmovd", "vmovq")
        row["instructions"] += 1
        row["vector"] += int(width > 0 and not scalar)
        row["fma"] += int("fmadd" in code or "fmsub" in code or "vpdp" in code)
        row["memory"] += int("(" in operands and not code.startswith(("lea", "nop", "call", "j")))
        row["branches"] += int(code.startswith("j"))
        row["calls"] += int(code.startswith("call"))
        row["widest"] = max(row["widest"], 0 if scalar else width)
