"""Targets by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcn_compile.errors import UsageError
from qcn_compile.targets.spec import Hardware, catalogue, chip_of

if TYPE_CHECKING:
    from qcn_compile.targets.base import Target

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
    chip = chip_to_build(name)
    if chip.kind == "cpu":
        from qcn_compile.targets.cpu import CpuTarget

        return CpuTarget(mcpu or name)
    from qcn_compile.targets.triton.target import GpuTarget

    return GpuTarget(name)


def chip_to_build(name: str) -> Hardware:
    """The hardware behind a target's name. Raises UsageError for an unknown one and one without kernels."""
    chip = chip_of(name)
    if not chip.backend and name not in ("cpu", "null"):
        raise UsageError(f"--target {name}: no kernels are written for it yet, so it cannot be built; "
                         f"--plan-only tells what it would hold and take. Builds are for {', '.join(buildable())}")
    return chip


def buildable() -> list[str]:
    """Names of chips that kernels are written for, with their aliases."""
    return sorted(name for name, chip in catalogue().items() if chip.backend)
