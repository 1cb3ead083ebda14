"""The plans of a build on a GPU: everything allocated and captured when loaded; a step is two copies and one graph."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qcn_compile.artifact import Arg, Manifest, Plan, read_plan
from qcn_compile.errors import ArtifactError, CapacityError, DeviceError
from qcn_compile.runtime.batch import Capacity, InputArrays, Span, demand
from qcn_compile.runtime.choice import Pick
from qcn_compile.runtime.cuda.device import ALIGNMENT, CudaDevice, Prepared
from qcn_compile.runtime.cuda.footprint import (
    RESERVE,
    cache_groups,
    fixed_bytes,
    footprint,
    input_sizes,
    offsets,
    pitch,
)
from qcn_compile.runtime.cuda.rows import CudaRows, Group
from qcn_compile.runtime.cuda.sampling import WIDTH, SlotArrays, write_choice
from qcn_compile.runtime.cuda.weights import DeviceWeights
from qcn_compile.runtime.executable import Plans
from qcn_compile.runtime.memory import MemoryPlan, plan_memory
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.weights import Report

KERNELS = "kernels"


def open_cuda(build: Path, manifest: Manifest, context_length: int | None, max_running: int, budget: int | None,
              model: Path | None = None, report: Report | None = None, prefix: PrefixOptions | None = None,
              speculate: bool = False) -> tuple[CudaDevice, CudaExecutable, MemoryPlan]:
    """The first visible GPU with a build loaded. `budget` bytes for caches; None: what the weights leave.

    Raises ArtifactError for another card's build, CapacityError when the weights or one context do not fit.
    """
    device = CudaDevice(manifest.target)
    try:
        plans = [read_plan(build, name) for name in manifest.plans]
        fixed = RESERVE + sum(fixed_bytes(build, manifest, plans, context_length or manifest.context_length,
                                          max_running).values())
        free = device.free_bytes()
        if fixed > free:
            raise CapacityError(f"{device.name} has {free / 1e9:.1f} GB free, weights and workspace need "
                                f"{fixed / 1e9:.1f} GB; end other programs that use it, or build with --quant fp8")
        memory = plan_memory(manifest, context_length, max_running, min(budget or free, free - fixed), prefix,
                             speculate)
        weights = DeviceWeights(build, manifest.weights, device, model, report)
        return device, CudaExecutable(build, manifest, device, weights, memory), memory
    except Exception:
        device.close()
        raise


class Stage:
    """One of two sets of pinned input arrays: the host fills one while the device may still wait to read the other.

    Every plan has its own layout of them, as tight as its capacities, so that little is copied; block table last.
    """

    def __init__(self, device: CudaDevice, plans: Sequence[Plan], width: int) -> None:
        self.arrays = {plan.name: _inputs(plan, width) for plan in plans}
        self.offsets = {plan.name: offsets(plan, width) for plan in plans}
        self.nbytes = max(places["end"] for places in self.offsets.values())
        block = device.pinned(self.nbytes)
        block[:] = 0
        for name, inputs in self.arrays.items():
            for key, array in inputs.arrays.items():
                at = self.offsets[name][key]
                inputs.arrays[key] = block[at:at + array.nbytes].view(np.int32)
        self.block = block
        self.chosen = device.pinned(4 * max(plan.rows for plan in plans)).view(np.int32)
        self.done = device.event(timed=False)

    def used(self, plan: Plan) -> int:
        """Bytes to copy: all arrays, of the block table only what is filled."""
        counts = self.arrays[plan.name].arrays["counts"]
        return self.offsets[plan.name]["block_table"] + 4 * int(counts[1]) * int(counts[3])


def _inputs(plan: Plan, width: int) -> InputArrays:
    inputs = InputArrays([Capacity(plan.tokens, plan.sequences, plan.rows)], width)
    inputs.arrays = {name: np.zeros(size, np.int32) for name, size in input_sizes(plan, width).items()}
    return inputs


class CudaStep:
    """A step on its way through the stream."""

    def __init__(self, executable: CudaExecutable, plan: Plan, stage: Stage, rows: int) -> None:
        self._executable, self._plan, self._stage, self._rows = executable, plan, stage, rows

    def tokens(self) -> np.ndarray:
        """i32 [R], the tokens chosen; -1 in rows left to the host, and where logits are no numbers."""
        self._executable.wait(self._plan, self._stage)
        return self._stage.chosen[:self._rows].copy()

    def logits(self) -> np.ndarray:
        """f32 [R, vocab] of a step that left rows to the host; valid until the next one."""
        self._executable.wait(self._plan, self._stage)
        return self._executable.widened(self._plan, self._rows)


class CudaExecutable(Plans):
    """Runs the plans on a GPU over caches of its own. Every plan is captured into a graph when loaded."""

    def __init__(self, build: Path, manifest: Manifest, device: CudaDevice, weights: DeviceWeights,
                 memory: MemoryPlan) -> None:
        super().__init__(build, manifest, memory)
        self._device, self._weights = device, weights
        self.footprint = footprint(build, manifest, self._plans, memory)
        self._base = device.allocate(self.workspace_bytes)
        self._allocate_caches(manifest)
        self._stages = [Stage(device, self._plans, -(-memory.context_length // memory.page_size)) for _ in range(2)]
        self._input_base = device.allocate(self._stages[0].nbytes)
        self._slot_arrays = SlotArrays(device, memory.slots, self._vocab, max(plan.rows for plan in self._plans))
        self._places = dict(self._slot_arrays.places)
        self._chosen = self._places["chosen"]
        self.least_token = -memory.slots
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
        return self.launch(spans, [None] * sum(s.wanted for s in spans)).logits()

    def launch(self, spans: Sequence[Span], picks: Sequence[Pick | None]) -> CudaStep:
        """Start a step; one pick a wanted row. The step before may still run. Raises as `run` does."""
        plan = self.select(*demand(spans))
        spans = [self._moved(span) for span in spans]
        stage = self._stages[0]
        self._stages.reverse()
        self._device.activate()
        self.wait(plan, stage)
        self._inputs = stage.arrays[plan.name]
        rows = self._inputs.fill(spans)
        write_choice(self._inputs.arrays["choice"].reshape(-1, WIDTH), picks)
        try:
            self._slot_arrays.send(picks)
            self._device.upload_soon(self._input_base, stage.block[:stage.used(plan)])
            if self.profile is None:
                self.replay(plan)
            else:
                began = time.perf_counter()
                self.profile.add(plan, self._timed(plan), began)
            self._return(plan, stage, rows, picks)
        except DeviceError as error:
            raise self._stopped(plan, error) from None
        return CudaStep(self, plan, stage, rows)

    def _moved(self, span: Span) -> Span:
        """GPU kernels write a state where they read it: one that goes elsewhere is copied there first."""
        if span.into is None:
            return span
        self.rows.copy_state(span.slot, span.into)
        return replace(span, slot=span.into, into=None)

    def wait(self, plan: Plan, stage: Stage) -> None:
        """Until the last step from a stage has ended."""
        try:
            self._device.wait(stage.done)
        except DeviceError as error:
            raise self._stopped(plan, error) from None

    def widened(self, plan: Plan, rows: int) -> np.ndarray:
        """The logits that were copied back, as f32."""
        output = plan.outputs["logits"]
        width = int(output["width"])
        logits = self._logits.reshape(-1)[:rows * width].reshape(rows, width)
        if output["dtype"] == "bf16":
            raw = self._raw[:2 * rows * width].view(np.uint16).reshape(rows, width)
            np.left_shift(raw, 16, out=logits.view(np.uint32), dtype=np.uint32)
        else:
            logits[...] = self._raw[:4 * rows * width].view(np.float32).reshape(rows, width)
        return logits[:, :self._vocab]

    def replay(self, plan: Plan) -> None:
        """One plan, in the stream."""
        self._device.replay(self._graphs[plan.name])

    def run_launches(self, plan: Plan) -> None:
        """One plan kernel by kernel, in the stream."""
        for prepared in self._launches[plan.name]:
            self._device.launch(prepared)

    def plan(self, name: str) -> Plan:
        """A plan by name."""
        return next(plan for plan in self._plans if plan.name == name)

    def _return(self, plan: Plan, stage: Stage, rows: int, picks: Sequence[Pick | None]) -> None:
        """Copy back what the host wants, and mark the end of the step."""
        if rows:
            self._device.download_soon(stage.chosen[:rows], self._chosen)
        if None in picks:
            output = plan.outputs["logits"]
            size = rows * int(output["width"]) * (2 if output["dtype"] == "bf16" else 4)
            self._device.download_soon(self._raw[:size], self._base + int(output["offset"]))
        self._device.record(stage.done)

    def _stopped(self, plan: Plan, error: DeviceError) -> DeviceError:
        return DeviceError(f"plan {plan.name}: {error}; check the build with qcn-run --verify")

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
        return self._device.capture(lambda: self.run_launches(plan))

    def _allocate_caches(self, manifest: Manifest) -> None:
        """One allocation for all KV pages and states; arrays of one kind and size follow each other."""
        table = cache_groups(manifest)
        at = self._device.allocate(sum(len(keys) * pitch(unit, paged, self._memory)
                                       for (paged, unit), keys in table.items()))
        groups: dict[bool, list[Group]] = {True: [], False: []}
        for (paged, unit), keys in table.items():
            size = pitch(unit, paged, self._memory)
            groups[paged].append(Group(at, len(keys), size, unit))
            for key in keys:
                self._caches[key] = at
                at += size
        self.rows = CudaRows(self._device, groups[True], groups[False])

    def _pointer(self, arg: Arg, plan: Plan) -> int:
        places = self._stages[0].offsets[plan.name]
        if arg.kind == "input" and arg.name in places:
            return self._input_base + places[arg.name]
        return super()._pointer(arg, plan)

    def _prepared(self, plan: Plan, index: int) -> Prepared:
        launch = plan.launches[index]
        pointers = [self._pointer(arg, plan) for arg in launch.args]
        loose = self._device.loose(launch.kernel)
        for place, (arg, pointer) in enumerate(zip(launch.args, pointers, strict=True)):
            if pointer % ALIGNMENT and place not in loose:
                raise ArtifactError(f"plan {plan.name}, {launch.op}: argument {arg.kind} {arg.name} is not on a "
                                    f"{ALIGNMENT}-byte boundary; build again with qcn-compile")
        return self._device.prepare(launch.kernel, launch.grid, pointers)
