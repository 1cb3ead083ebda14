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
    ranks = int(manifest.layout.get("tp", 1))
    used = 4 * PEER_ROWS + 8 * ranks * PEER_ROWS * manifest.hidden_size
    return -(-used // BLOCK) * BLOCK if ranks > 1 else 0


def exchange_bytes(manifest: Manifest) -> int:
    """Device bytes of a rank's area, and of what else it takes."""
    return area_bytes(manifest) + SCRATCH if manifest.layout.get("tp", 1) > 1 else 0


class Exchange:
    """One rank's end. All ranks make it, and capture the same plans, in the same order.

    files: the areas of all ranks (see `peers.make_areas`), none to leave everything to NCCL.
    table: device address of what the kernels call `peers`. one_shot: whether all ranks reach each other's memory.
    """

    def __init__(self, device: CudaDevice, nccl: Nccl, manifest: Manifest, rank: int, files: Sequence[int]) -> None:
        self._device, self._nccl = device, nccl
        self.table = device.allocate(SCRATCH)
        self._spare = self.table + SCRATCH // 2
        for count in (4, SCRATCH >> 3):  # ranks connect before anything is captured, or waits for a module to load
            nccl.all_reduce(self._spare, self._spare, count, "bf16", device.stream)
        device.synchronize()
        areas = self._areas(manifest, rank, files)
        self.one_shot = self._all(areas is not None)
        if areas is not None and self.one_shot:
            device.clear(areas[rank], area_bytes(manifest))
            device.upload(self.table, np.array([rank, *areas], np.int64))

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
        if what.kind not in ("all_reduce", "all_gather"):
            raise ArtifactError(f"plan {plan.name}: collective {what.kind!r} is unknown; build again with qcn-compile")
        return partial(getattr(self._nccl, what.kind), *pointers[:2], count, what.dtype, self._device.stream)

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
