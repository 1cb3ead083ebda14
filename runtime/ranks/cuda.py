"""A GPU build for several ranks: one process a GPU, which exchange over NCCL and over each other's memory.

All GPUs are of this host: stages of a pipeline, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qcn_compile import settings
from qcn_compile.artifact import Manifest, check_ranks, read_manifest
from qcn_compile.errors import DeviceError, RankError
from qcn_compile.runtime.cuda.device import CudaDevice
from qcn_compile.runtime.cuda.exchange import Exchange, area_bytes, degrees
from qcn_compile.runtime.cuda.executable import CudaExecutable
from qcn_compile.runtime.cuda.nccl import Nccl
from qcn_compile.runtime.cuda.opening import fitting, host_tables
from qcn_compile.runtime.cuda.peers import make_areas
from qcn_compile.runtime.cuda.weights import DeviceWeights
from qcn_compile.runtime.memory import MemoryPlan
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.ranks.team import Team, TeamRows
from qcn_compile.runtime.ranks.worker import Setup
from qcn_compile.runtime.weights import Report


def open_ranks_cuda(build: Path, manifest: Manifest, context_length: int | None, max_running: int, budget: int | None,
                    model: Path | None = None, report: Report | None = None, prefix: PrefixOptions | None = None,
                    speculate: bool = False, share: float | None = None, embedding_on_host: bool = False
                    ) -> tuple[CudaDevice, CudaExecutable, MemoryPlan]:
    """Rank 0 on the first visible GPU, the others as processes on the next ones; see `open_cuda`. `budget`: of each."""
    check_ranks(build, manifest.ranks, manifest.layout)
    ranks, sums = len(manifest.ranks), settings.all_reduce()
    fused = sums == "fused"
    own = manifest.of_rank(0, fused)
    device, team = CudaDevice(own.target), None
    try:
        if device.count() < ranks:
            raise DeviceError(f"{build} is for {ranks} GPUs, this machine shows {device.count()}; run it where there "
                              f"are {ranks} (CUDA_VISIBLE_DEVICES chooses them), or build again with a smaller --tp "
                              "or --pp")
        on_host = host_tables(build, own) if embedding_on_host else frozenset()
        fits = [fitting(device, build, manifest.of_rank(rank, fused), context_length, max_running, budget, share,
                        prefix, speculate, on_host) for rank in range(0, ranks, degrees(own)[0])]
        memory = replace(fits[0], pages=min(m.pages for m in fits), snapshots=min(m.snapshots for m in fits))
        unique, deadline = _keys(degrees(own)[1]), float(settings.rank_timeout())
        files = make_areas(device.driver, ranks, area_bytes(own)) if sums != "nccl" and area_bytes(own) else []
        options = {"unique": unique, "model": model, "areas": files, "on_host": embedding_on_host,
                   "fused": fused}

        def setup(rank: int) -> Setup:
            return Setup(f"{__name__}:open_worker", build.resolve(), rank, ranks, memory, deadline, options)

        team = Team(ranks, setup, files)
        executable = team.during(lambda: _open(device, setup(0), own, report))
        team.ready()
        for file in files:
            os.close(file)  # every rank has mapped it
        device.watch = _watch(deadline, team)
        executable.team, executable.rows = team, TeamRows(executable.rows, team)
        return device, executable, memory
    except Exception:
        if team is not None:
            team.close()
        device.close()
        raise


def open_worker(setup: Setup) -> tuple[CudaExecutable, Callable[[str], None]]:
    """In the process of another rank: its executable. Nothing is done when it fails: rank 0 sees that it ends."""
    manifest = read_manifest(setup.build).of_rank(setup.rank, setup.options["fused"])
    device = CudaDevice(manifest.target, setup.rank)
    executable = _open(device, setup, manifest, None)
    device.watch = _watch(setup.deadline)
    return executable, lambda reason: None


def _open(device: CudaDevice, setup: Setup, manifest: Manifest, report: Report | None) -> CudaExecutable:
    """One rank's executable; returns when all ranks have come as far."""
    device.activate()
    on_host = host_tables(setup.build, manifest) if setup.options["on_host"] else frozenset()
    weights = DeviceWeights(setup.build, manifest.weights, device, setup.options["model"], report, on_host)
    (tp, pp), (whole, *stages) = degrees(manifest), setup.options["unique"]
    stage, part = divmod(setup.rank, tp)
    world = Nccl(setup.rank, setup.ranks, whole) if pp > 1 else None
    nccl = Nccl(part, tp, stages[stage]) if world is not None else Nccl(setup.rank, setup.ranks, whole)
    exchange = Exchange(device, nccl, manifest, setup.rank, setup.options["areas"][stage * tp:(stage + 1) * tp], world)
    if setup.options["fused"] and tp > 1 and not exchange.one_shot:
        raise DeviceError("QCN_ALL_REDUCE=fused: the GPUs do not reach each other's memory; leave it out")
    return CudaExecutable(setup.build, manifest, device, weights, setup.memory, exchange)


def _keys(pp: int) -> list[bytes]:
    """NCCL's ids: of all ranks, and of the ranks of each stage where there are several."""
    return [Nccl.unique_id() for _ in range(1 + (pp if pp > 1 else 0))]


def _watch(deadline: float, team: Team | None = None) -> Callable[[float], None]:
    given_up: list[DeviceError] = []  # then every later wait ends at once

    def watch(seconds: float) -> None:
        if team is not None and team.failure is not None:
            raise team.failure
        if seconds > deadline and not given_up:
            given_up.append(RankError(f"a step did not end within {deadline:g} s: a rank does not come to a "
                                      "collective (QCN_RANK_TIMEOUT sets how long to wait); start qcn-run again"))
        if given_up:
            raise given_up[0]
    return watch
