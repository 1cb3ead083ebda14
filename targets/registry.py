"""Targets by name."""

from __future__ import annotations

from qcn_compile.errors import UsageError
from qcn_compile.targets.base import Target

GPUS = ("a100", "h100", "h200", "b200")


def load_target(name: str, mcpu: str | None = None) -> Target:
    """The target of that name. Raises UsageError listing the known ones."""
    if name == "cpu":
        from qcn_compile.targets.cpu import CpuTarget

        return CpuTarget(mcpu)
    if name == "null":
        from qcn_compile.targets.null import NullTarget

        return NullTarget()
    if name in GPUS:
        from qcn_compile.targets.triton.target import GpuTarget

        return GpuTarget(name)
    raise UsageError(f"--target {name}: unknown; choose cpu, null or one of {', '.join(GPUS)}")
