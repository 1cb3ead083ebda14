"""A CPU build for several ranks: shared memory between them, one executable each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from qcn_compile import settings
from qcn_compile.artifact import Manifest, check_ranks, read_manifest
from qcn_compile.errors import QcnError
from qcn_compile.runtime.communicator import SharedMemory, room
from qcn_compile.runtime.device import CpuDevice, processor_flags, usable
from qcn_compile.runtime.executable import Executable
from qcn_compile.runtime.memory import MemoryPlan
from qcn_compile.runtime.ranks.team import Team, TeamRows
from qcn_compile.runtime.ranks.worker import Setup
from qcn_compile.runtime.weights import Report, Weights


def open_ranks(build: Path, manifest: Manifest, memory: MemoryPlan, threads: int, pin: bool, huge_pages: bool,
               report: Report | None = None) -> tuple[CpuDevice, Executable]:
    """Rank 0 here, the others as processes; each gets its share of `threads`. `executable.team` ends them."""
    check_ranks(build, manifest.ranks, manifest.layout)
    tp = int(manifest.layout.get("tp", 1))
    ranks, share = len(manifest.ranks), max(1, threads // len(manifest.ranks))
    deadline = float(settings.rank_timeout())
    device = CpuDevice(build, _libraries(manifest), share, pin and ranks == 1)
    team, file = None, -1
    try:
        file = room(device.host, ranks, tp)
        communicator = SharedMemory(device.host, file, 0, ranks, deadline, tp=tp)
        options = {"file": file, "threads": share, "huge_pages": huge_pages, "parent": os.getpid(), "tp": tp}

        def setup(rank: int) -> Setup:
            return Setup(f"{__name__}:open_worker", build.resolve(), rank, ranks, memory, deadline, options)

        team = Team(ranks, setup, [file], communicator.fail)
        team.ready()
        own = manifest.of_rank(0)
        weights = Weights(build, own.weights, device.read if huge_pages else None, report)
        executable = Executable(build, own, device, weights, memory, communicator)
        executable.team, executable.rows = team, TeamRows(executable.rows, team)
        return device, executable
    except (QcnError, OSError):
        if team is not None:
            team.close()
        device.close()
        raise
    finally:
        if file >= 0:
            os.close(file)  # every rank has mapped it


def open_worker(setup: Setup) -> tuple[Executable, Callable[[str], None]]:
    """In the process of another rank: its executable, and what ends the waits of all."""
    manifest = read_manifest(setup.build).of_rank(setup.rank)
    device = CpuDevice(setup.build, _libraries(manifest), setup.options["threads"])
    communicator = SharedMemory(device.host, setup.options["file"], setup.rank, setup.ranks, setup.deadline,
                                setup.options["parent"], setup.options["tp"])
    weights = Weights(setup.build, manifest.weights, device.read if setup.options["huge_pages"] else None)
    return Executable(setup.build, manifest, device, weights, setup.memory, communicator), communicator.fail


def _libraries(manifest: Manifest) -> list[str]:
    return usable(manifest.libraries, manifest.target, processor_flags())
