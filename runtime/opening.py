"""Which device a build is opened on, and by how many ranks."""

from __future__ import annotations

from contextlib import suppress
from os import PathLike
from pathlib import Path

from qcn_compile import settings
from qcn_compile.artifact import Manifest
from qcn_compile.errors import ArtifactError, DeviceError, QcnError
from qcn_compile.runtime.cuda.device import CudaDevice
from qcn_compile.runtime.cuda.executable import CudaExecutable
from qcn_compile.runtime.cuda.opening import open_cuda
from qcn_compile.runtime.device import CpuDevice, check_processor, processor_flags, usable
from qcn_compile.runtime.executable import Executable
from qcn_compile.runtime.memory import MemoryPlan
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.ranks.cpu import open_ranks
from qcn_compile.runtime.ranks.cuda import open_ranks_cuda
from qcn_compile.runtime.weights import Report, Weights


def runnable(path: Path, manifest: Manifest) -> Manifest:
    """The manifest. Raises ArtifactError for a build whose kernels no device of this runtime launches."""
    if manifest.target.get("vendor") == "amd":
        raise ArtifactError(f"{path} was built for {manifest.target['name']}: kernels for AMD cards are compiled, but "
                            "this qcn-run launches on NVIDIA cards and CPUs only; build for one of those")
    return manifest


def open_gpus(path: Path, manifest: Manifest, context_length: int | None, max_running: int, budget: int | None,
              model: str | PathLike[str] | None, report: Report | None, prefix: PrefixOptions | None,
              speculate: bool, share: float | None = None, on_host: bool = False
              ) -> tuple[CudaDevice, CudaExecutable, MemoryPlan]:
    """A GPU build on as many GPUs as it has ranks; see `open_cuda`."""
    checkpoint = None if model is None else Path(model)
    opened = open_ranks_cuda if manifest.ranks else open_cuda
    return opened(path, manifest, context_length, max_running, budget, checkpoint, report, prefix, speculate, share,
                  on_host)


def open_cpu(path: Path, manifest: Manifest, memory: MemoryPlan, threads: int | None, pin: bool, huge_pages: bool,
             report: Report | None) -> tuple[CpuDevice, Executable]:
    """A CPU build, with as many processes as it has ranks."""
    threads = threads or settings.threads()
    check_processor(manifest.target)
    if manifest.ranks:
        return open_ranks(path, manifest, memory, threads, pin, huge_pages, report)
    device = CpuDevice(path, usable(manifest.libraries, manifest.target, processor_flags()), threads, pin)
    try:
        weights = Weights(path, manifest.weights, device.read if huge_pages else None, report)
        return device, Executable(path, manifest, device, weights, memory)
    except (QcnError, OSError):
        device.close()
        raise


def close(device: CpuDevice | CudaDevice, executable: Executable | CudaExecutable) -> None:
    """End the other ranks, then the device. Steps on their way are waited for before: their collectives need all
    ranks; not when one of them is gone."""
    if executable.team is not None:
        with suppress(DeviceError):
            executable.settle()
        executable.team.close()
    device.close()
