"""The plans of a build on a GPU: everything allocated and captured when loaded; a step is two copies and one graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qcn_compile.artifact import Arg, Launch, Manifest, Plan
from qcn_compile.errors import ArtifactError, DeviceError
from qcn_compile.runtime.batch import Span, demand
from qcn_compile.runtime.choice import Pick
from qcn_compile.runtime.cuda.choosing import choose, kept_in, kernels, middling, remembered, roles, timed, with_picks
from qcn_compile.runtime.cuda.device import ALIGNMENT, CudaDevice
from qcn_compile.runtime.cuda.exchange import Exchange
from qcn_compile.runtime.cuda.footprint import cache_groups, footprint, pitch
from qcn_compile.runtime.cuda.hidden import HiddenStates
from qcn_compile.runtime.cuda.rows import CudaRows, Group
from qcn_compile.runtime.cuda.sampling import WIDTH, SlotArrays, write_choice, write_likeliest
from qcn_compile.runtime.cuda.stage import Stage
from qcn_compile.runtime.cuda.step import CudaStep
from qcn_compile.runtime.cuda.weights import DeviceWeights
from qcn_compile.runtime.executable import Plans
from qcn_compile.runtime.memory import MemoryPlan
from qcn_compile.runtime.prefix.rows import Rows
from qcn_compile.runtime.speculation.chain import following, last_rows

KERNELS = "kernels"


def _run(launches: Sequence[Callable[[], None]]) -> None:
    for launch in launches:
        launch()


class CudaExecutable(Plans):
    """Runs the plans on a GPU over caches of its own. Every plan is captured into a graph when loaded."""

    def __init__(self, build: Path, manifest: Manifest, device: CudaDevice, weights: DeviceWeights,
                 memory: MemoryPlan, exchange: Exchange | None = None) -> None:
        super().__init__(build, manifest, memory)
        self._device, self._weights, self._exchange = device, weights, exchange
        self.host_weight_bytes = weights.host_bytes
        self.footprint = footprint(build, manifest, self._every, memory, weights.on_host)
        self._base = device.allocate(self.workspace_bytes)
        self._events: list[Any] = []  # of a profile
        self._allocate_caches(manifest)
        self._stages = [Stage(device, self._every, -(-memory.context_length // memory.page_size)) for _ in range(2)]
        self._input_base = device.allocate(self._stages[0].nbytes)
        rows = max(plan.rows for plan in self._every)
        self._slot_arrays = SlotArrays(device, memory.slots, self._vocab, rows)
        self._places = dict(self._slot_arrays.places)
        if exchange is not None:
            self._places["peers"] = exchange.table
        self._chosen = self._places["chosen"]
        self._states = HiddenStates(device, self._every, manifest.hidden_size) if self._draft_plans else None
        if self._states is not None:
            self._places["hidden"] = self._states.place
        self.least_token, self._last = -memory.slots, self._plans[0]
        self._bind(build, manifest)
        width = max(plan.outputs["logits"]["width"] for plan in self._plans)
        self._raw = device.pinned(4 * rows * width)
        self._logits = np.zeros((rows, width), np.float32)
        device.synchronize()

    def _bind(self, build: Path, manifest: Manifest) -> None:
        """Load kernels, let a card choose that has a choice, and capture all plans."""
        sizes, path = roles(self._plans[0]), kept_in(manifest, self._device.name)
        picks = remembered(path, sizes) if self._exchange is None else {}
        if picks is not None:
            self.change(partial(with_picks, picks=picks))
        self._device.load(build / KERNELS, kernels(self._every))
        if picks is None:
            picks = choose(self._plans[0], path, self._device.name, self._trial)
            self.change(partial(with_picks, picks=picks))
        self._launches = {plan.key: [self._prepared(plan, i) for i in range(len(plan.launches))]
                          for plan in self._every}
        self._graphs = {key: self._device.capture(partial(_run, each)) for key, each in self._launches.items()}

    def _trial(self, plan: Plan) -> float:
        """Seconds of a step of one token after up to 1024."""
        stage, _ = self._staged(plan, [middling(self._memory)])
        write_likeliest(self._inputs.arrays["choice"].reshape(-1, WIDTH), [0])
        self._device.upload_soon(self._input_base, stage.block[:stage.used(plan)])
        return timed(self._device, partial(_run, [self._prepared(plan, i) for i in range(len(plan.launches))]))

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
                self._both("carry_hidden", last_rows(spans).tolist())
                spans = following(spans, [-1 - span.slot for span in spans])
            else:
                self._both("write_hidden", hidden)
            started.append(self._draft_round(spans))
        found += [step.tokens() for step in started]
        return np.maximum(np.stack(found), 0)  # -1 where logits are no numbers: any guess will do

    def _both(self, method: str, argument: Any) -> None:
        """What is done to the hidden states, on all ranks."""
        if self.team is not None:
            self.team.tell(method, argument)
        getattr(self, method)(argument)

    def carry_hidden(self, rows: list[int]) -> None:
        """Hidden states of the last step become those that the draft head reads."""
        assert self._states is not None
        self._states.carry(self._hidden_place(), rows)

    def write_hidden(self, hidden: np.ndarray) -> None:
        """Hidden states that the draft head reads."""
        assert self._states is not None
        self._states.send(hidden)

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
        if self.team is not None:
            self._slot_arrays.tell = self.team.tell
        try:
            self._slot_arrays.send(picks)
            if self.team is not None:
                self.team.step(plan.key, stage.block[:stage.used(plan)])
            self._device.upload_soon(self._input_base, stage.block[:stage.used(plan)])
            if self.profile is None:
                self.replay(plan)
            else:
                began = time.perf_counter()
                self.profile.add(plan, self._timed(plan), began)
            self._return(plan, stage, rows, picks)
        except DeviceError as error:
            raise self._stopped(plan, error) from None

    def follow(self, name: str, step: np.ndarray) -> None:
        """Start a step of rank 0: the plan of that key on the bytes that rank 0 copied to its device."""
        plan, stage = next(plan for plan in self._every if plan.key == name), self._stages[0]
        self._stages.reverse()
        self.wait(plan, stage)
        self._last = plan
        stage.block[:step.nbytes] = step.view(np.uint8)
        try:
            self._device.upload_soon(self._input_base, stage.block[:step.nbytes])
            self.replay(plan)
            self._device.record(stage.done)
        except DeviceError as error:
            raise self._stopped(plan, error) from None

    def write_slot(self, name: str, slot: int, line: np.ndarray) -> None:
        """What rank 0 wrote to the arrays of a slot."""
        self._slot_arrays.write(name, slot, line)

    def settle(self) -> None:
        self._device.synchronize()

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
        _run(self._launches[plan.key])

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
        while len(self._events) <= len(plan.launches):
            self._events.append(self._device.event())
        events = self._events[:len(plan.launches) + 1]
        self._device.record(events[0])
        for launch, event in zip(self._launches[plan.key], events[1:], strict=True):
            launch()
            self._device.record(event)
        self._device.synchronize()
        return np.array([self._device.seconds(a, b) for a, b in pairwise(events)])

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
        self.rows: Rows = CudaRows(self._device, groups[True], groups[False])

    def _pointer(self, arg: Arg, plan: Plan) -> int:
        places = self._stages[0].offsets[plan.key]
        if arg.kind == "input" and arg.name in places:
            return self._input_base + places[arg.name]
        return super()._pointer(arg, plan)

    def _prepared(self, plan: Plan, index: int) -> Callable[[], None]:
        """What puts a launch into the stream."""
        launch = plan.launches[index]
        pointers = [self._pointer(arg, plan) for arg in launch.args]
        if launch.collective is not None:
            if self._exchange is None:
                raise ArtifactError(f"{launch.op}: a plan of several ranks was loaded for one; build again")
            return self._exchange.prepare(launch, pointers, plan)
        loose = self._device.loose(launch.kernel)
        for place, (arg, pointer) in enumerate(zip(launch.args, pointers, strict=True)):
            if pointer % ALIGNMENT and place not in loose:
                raise ArtifactError(f"plan {plan.name}, {launch.op}: argument {arg.kind} {arg.name} is not on a "
                                    f"{ALIGNMENT}-byte boundary; build again with qcn-compile")
        overlap = index == 0 or self._overlaps(plan.launches[index - 1])
        return partial(self._device.launch, self._device.prepare(launch.kernel, launch.grid, pointers, overlap))

    def _overlaps(self, before: Launch) -> bool:
        """Whether a kernel may start while this launch ends: not when a library runs it."""
        return before.collective is None or (self._exchange is not None and self._exchange.has_kernel(before))
