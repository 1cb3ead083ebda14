"""The plans of a build on a GPU: everything allocated and captured when loaded; a step is two copies and one graph."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qcn_compile.artifact import Manifest, Plan, read_plan
from qcn_compile.errors import ArtifactError, CapacityError, DeviceError
from qcn_compile.runtime.batch import Span
from qcn_compile.runtime.cuda.device import ALIGNMENT, CudaDevice, Prepared
from qcn_compile.runtime.cuda.weights import DeviceWeights, total_bytes
from qcn_compile.runtime.executable import Plans
from qcn_compile.runtime.memory import MemoryPlan, page_part_bytes, plan_memory
from qcn_compile.runtime.weights import Report

LINE = 256
RESERVE = 1 << 30  # of device memory: graphs, modules, and what other processes of a desktop take
KERNELS = "kernels"


def open_cuda(build: Path, manifest: Manifest, context_length: int | None, max_running: int, budget: int | None,
              model: Path | None = None, report: Report | None = None) -> tuple[CudaDevice, CudaExecutable, MemoryPlan]:
    """The first visible GPU with a build loaded. `budget` bytes for caches; None: what the weights leave.

    Raises ArtifactError for another card's build, CapacityError when the weights or one context do not fit.
    """
    device = CudaDevice(manifest.target)
    try:
        plans = [read_plan(build, name) for name in manifest.plans]
        fixed = total_bytes(build, manifest.weights) + max(p.workspace_bytes for p in plans) + RESERVE
        free = device.free_bytes()
        if fixed > free:
            raise CapacityError(f"{device.name} has {free / 1e9:.1f} GB free, weights and workspace need "
                                f"{fixed / 1e9:.1f} GB; end other programs that use it, or build with --quant fp8")
        memory = plan_memory(manifest, context_length, max_running, min(budget or free, free - fixed))
        weights = DeviceWeights(build, manifest.weights, device, model, report)
        return device, CudaExecutable(build, manifest, device, weights, memory), memory
    except Exception:
        device.close()
        raise


class CudaExecutable(Plans):
    """Runs the plans on a GPU over caches of its own. Every plan is captured into a graph when loaded."""

    def __init__(self, build: Path, manifest: Manifest, device: CudaDevice, weights: DeviceWeights,
                 memory: MemoryPlan) -> None:
        super().__init__(build, manifest, memory)
        self._device, self._weights = device, weights
        self._base = device.allocate(self.workspace_bytes)
        self._allocate_caches(manifest)
        self._place_inputs()
        device.load(build / KERNELS, {launch.kernel for plan in self._plans for launch in plan.launches})
        self._launches = {plan.name: [self._prepared(plan, i) for i in range(len(plan.launches))]
                          for plan in self._plans}
        self._graphs = {plan.name: self._capture(plan) for plan in self._plans}
        rows = max(plan.rows for plan in self._plans)
        width = max(plan.outputs["logits"]["width"] for plan in self._plans)
        self._raw = device.pinned(4 * rows * width)
        self._logits = np.zeros((rows, width), np.float32)
        device.synchronize()

    def run(self, spans: Sequence[Span]) -> np.ndarray:
        """Run one step. Returns the wanted rows' logits, f32 [R, vocab], valid until the next step.

        Raises CapacityError when no plan holds it, DeviceError when the GPU stopped.
        """
        plan = self.select(sum(len(s.tokens) for s in spans), len(spans), sum(s.wanted for s in spans))
        rows = self._inputs.fill(spans)
        self._device.activate()
        try:
            self.send_inputs()
            if self.profile is None:
                self.replay(plan)
            else:
                began = time.perf_counter()
                self.profile.add(plan, self._timed(plan), began)
            return self._receive(plan, rows)
        except DeviceError as error:
            raise DeviceError(f"plan {plan.name}: {error}; check the build with qcn-run --verify") from None

    def send_inputs(self) -> None:
        """The step's input arrays to the device, in the stream; of the block table only what is used."""
        counts = self._inputs.arrays["counts"]
        used = self._fixed_bytes + 4 * int(counts[1]) * int(counts[3])
        self._device.upload_soon(self._input_base, self._staging[:used])

    def replay(self, plan: Plan) -> None:
        """One plan, in the stream."""
        self._device.replay(self._graphs[plan.name])

    def launch(self, plan: Plan) -> None:
        """One plan kernel by kernel, in the stream."""
        for prepared in self._launches[plan.name]:
            self._device.launch(prepared)

    def plan(self, name: str) -> Plan:
        """A plan by name."""
        return next(plan for plan in self._plans if plan.name == name)

    def _receive(self, plan: Plan, rows: int) -> np.ndarray:
        output = plan.outputs["logits"]
        width, narrow = int(output["width"]), output["dtype"] == "bf16"
        raw = self._raw[:rows * width * (2 if narrow else 4)]
        self._device.download_soon(raw, self._base + int(output["offset"]))
        self._device.synchronize()
        logits = self._logits.reshape(-1)[:rows * width].reshape(rows, width)
        if narrow:
            np.left_shift(raw.view(np.uint16).reshape(rows, width), 16, out=logits.view(np.uint32), dtype=np.uint32)
        else:
            logits[...] = raw.view(np.float32).reshape(rows, width)
        return logits[:, :self._vocab]

    def _timed(self, plan: Plan) -> np.ndarray:
        """Seconds of each launch, run one by one."""
        events = [self._device.event() for _ in range(len(plan.launches) + 1)]
        self._device.record(events[0])
        for prepared, event in zip(self._launches[plan.name], events[1:], strict=True):
            self._device.launch(prepared)
            self._device.record(event)
        self._device.synchronize()
        return np.array([self._device.seconds(a, b) for a, b in pairwise(events)])

    def _capture(self, plan: Plan) -> Any:
        return self._device.capture(lambda: self.launch(plan))

    def _allocate_caches(self, manifest: Manifest) -> None:
        """One allocation for all KV pages and states."""
        sizes: dict[tuple[str, str], int] = {}
        for cache in manifest.caches:
            if cache.kind == "kv":
                sizes |= {(cache.name, part): self._memory.pages * page_part_bytes(cache) for part in ("k", "v")}
            else:
                sizes[cache.name, ""] = self._memory.slots * cache.unit_bytes
        at = self._device.allocate(sum(-(-n // LINE) * LINE for n in sizes.values()))
        for key, nbytes in sizes.items():
            self._caches[key] = at
            at += -(-nbytes // LINE) * LINE

    def _place_inputs(self) -> None:
        """Input arrays move into one pinned block, the block table last, with a twin on the device."""
        arrays = self._inputs.arrays
        order = sorted(arrays, key=lambda name: name == "block_table")
        offsets, at = {}, 0
        for name in order:
            offsets[name] = at
            at += -(-arrays[name].nbytes // LINE) * LINE
        self._staging, self._input_base = self._device.pinned(at), self._device.allocate(at)
        self._staging[:] = 0
        self._fixed_bytes = offsets["block_table"]
        for name, offset in offsets.items():
            arrays[name] = self._staging[offset:offset + arrays[name].nbytes].view(np.int32)
            self._places[name] = self._input_base + offset

    def _prepared(self, plan: Plan, index: int) -> Prepared:
        launch = plan.launches[index]
        pointers = [self._pointer(arg, plan) for arg in launch.args]
        loose = self._device.loose(launch.kernel)
        for place, (arg, pointer) in enumerate(zip(launch.args, pointers, strict=True)):
            if pointer % ALIGNMENT and place not in loose:
                raise ArtifactError(f"plan {plan.name}, {launch.op}: argument {arg.kind} {arg.name} is not on a "
                                    f"{ALIGNMENT}-byte boundary; build again with qcn-compile")
        return self._device.prepare(launch.kernel, launch.grid, pointers)
