"""The plans of a build on a GPU: everything allocated and captured when loaded; a step is two copies and one graph."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qcn_compile.artifact import Arg, Manifest, Plan, read_plan
from qcn_compile.errors import ArtifactError, CapacityError, DeviceError
from qcn_compile.runtime.batch import Span, demand
from qcn_compile.runtime.choice import Pick
from qcn_compile.runtime.cuda.device import ALIGNMENT, CudaDevice, Prepared
from qcn_compile.runtime.cuda.footprint import (
    RESERVE,
    cache_groups,
    fixed_bytes,
    footprint,
    pitch,
)
from qcn_compile.runtime.cuda.hidden import HiddenStates
from qcn_compile.runtime.cuda.rows import CudaRows, Group
from qcn_compile.runtime.cuda.sampling import WIDTH, SlotArrays, write_choice, write_likeliest
from qcn_compile.runtime.cuda.stage import Stage
from qcn_compile.runtime.cuda.weights import DeviceWeights, look_ups
from qcn_compile.runtime.executable import Plans
from qcn_compile.runtime.memory import MemoryPlan, plan_memory
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.speculation.chain import following, last_rows
from qcn_compile.runtime.weights import Report

KERNELS = "kernels"


def open_cuda(build: Path, manifest: Manifest, context_length: int | None, max_running: int, budget: int | None,
              model: Path | None = None, report: Report | None = None, prefix: PrefixOptions | None = None,
              speculate: bool = False, embedding_on_host: bool = False
              ) -> tuple[CudaDevice, CudaExecutable, MemoryPlan]:
    """The first visible GPU with a build loaded. `budget` bytes for caches; None: what the weights leave.
    embedding_on_host: the table of tokens in pinned host memory, its rows read over the bus.

    Raises ArtifactError for another card's build, CapacityError when the weights or one context do not fit.
    """
    device = CudaDevice(manifest.target)
    try:
        plans = [read_plan(build, name) for name in manifest.plans]
        on_host = look_ups(plans) if embedding_on_host else frozenset()
        fixed = RESERVE + sum(fixed_bytes(build, manifest, plans, context_length or manifest.context_length,
                                          max_running, on_host).values())
        free = device.free_bytes()
        if fixed > free:
            raise CapacityError(f"{device.name} has {free / 1e9:.1f} GB free, weights and workspace need "
                                f"{fixed / 1e9:.1f} GB; end other programs that use it, or build with --quant fp8")
        memory = plan_memory(manifest, context_length, max_running, min(budget or free, free - fixed), prefix,
                             speculate)
        weights = DeviceWeights(build, manifest.weights, device, model, report, on_host)
        return device, CudaExecutable(build, manifest, device, weights, memory), memory
    except Exception:
        device.close()
        raise


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
        self.host_weight_bytes = weights.host_bytes
        self.footprint = footprint(build, manifest, self._every, memory, weights.on_host)
        self._base = device.allocate(self.workspace_bytes)
        self._allocate_caches(manifest)
        self._stages = [Stage(device, self._every, -(-memory.context_length // memory.page_size)) for _ in range(2)]
        self._input_base = device.allocate(self._stages[0].nbytes)
        rows = max(plan.rows for plan in self._every)
        self._slot_arrays = SlotArrays(device, memory.slots, self._vocab, rows)
        self._places = dict(self._slot_arrays.places)
        self._chosen = self._places["chosen"]
        self._states = HiddenStates(device, self._every, manifest.hidden_size) if self._draft_plans else None
        if self._states is not None:
            self._places["hidden"] = self._states.place
        self.least_token, self._last = -memory.slots, self._plans[0]
        device.load(build / KERNELS, {launch.kernel for plan in self._every for launch in plan.launches})
        self._launches = {plan.key: [self._prepared(plan, i) for i in range(len(plan.launches))]
                          for plan in self._every}
        self._graphs = {plan.key: self._capture(plan) for plan in self._every}
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
        stage, rows = self._staged(plan, spans)
        write_choice(self._inputs.arrays["choice"].reshape(-1, WIDTH), picks)
        self._start(plan, stage, rows, picks)
        return CudaStep(self, plan, stage, rows)

    def hidden(self) -> np.ndarray:
        """Hidden states of the last step, bits of bf16, u16 [T, hidden], valid until the next of any kind."""
        assert self._states is not None
        return self._states.fetch(self._hidden_place(), int(self._inputs.arrays["counts"][0]))

    def draft(self, spans: Sequence[Span], hidden: np.ndarray, rounds: int = 1) -> np.ndarray:
        """Rounds of the draft head from tokens and the hidden states of those before them, as `hidden` gives them; the
        device hands token and state on. Returns the wanted rows' likeliest tokens, i32 [rounds, R]. Raises as `run`."""
        assert self._states is not None
        started: list[CudaStep] = []
        found: list[np.ndarray] = []
        for number in range(rounds):
            if len(started) == len(self._stages):
                found.append(started.pop(0).tokens())
            if number:
                self._states.carry(self._hidden_place(), last_rows(spans).tolist())
                spans = following(spans, [-1 - span.slot for span in spans])
            else:
                self._states.send(hidden)
            started.append(self._draft_round(spans))
        found += [step.tokens() for step in started]
        return np.maximum(np.stack(found), 0)  # -1 where logits are no numbers: any guess will do

    def _draft_round(self, spans: Sequence[Span]) -> CudaStep:
        plan = self.select(*demand(spans), self._draft_plans)
        stage, rows = self._staged(plan, spans)
        slots = [span.slot for span in spans for _ in range(span.wanted)]
        write_likeliest(self._inputs.arrays["choice"].reshape(-1, WIDTH), slots)
        self._start(plan, stage, rows, ())
        return CudaStep(self, plan, stage, rows)

    def _hidden_place(self) -> int:
        return self._base + int(self._last.outputs["hidden"]["offset"])

    def _staged(self, plan: Plan, spans: Sequence[Span]) -> tuple[Stage, int]:
        """The inputs of a step in the stage whose turn it is, and the number of wanted rows."""
        stage = self._stages[0]
        self._stages.reverse()
        self._device.activate()
        self.wait(plan, stage)
        self._inputs, self._last = stage.arrays[plan.key], plan
        return stage, self._inputs.fill(spans)

    def _start(self, plan: Plan, stage: Stage, rows: int, picks: Sequence[Pick | None]) -> None:
        """Put a step and the way back of its results into the stream."""
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
        self._device.replay(self._graphs[plan.key])

    def run_launches(self, plan: Plan) -> None:
        """One plan kernel by kernel, in the stream."""
        for prepared in self._launches[plan.key]:
            self._device.launch(prepared)

    def plan(self, name: str) -> Plan:
        """A plan of the main model by name."""
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
        for prepared, event in zip(self._launches[plan.key], events[1:], strict=True):
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
        places = self._stages[0].offsets[plan.key]
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
