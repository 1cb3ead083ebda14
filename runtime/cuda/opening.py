"""A build on a card: whether it fits, and its executable."""

from __future__ import annotations

from pathlib import Path

from qcn_compile.artifact import Manifest, read_plan
from qcn_compile.errors import CapacityError
from qcn_compile.runtime.cuda.device import CudaDevice
from qcn_compile.runtime.cuda.executable import CudaExecutable
from qcn_compile.runtime.cuda.footprint import RESERVE, fixed_bytes
from qcn_compile.runtime.cuda.weights import DeviceWeights, look_ups, total_bytes
from qcn_compile.runtime.memory import MemoryPlan, plan_memory, shared_budget
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.weights import Report


def open_cuda(build: Path, manifest: Manifest, context_length: int | None, max_running: int, budget: int | None,
              model: Path | None = None, report: Report | None = None, prefix: PrefixOptions | None = None,
              speculate: bool = False, share: float | None = None, embedding_on_host: bool = False
              ) -> tuple[CudaDevice, CudaExecutable, MemoryPlan]:
    """The first visible GPU with a build loaded. `budget` bytes for caches; None: what the weights leave, or what they
    leave of a `share` of the card. embedding_on_host: the table of tokens in pinned host memory, its rows read over the
    bus.

    Raises ArtifactError for another card's build, CapacityError when the weights or one context do not fit.
    """
    device = CudaDevice(manifest.target)
    try:
        on_host = host_tables(build, manifest) if embedding_on_host else frozenset()
        memory = fitting(device, build, manifest, context_length, max_running, budget, share, prefix, speculate,
                         on_host)
        weights = DeviceWeights(build, manifest.weights, device, model, report, on_host)
        return device, CudaExecutable(build, manifest, device, weights, memory), memory
    except Exception:
        device.close()
        raise


def host_tables(build: Path, manifest: Manifest) -> frozenset[str]:
    """Blobs that may lie in host memory: tables of which a step reads few rows."""
    return look_ups([read_plan(build, name) for name in manifest.plans])


def fitting(device: CudaDevice, build: Path, manifest: Manifest, context_length: int | None, max_running: int,
            budget: int | None, share: float | None, prefix: PrefixOptions | None, speculate: bool,
            on_host: frozenset[str]) -> MemoryPlan:
    """The memory plan of a build on a card. Raises CapacityError when the weights or one context do not fit."""
    plans = [read_plan(build, name) for name in manifest.plans]
    fixed = RESERVE + sum(fixed_bytes(build, manifest, plans, context_length or manifest.context_length,
                                      max_running, on_host).values())
    free = device.free_bytes()
    if fixed > free:
        raise CapacityError(f"{device.name} has {free / 1e9:.1f} GB free, weights and workspace need "
                            f"{fixed / 1e9:.1f} GB; end other programs that use it, build with --quant fp8, or for "
                            "more GPUs with --tp")
    if share is not None:
        budget = shared_budget(share, device.total_bytes(), total_bytes(build, manifest.weights, on_host))
    most = free - fixed if budget is None else min(budget, free - fixed)
    return plan_memory(manifest, context_length, max_running, most, prefix, speculate)
