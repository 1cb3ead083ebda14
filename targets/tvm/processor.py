"""Which processor to compile for, and what kernels may use of it."""

from __future__ import annotations

import platform
from dataclasses import replace
from functools import cache
from pathlib import Path

from qcn_compile.errors import LoweringError, UsageError
from qcn_compile.targets.spec import Hardware, catalogue, hardware

CPUINFO = Path("/proc/cpuinfo")
NEEDS = {  # our feature -> flags of /proc/cpuinfo, and LLVM's names of the same
    "avx2": (("avx2", "fma", "f16c"), ("avx2", "fma", "f16c")),
    "avx512": (("avx512f", "avx512bw", "avx512vl", "avx512dq"), ("avx512f", "avx512bw", "avx512vl", "avx512dq")),
    "vnni": (("avx512_vnni",), ("avx512vnni",)),
    "avxvnni": (("avx_vnni",), ("avxvnni",)),
    "neon": (("asimd",), ("neon",)),
    "dotprod": (("asimddp",), ("dotprod",)),
}
PORTABLE = "portable"  # --mcpu: AVX2 kernels, and those of VARIANTS
Variants = dict[str, dict[str, tuple[str, tuple[str, ...]]]]
VARIANTS: Variants = {  # level -> what its builds have int8 products for as well, chosen when loaded
    PORTABLE: {"avx512vnni": ("x86-64-v4", ("avx2", "avx512", "vnni")), "avxvnni": ("x86-64-v3", ("avx2", "avxvnni"))},
    "arm64": {"dotprod": ("generic", ("neon", "dotprod"))},
}
MACHINES = {"arm": "aarch64"}  # vendor -> what uname -m says there; else x86_64


def resolve(mcpu: str | None) -> Hardware:
    """The processor of that name; None means this one. Unknown names are looked up in LLVM."""
    if mcpu in (None, "", "host", "native"):
        return _host()
    assert mcpu is not None
    if mcpu == PORTABLE:
        return replace(catalogue()["x86-64-v3"], name=PORTABLE)
    found = catalogue().get(mcpu)
    if found is not None and found.kind == "cpu" and not found.backend:
        raise UsageError(f"--mcpu {mcpu}: no kernels are written for {found.vendor} processors yet, so it cannot be "
                         "built; --plan-only tells what it would hold and take")
    if found is not None and found.kind == "cpu":
        return replace(found, name=mcpu, mcpu=found.mcpu if found.vendor == "arm" else mcpu)
    return _from_llvm(mcpu)


@cache
def _host() -> Hardware:
    if platform.machine() not in ("x86_64", "AMD64"):
        raise LoweringError(f"this machine is {platform.machine()}: only x86-64 processors are recognised; name yours "
                            "with --mcpu, for example arm64 or neoverse-v2 (or x86-64-v3, for another machine)")
    text = CPUINFO.read_text(encoding="utf-8") if CPUINFO.is_file() else ""
    flags = next((set(line.split(":")[1].split()) for line in text.splitlines() if line.startswith("flags")), set())
    features = tuple(name for name, (wanted, _) in NEEDS.items() if flags.issuperset(wanted))
    return replace(hardware("host"), features=features)


@cache
def _from_llvm(mcpu: str) -> Hardware:
    import tvm

    target = tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu"})
    if mcpu not in [str(name) for name in tvm.target.codegen.llvm_get_cpu_archlist(target)]:
        raise UsageError(f"--mcpu {mcpu}: neither data/cpu.toml nor LLVM knows it; "
                         f"try {', '.join(sorted(k for k, v in catalogue().items() if v.kind == 'cpu'))}")
    features = tuple(name for name, (_, wanted) in NEEDS.items() if _has(mcpu, wanted))
    return replace(hardware("host"), name=mcpu, mcpu=mcpu, features=features)


def llvm_name(chip: Hardware) -> str:
    """LLVM's name of the processor. A virtual machine may hide instructions of the processor that LLVM recognises:
    then the widest level that has only what is there."""
    if chip.mcpu:
        return chip.mcpu
    import tvm

    name = str(tvm.target.codegen.llvm_get_system_cpu())
    hidden = [f for f, (_, wanted) in NEEDS.items() if f not in chip.features and _has(name, wanted)]
    if not hidden:
        return name
    return "x86-64-v4" if "avx512" in chip.features else "x86-64-v3" if "avx2" in chip.features else "x86-64-v2"


def variants(chip: Hardware) -> dict[str, Hardware]:
    """The processors that a portable build has kernels for besides its own, the most able first."""
    return {name: replace(chip, mcpu=mcpu, features=features)
            for name, (mcpu, features) in VARIANTS.get(chip.name, {}).items()}


def machine(chip: Hardware) -> str:
    """The architecture as uname -m names it: x86_64 or aarch64."""
    return MACHINES.get(chip.vendor, "x86_64")


def _has(mcpu: str, wanted: tuple[str, ...]) -> bool:
    import tvm

    return all(tvm.target.codegen.llvm_cpu_has_features(w, llvm_target(mcpu)) for w in wanted)


def llvm_target(mcpu: str, features: tuple[str, ...] = (), vendor: str = "") -> object:
    """TVM's target for an LLVM processor name that has our `features`, too."""
    import tvm

    attributes = [f"+{wanted}" for name in features for wanted in NEEDS.get(name, ((), (name,)))[1]]
    triple = f"{MACHINES.get(vendor, 'x86_64')}-unknown-linux-gnu"
    return tvm.target.Target({"kind": "llvm", "mtriple": triple, "mcpu": mcpu,
                              **({"mattr": attributes} if attributes else {})})
