"""Kernels to cubins: Triton ahead of time in worker processes, limits checked, sources kept beside; no GPU needed.

    kernels.json     symbol -> file, entry, shared memory, threads, launch attributes, resources, configuration
    <family>-<hash>.cubin, or .hsaco for AMD
    source/*.py      the kernel functions, as compiled
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from qcn_compile.errors import LoweringError, UsageError
from qcn_compile.settings import build_jobs
from qcn_compile.targets.base import Kernel
from qcn_compile.targets.spec import Hardware
from qcn_compile.targets.triton.families import FAMILIES, PACKAGE, Family, constants, options

INDEX = "kernels.json"
TYPES = {"bf16": "*bf16", "f32": "*fp32", "i32": "*i32", "i64": "*i64", "fp8": "*fp8e4nv", "u8": "*u8", "f16": "*fp16"}
FIRST_PDL = 90  # programmatic dependent launch starts with this architecture, as do e4m3 registers
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")
AMD = "amd"
LEAST_KEYS = 16  # of a product on tensor cores
Progress = Callable[[int, int], None]


def emit(kernels: Sequence[Kernel], folder: Path, card: Hardware, progress: Progress | None = None,
         workers: int | None = None) -> list[str]:
    """Compile kernels under `folder`. Returns kernels.json and the cubins. Raises LoweringError naming a kernel that
    does not compile or does not fit the card, UsageError where there is no assembler."""
    (folder / "source").mkdir(parents=True, exist_ok=True)
    ordered = sorted(set(kernels), key=lambda kernel: kernel.symbol)
    index, names = {}, []
    for done, (kernel, (cubin, row)) in enumerate(zip(ordered, compiled(ordered, card, workers), strict=True), 1):
        check_limits(kernel, row, card)
        ending = "hsaco" if card.vendor == AMD else "cubin"
        name = f"{kernel.family}-{hashlib.sha256(kernel.symbol.encode()).hexdigest()[:12]}.{ending}"
        (folder / name).write_bytes(cubin)
        names.append(name)
        index[kernel.symbol] = {"file": name, **row}
        if progress is not None:
            progress(done, len(ordered))
    _keep_sources({FAMILIES[k.family] for k in ordered}, folder / "source")
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return [INDEX, *names]


def _keep_sources(families: set[Family], folder: Path) -> None:
    """The files the kernels are from."""
    for module in sorted({family.module for family in families if not family.file} | {"common"}):
        source = inspect.getsource(import_module(f"{PACKAGE}.{module}"))
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
    for family in families:
        if family.file:
            shutil.copyfile(family.file, folder / f"{family.module}.py")


def compiled(kernels: Sequence[Kernel], card: Hardware,
             workers: int | None = None) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(cubin, row of kernels.json) of each kernel, in order. A crash of the compiler ends a worker, not us."""
    count = min(workers or build_jobs(), max(len(kernels), 1))
    assembler = "" if card.vendor == AMD else os.environ.get("TRITON_PTXAS_PATH") or ptxas()
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_prepare,
                             initargs=(assembler,)) as pool:
        jobs = [pool.submit(fitting, kernel, _gfx(card) if card.vendor == AMD else card.arch,
                            FAMILIES[kernel.family], card.shared) for kernel in kernels]
        for kernel, job in zip(kernels, jobs, strict=True):
            try:
                yield job.result()
            except BrokenProcessPool:
                raise _crash(kernel, card) from None
            except Exception as error:
                pool.shutdown(cancel_futures=True)
                file = FAMILIES[kernel.family].file
                owner = f" of plugin {file}" if file else ""
                raise LoweringError(f"kernel {kernel.symbol}{owner}: Triton cannot compile it for {card.name}: "
                                    f"{type(error).__name__}: {str(error)[-800:]}") from error


def _crash(kernel: Kernel, card: Hardware) -> Exception:
    """Why a worker ended: a script that builds while it is imported, as each worker does again, or the compiler."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None and not Path(script).is_file():
        return UsageError(f"a script read from {script} cannot build: the worker processes of a build import it again; "
                          "save it as a file, with the call under `if __name__ == \"__main__\":`")
    text = Path(script).read_text(encoding="utf-8", errors="replace") if script and Path(script).is_file() else None
    if text is not None and "__main__" not in text:
        return UsageError(f"{script} builds while it is imported, and the worker processes of a build import it again; "
                          'put the call under `if __name__ == "__main__":`')
    return LoweringError(f"kernel {kernel.symbol}: the Triton compiler crashed for sm_{card.arch}; "
                         "report it with this configuration")


def _prepare(assembler: str) -> None:
    """Cubins without source paths are the same bytes everywhere; a test's interpreter must not reach the worker."""
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    if assembler:
        os.environ["TRITON_PTXAS_PATH"] = assembler


