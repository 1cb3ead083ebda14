"""Targets by name."""

from __future__ import annotations

from qcn_compile.errors import UsageError
from qcn_compile.targets.base import Target
from qcn_compile.targets.spec import catalogue, chip_of

GPUS = ("a100", "h100", "h200", "b200")


def load_target(name: str, mcpu: str | None = None) -> Target:
    """The target of that name: cpu, null, a chip of targets/data, or a file like those.

    Raises UsageError for an unknown one, listing the known, and for one that is planned for but cannot be built yet.
    """
    if name == "null":
        from qcn_compile.targets.null import NullTarget

        return NullTarget()
    if name == "cpu":
        from qcn_compile.targets.cpu import CpuTarget

        return CpuTarget(mcpu)
    chip = chip_of(name)
    if not chip.backend:
        raise UsageError(f"--target {name}: no kernels are written for it yet, so it cannot be built; "
                         f"--plan-only tells what it would hold and take. Builds are for {', '.join(buildable())}")
    if chip.kind == "cpu":
        from qcn_compile.targets.cpu import CpuTarget

        return CpuTarget(mcpu or name)
    from qcn_compile.targets.triton.target import GpuTarget

    return GpuTarget(name)


def buildable() -> list[str]:
    """Names of chips that kernels are written for, with their aliases."""
    return sorted(name for name, chip in catalogue().items() if chip.backend)
