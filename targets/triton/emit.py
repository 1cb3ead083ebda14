"""Kernels to cubins: Triton ahead of time in worker processes, limits checked, sources kept beside; no GPU needed.

    kernels.json     symbol -> file, entry, shared memory, threads, launch attributes, resources, configuration
    <family>-<hash>.cubin
    source/*.py      the kernel functions, as compiled
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from qcn_compile.errors import LoweringError
from qcn_compile.settings import build_jobs
from qcn_compile.targets.base import Kernel
from qcn_compile.targets.spec import Hardware
from qcn_compile.targets.triton.families import FAMILIES, constants, options

INDEX = "kernels.json"
PACKAGE = "qcn_compile.targets.triton.kernels"
TYPES = {"bf16": "*bf16", "f32": "*fp32", "i32": "*i32", "fp8": "*fp8e4nv", "u8": "*u8"}
FIRST_PDL = 90  # programmatic dependent launch starts with this architecture, as do e4m3 registers
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")
Progress = Callable[[int, int], None]


def emit(kernels: Sequence[Kernel], folder: Path, card: Hardware, progress: Progress | None = None,
         workers: int | None = None) -> list[str]:
    """Compile kernels under `folder`. Returns kernels.json and the cubins. Raises LoweringError naming a kernel that
    does not compile or does not fit the card."""
    (folder / "source").mkdir(parents=True, exist_ok=True)
    ordered = sorted(set(kernels), key=lambda kernel: kernel.symbol)
    index, names = {}, []
    for done, (kernel, (cubin, row)) in enumerate(zip(ordered, compiled(ordered, card, workers), strict=True), 1):
        check_limits(kernel, row, card)
        name = f"{kernel.family}-{hashlib.sha256(kernel.symbol.encode()).hexdigest()[:12]}.cubin"
        (folder / name).write_bytes(cubin)
        names.append(name)
        index[kernel.symbol] = {"file": name, **row, "config": dict(kernel.params)}
        if progress is not None:
            progress(done, len(ordered))
    for module in sorted({FAMILIES[k.family].module for k in ordered} | {"common"}):
        source = inspect.getsource(import_module(f"{PACKAGE}.{module}"))
        (folder / "source" / f"{module}.py").write_text(source, encoding="utf-8")
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return [INDEX, *names]


def compiled(kernels: Sequence[Kernel], card: Hardware,
             workers: int | None = None) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(cubin, row of kernels.json) of each kernel, in order. A crash of the compiler ends a worker, not us."""
    count = min(workers or build_jobs(), max(len(kernels), 1))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_prepare) as pool:
        jobs = [pool.submit(compile_one, kernel, card.arch) for kernel in kernels]
        for kernel, job in zip(kernels, jobs, strict=True):
            try:
                yield job.result()
            except BrokenProcessPool:
                raise LoweringError(f"kernel {kernel.symbol}: the Triton compiler crashed for sm_{card.arch}; "
                                    "report it with this configuration") from None
            except Exception as error:
                pool.shutdown(cancel_futures=True)
                raise LoweringError(f"kernel {kernel.symbol}: Triton cannot compile it for sm_{card.arch}: "
                                    f"{type(error).__name__}: {str(error)[-800:]}") from error


def _prepare() -> None:
    """Cubins without source paths are the same bytes everywhere; a test's interpreter must not reach the worker."""
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)


def compile_one(kernel: Kernel, arch: int) -> tuple[bytes, dict[str, Any]]:
    """Compile one kernel in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    family = FAMILIES[kernel.family]
    function = getattr(import_module(f"{PACKAGE}.{family.module}"), kernel.family)
    present, absent = family.pointers(kernel)
    pdl = arch >= FIRST_PDL
    fixed = {**constants(kernel), **dict.fromkeys(absent), "PDL": pdl}
    types = dict(TYPES) if pdl else {**TYPES, "fp8": "*u8"}
    pointers = {p.name: types[p.dtype] for p in present}
    signature = {name: pointers.get(name, "constexpr") for name in function.arg_names}
    order = {name: at for at, name in enumerate(function.arg_names)}
    aligned = {(order[p.name],): [["tt.divisibility", 16]] for p in present if p.aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                          options={**options(kernel), "launch_pdl": pdl, "enable_fp_fusion": True})
    info = made.metadata
    if info.global_scratch_size or info.num_ctas != 1:
        raise NotImplementedError("kernels with global scratch or clusters are not launched by this runtime")
    registers, stack = resources(made.asm["cubin"])
    return made.asm["cubin"], {"entry": info.name, "shared": info.shared, "threads": 32 * info.num_warps, "pdl": pdl,
                               "pointers": len(present), "registers": registers, "stack": stack,
                               "loose": [i for i, p in enumerate(present) if not p.aligned],
                               "source": f"source/{family.module}.py"}


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a thread, as cuobjdump tells."""
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True,
                             check=True).stdout
    found = _RESOURCES.search(out)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of resources: {out[-300:]}")
    return int(found[1]), int(found[2]) + int(found[3])


def check_limits(kernel: Kernel, row: dict[str, Any], card: Hardware) -> None:
    """Raises LoweringError when a block of the kernel asks for more shared memory than the card has."""
    if row["shared"] > card.shared:
        raise LoweringError(f"kernel {kernel.symbol} needs {row['shared']} bytes of shared memory, {card.name} has "
                            f"{card.shared} a block; choose smaller tiles in targets/triton/lowering")
