"""Kernels to shared libraries: TVMScript text, LLVM object code, the small host library; byte for byte repeatable."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qcn_compile.errors import LoweringError
from qcn_compile.targets.base import Kernel
from qcn_compile.targets.spec import Hardware
from qcn_compile.targets.tvm.processor import llvm_name, llvm_target, machine, variants

HERE = Path(__file__).parent
HOST, KERNELS = "libqcnhost.so", "libkernels.so"
HOST_SOURCES = ("host.c", "memory.c", "ranks.c")
LINK = ("-shared", "-fPIC", "-Wl,--build-id=none", "-Wl,-Bsymbolic", "-Wl,-z,noexecstack")
Progress = Callable[[int, int], None]


def emit(kernels: Sequence[Kernel], folder: Path, chip: Hardware, progress: Progress | None = None) -> list[str]:
    """Write the libraries, host.c and source/<kernel>.py under `folder`; returns the libraries: the host's, those of
    the chip's variants, which hold the kernels with int8 activations only, and that of all kernels."""
    (folder / "source").mkdir(parents=True, exist_ok=True)
    build_host(folder, machine(chip))
    ordered = sorted(set(kernels), key=lambda kernel: kernel.symbol)
    integer = [kernel for kernel in ordered if dict(kernel.params).get("act") == "int8"]
    parts = [(variant_library(name), other, integer) for name, other in variants(chip).items() if integer]
    parts.append((KERNELS, chip, ordered))
    done, total = 0, sum(len(part) for _, _, part in parts)
    for library, target, part in parts:
        def tell(count: int, before: int = done) -> None:
            if progress is not None:
                progress(before + count, total)

        link(part, folder / library, target, folder / "source" if library == KERNELS else None, tell)
        done += len(part)
    return [HOST, *(library for library, _, _ in parts)]


def variant_library(name: str) -> str:
    """File name of the kernels of a variant."""
    return f"libkernels-{name}.so"


def link(kernels: Sequence[Kernel], library: Path, chip: Hardware, sources: Path | None,
         tell: Callable[[int], None]) -> None:
    """One shared library of kernels, and their sources beside it."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(HERE / "glue.c", Path(scratch) / "glue.c")
        objects = []
        for done, kernel in enumerate(kernels, 1):
            function = kernel_function(kernel, chip)
            if sources is not None:
                (sources / f"{kernel.symbol}.py").write_text(function.script() + "\n", encoding="utf-8")
            objects.append(f"{done}.o")
            write_object(function, chip, Path(scratch) / objects[-1])
            tell(done)
        run_compiler(["-O2", *LINK, "-o", str(library.resolve()), *objects, "glue.c", "-lm"], scratch,
                     machine(chip))


def kernel_function(kernel: Kernel, chip: Hardware) -> Any:
    """The PrimFunc of a kernel for a processor."""
    from qcn_compile.targets.tvm.kernels import source
    from qcn_compile.targets.tvm.kernels.core import Machine

    return source(kernel, Machine.of(chip.features))


def write_object(function: Any, chip: Hardware, file: Path) -> None:
    """The object code of one kernel."""
    compiled([function], chip).write_to_file(str(file))


def compiled(functions: Sequence[Any], chip: Hardware) -> Any:
    """The LLVM module of PrimFuncs: ask it for an object file, or for `inspect_source("asm")`."""
    import tvm

    module = tvm.IRModule({str(function.attrs["global_symbol"]): function for function in functions})
    return tvm.compile(module, llvm_target(llvm_name(chip), chip.features, chip.vendor)).mod


def build_host(folder: Path, machine_: str = platform.machine()) -> None:
    """The host's sources, and the library made from them, for this machine or another."""
    for name in HOST_SOURCES:
        shutil.copyfile(HERE / name, folder / name)
    flags = ["-O2", "-std=gnu11", "-fvisibility=hidden", *LINK, "-o", HOST, *HOST_SOURCES, "-lpthread", "-ldl"]
    run_compiler(flags, str(folder), machine_)


def compiler(machine_: str) -> list[str]:
    """The C compiler for a machine as uname -m names it: $CC; gcc, cc or clang here; elsewhere gcc's or zig's cross
    compiler. Raises LoweringError that says what to install."""
    if command := shlex.split(os.environ.get("CC", "")):
        return command
    if machine_ == platform.machine():
        found = next((name for name in ("gcc", "cc", "clang") if shutil.which(name)), None)
        if found is None:
            raise LoweringError("no C compiler found to link the kernels; install gcc or clang, or set CC")
        return [found]
    if shutil.which(gcc := f"{machine_}-linux-gnu-gcc"):
        return [gcc]
    zig = [sys.executable, "-m", "ziglang"] if find_spec("ziglang") else ["zig"] if shutil.which("zig") else None
    if zig:
        return [*zig, "cc", "-target", f"{machine_}-linux-gnu"]
    raise LoweringError(f"no C compiler here links for {machine_}; install {gcc} (Debian, Ubuntu: apt install "
                        f"gcc-{machine_.replace('_', '-')}-linux-gnu) or zig (pip install ziglang), "
                        "or set CC to another cross compiler")


def run_compiler(arguments: Sequence[str], folder: str, machine_: str) -> None:
    """Run the C compiler in `folder`. Raises LoweringError with its last words."""
    command = [*compiler(machine_), *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LoweringError(f"cannot run the C compiler {command[0]}: {error}; install gcc, or set CC") from None
    if done.returncode != 0:
        raise LoweringError(f"the C compiler failed: {done.stderr.strip()[-800:]}; check CC ({command[0]})")
