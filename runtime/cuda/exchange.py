"""What ranks on GPUs exchange inside a step: NCCL, or for the sums of small steps a kernel over peer memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from qcn_compile.artifact import PEER_ROWS, Launch, Manifest, Plan
from qcn_compile.errors import ArtifactError, DeviceError
from qcn_compile.runtime.cuda.device import CudaDevice
from qcn_compile.runtime.cuda.nccl import Nccl
from qcn_compile.runtime.cuda.peers import BLOCK, map_areas

SCRATCH = 1 << 20
_log = logging.getLogger(__name__)


def area_bytes(manifest: Manifest) -> int:
    """Bytes of one rank's area, as targets/triton/kernels/ranks.py lays it out; 0 for one rank."""
    ranks, _ = degrees(manifest)
    used = 4 * PEER_ROWS + 8 * ranks * PEER_ROWS * manifest.hidden_size
    return -(-used // BLOCK) * BLOCK if ranks > 1 else 0


def exchange_bytes(manifest: Manifest) -> int:
    """Device bytes of a rank's area, and of what else it takes."""
    return area_bytes(manifest) + SCRATCH if max(degrees(manifest)) > 1 else 0


def degrees(manifest: Manifest) -> tuple[int, int]:
    """(ranks of a stage, stages)."""
    return int(manifest.layout.get("tp", 1)), int(manifest.layout.get("pp", 1))


class Exchange:
    """One rank's end. All ranks make it, and capture the same plans, in the same order.

    nccl: of the ranks of a stage; world: of all ranks, where there are several stages. rank: among all.
    files: the areas of the ranks of a stage (see `peers.make_areas`), none to leave everything to NCCL.
    table: device address of what the kernels call `peers`. one_shot: whether all ranks reach each other's memory.
    """

    def __init__(self, device: CudaDevice, nccl: Nccl, manifest: Manifest, rank: int, files: Sequence[int],
                 world: Nccl | None = None) -> None:
        self._device, self._nccl, self._world = device, nccl, world
        self.table = device.allocate(SCRATCH)
        self._spare = self.table + SCRATCH // 2
        for count in (4, SCRATCH >> 3):  # ranks connect before anything is captured, or waits for a module to load
            nccl.all_reduce(self._spare, self._spare, count, "bf16", device.stream)
        self._connect(rank, *degrees(manifest))
        device.synchronize()
        areas = self._areas(manifest, rank, files)
        self.one_shot = self._all(areas is not None)
        if areas is not None and self.one_shot:
            part = rank % len(areas)
            device.clear(areas[part], area_bytes(manifest))
            device.upload(self.table, np.array([part, *areas], np.int64))

    def has_kernel(self, launch: Launch) -> bool:
        """Whether a kernel of ours runs a collective."""
        return self.one_shot and bool(launch.grid) and launch.collective is not None

    def prepare(self, launch: Launch, pointers: list[int], plan: Plan) -> Callable[[], None]:
        """What puts a collective of a plan into the stream; pointers: x, y and those of its kernel."""
        what = launch.collective
        assert what is not None
        if self.has_kernel(launch):
            return partial(self._device.launch, self._device.prepare(launch.kernel, launch.grid, pointers))
        count = {"T": plan.tokens, "S": plan.sequences, "R": plan.rows}[what.rows] * what.width
        if what.kind in ("send", "recv") and self._world is not None:
            place = pointers[0] if what.kind == "send" else pointers[1]
            return partial(getattr(self._world, what.kind), place, count, what.dtype, what.peer, self._device.stream)
        if what.kind not in ("all_reduce", "all_gather"):
            raise ArtifactError(f"plan {plan.name}: collective {what.kind!r} is unknown; build again with qcn-compile")
        return partial(getattr(self._nccl, what.kind), *pointers[:2], count, what.dtype, self._device.stream)

    def _connect(self, rank: int, tp: int, pp: int) -> None:
        """Every transfer between stages once: on to the next, and from the last to all others."""
        if self._world is None:
            return
        ways = [(s, s + 1) for s in range(pp - 1)] + [(pp - 1, s) for s in range(pp - 1)]
        stage, part = divmod(rank, tp)
        for source, to in ways:
            if stage == source:
                self._world.send(self._spare, 4, "bf16", to * tp + part, self._device.stream)
            elif stage == to:
                self._world.recv(self._spare, 4, "bf16", source * tp + part, self._device.stream)

    def _areas(self, manifest: Manifest, rank: int, files: Sequence[int]) -> list[int] | None:
        """Addresses of the areas of all ranks in this process, when it can reach them."""
        if not files:
            return None
        try:
            return map_areas(self._device.driver, rank, files, area_bytes(manifest))
        except DeviceError as error:
            _log.warning("rank %d: all sums go through NCCL, because peer memory cannot be reached: %s", rank, error)
            return None

    def _all(self, mine: bool) -> bool:
        """Whether something holds on all ranks."""
        answer = np.array([0 if mine else 0x3F80], np.uint16)  # bf16: 1 where it does not
        self._device.upload(self._spare, answer)
        self._nccl.all_reduce(self._spare, self._spare, 1, "bf16", self._device.stream)
        self._device.synchronize()
        self._device.download(answer, self._spare)
        return not answer.any()