def ptxas() -> str:
    """The assembler for NVIDIA cards before Blackwell. Not Triton's own: 12.8 can lose the upper half of a wgmma
    descriptor (tests/targets/triton/test_assembler.py), and a product is silently wrong then. Raises UsageError."""
    package = find_spec("nvidia.cuda_nvcc")
    for folder in package.submodule_search_locations or () if package is not None else ():
        if (path := Path(folder) / "bin" / "ptxas").is_file():
            return str(path)
    raise UsageError("no ptxas 12.9 to assemble GPU kernels with: pip install nvidia-cuda-nvcc-cu12==12.9.86, or name "
                     "another one in TRITON_PTXAS_PATH")


def _gfx(card: Hardware) -> str:
    return f"gfx{card.arch}"


def fitting(kernel: Kernel, arch: int | str, family: Family, shared: int) -> tuple[bytes, dict[str, Any]]:
    """A kernel that takes no more at a time than the shared memory of the card holds; `config`: as it was compiled."""
    while True:
        made, row = compile_one(kernel, arch, family)
        less = _less(kernel)
        if row["shared"] <= shared or less is None:
            return made, {**row, "config": dict(kernel.params)}
        kernel = less


def _less(kernel: Kernel) -> Kernel | None:
    """A kernel that loads one tile less ahead, or else looks at half as many keys at a time: neither its arguments nor
    its grid know. None when it cannot do with less."""
    params = dict(kernel.params)
    depths = {"STAGES": options(kernel)["num_stages"], "PIPE": int(params.get("PIPE", 1))}
    deepest = max(depths, key=lambda name: depths[name])
    if depths[deepest] > 1:
        return Kernel.make(kernel.family, **{**params, deepest: depths[deepest] - 1})
    keys = int(params.get("BS", 0))
    return Kernel.make(kernel.family, **{**params, "BS": keys // 2}) if keys > LEAST_KEYS else None


def compile_one(kernel: Kernel, arch: int | str, family: Family) -> tuple[bytes, dict[str, Any]]:
    """Compile one kernel in this process. One without a parameter PDL is launched when the one before it is done."""
    import triton
    from triton.backends.compiler import GPUTarget

    FAMILIES.setdefault(kernel.family, family)  # a plugin's, which a worker has not loaded
    if isinstance(arch, str):
        return compile_amd(kernel, arch)
    present, _ = family.pointers(kernel)
    pdl = arch >= FIRST_PDL and "PDL" in family.load(kernel.family).arg_names
    source = ast_source(kernel, family, pdl, "*fp8e4nv" if arch >= FIRST_PDL else "*u8")
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


def compile_amd(kernel: Kernel, arch: str) -> tuple[bytes, dict[str, Any]]:
    """(hsaco, row of kernels.json) for an AMD card (gfx942, gfx950). No runtime launches it and nobody has run it.

    e4m3 weights come as bytes and are widened through fp16, so that cards with e4m3 of another kind (fnuz) read the
    same files.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    family = FAMILIES[kernel.family]
    made = triton.compile(ast_source(kernel, family, False, "*u8"), target=GPUTarget("hip", arch, 64),
                          options=options(kernel))
    info, (present, _) = made.metadata, family.pointers(kernel)
    registers, stack = (int(found[1]) if (found := re.search(rf"\.{key}:\s+(\d+)", made.asm["amdgcn"])) else 0
                        for key in ("vgpr_count", "private_segment_fixed_size"))
    return made.asm["hsaco"], {"entry": info.name, "shared": info.shared, "threads": 64 * info.num_warps, "pdl": False,
                               "pointers": len(present), "registers": registers, "stack": stack,
                               "loose": [i for i, p in enumerate(present) if not p.aligned],
                               "source": f"source/{family.module}.py"}


def ast_source(kernel: Kernel, family: Family, pdl: bool, fp8: str) -> Any:
    """What Triton compiles: the function, its pointers' types, and everything else as constants."""
    from triton.compiler import ASTSource

    function = family.load(kernel.family)
    present, absent = family.pointers(kernel)
    fixed = {**constants(kernel), **dict.fromkeys(absent), **({"PDL": pdl} if "PDL" in function.arg_names else {})}
    pointers = {p.name: {**TYPES, "fp8": fp8}[p.dtype] for p in present}
    signature = {name: pointers.get(name, "constexpr") for name in function.arg_names}
    order = {name: at for at, name in enumerate(function.arg_names)}
    aligned = {(order[p.name],): [["tt.divisibility", 16]] for p in present if p.aligned}
    return ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=aligned)


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
