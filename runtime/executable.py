"""The plans of a build, bound to memory: one step is the input arrays and one call into the host library."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qcn_compile.artifact import Arg, Launch, Manifest, Plan, Route, read_plan
from qcn_compile.errors import ArtifactError, CapacityError, DeviceError, RankError
from qcn_compile.runtime.batch import Capacity, InputArrays, Span, demand
from qcn_compile.runtime.communicator import SharedMemory
from qcn_compile.runtime.device import ANY, LAUNCH, POINTER, CpuDevice, address, allocate
from qcn_compile.runtime.memory import MemoryPlan, page_part_bytes
from qcn_compile.runtime.prefix.rows import CacheRows, Rows
from qcn_compile.runtime.profile import Profile
from qcn_compile.runtime.routing import Routing
from qcn_compile.runtime.speculation.chain import in_turn
from qcn_compile.runtime.weights import Weights

MAIN, DRAFT = "main", "mtp"  # entries of plans


class Team(Protocol):
    """The other ranks of a build, as rank 0 sees them. `on_failure` is called from a thread when one dies."""

    on_failure: Callable[[DeviceError], None]

    def step(self, plan: str, inputs: np.ndarray) -> None:
        """Let them run the step that rank 0 is about to run."""
        ...

    def tell(self, method: str, *arguments: Any) -> None:
        """Let them do what rank 0 does to its weights or caches."""
        ...

    def close(self) -> None: ...


class Addressed(Protocol):
    """Weights, wherever they are."""

    nbytes: int

    def address(self, name: str) -> int: ...

    def replace(self, name: str, data: np.ndarray) -> None: ...


class Plans:
    """The plans of one build, smallest first, the input arrays of a step, and where arguments lie.

    Those of the entry `main`, and of `mtp` when the build has the draft head.

    A device's executable fills in the addresses: `_base` of the workspace, `_caches` and `_places` of the inputs.
    """

    _weights: Addressed
    _base: int

    def __init__(self, build: Path, manifest: Manifest, memory: MemoryPlan) -> None:
        plans = sorted((read_plan(build, name) for name in manifest.plans),
                       key=lambda plan: (plan.tokens, plan.sequences, plan.rows))
        self._plans = [plan for plan in plans if plan.entry == MAIN]
        self._draft_plans = [plan for plan in plans if plan.entry == DRAFT]
        self._every = [*self._plans, *self._draft_plans]
        if not self._plans:
            raise ArtifactError(f"{build} has no plan of the entry main; build again with qcn-compile")
        self._memory, self._vocab = memory, manifest.vocab_size
        self._inputs = InputArrays(self.capacities, -(-memory.context_length // memory.page_size))
        self._caches: dict[tuple[str, str], int] = {}
        self._places: dict[str, int] = {}
        self.workspace_bytes = max(plan.workspace_bytes for plan in plans)
        self.profile: Profile | None = None
        self.routing: Routing | None = None
        self.least_token = 0  # a device that chooses tokens has names below for those it has not told yet
        self.team: Team | None = None  # the other ranks, which run every step of rank 0, too

    def change(self, changed: Callable[[Plan], Plan]) -> None:
        """Other plans in place of these."""
        self._plans = [changed(plan) for plan in self._plans]
        self._draft_plans = [changed(plan) for plan in self._draft_plans]
        self._every = [*self._plans, *self._draft_plans]

    @property
    def capacities(self) -> tuple[Capacity, ...]:
        """What each plan holds, smallest first."""
        return _capacities(self._plans)

    @property
    def draft_capacities(self) -> tuple[Capacity, ...]:
        """The same of the draft head; empty without one."""
        return _capacities(self._draft_plans)

    @property
    def weight_bytes(self) -> int:
        return self._weights.nbytes

    @property
    def routes(self) -> tuple[Route, ...]:
        """The routers of the smallest plan; the others have the same layers."""
        return self._plans[0].routes

    def select(self, tokens: int, sequences: int, rows: int, plans: Sequence[Plan] | None = None) -> Plan:
        """The smallest plan (of the main model) that holds a step. Raises CapacityError when none does."""
        plans = self._plans if plans is None else plans
        for plan in plans:
            if Capacity(plan.tokens, plan.sequences, plan.rows).holds(tokens, sequences, rows):
                return plan
        raise CapacityError(f"a step of {tokens} tokens, {sequences} sequences and {rows} rows of logits fits no plan "
                            f"of the build ({', '.join(p.name for p in plans)})"
                            "; split it, or build larger buckets")

    def replace_weight(self, name: str, data: np.ndarray) -> None:
        """Other contents for a blob, before the first step, on every rank."""
        if self.team is not None:
            self.team.tell("replace_weight", name, data)
        self._weights.replace(name, data)

    def settle(self) -> None:
        """Returns when all steps have ended."""

    def check_integrity(self) -> None:
        """The last step's inputs name only tokens, pages and slots that exist."""
        arrays = self._inputs.arrays
        tokens, sequences, rows, width = (int(n) for n in arrays["counts"])
        limits = {"tokens": (tokens, self._vocab), "slots": (sequences, self._memory.state_slots),
                  "into": (sequences, self._memory.state_slots), "rows": (rows, tokens)}
        ends = arrays["context_lens"][:sequences] + np.diff(arrays["cu_seqlens"][:sequences + 1])
        filled = np.arange(width) < -(-ends[:, None] // self._memory.page_size)
        checks = [(name, arrays[name][:count], limit) for name, (count, limit) in limits.items()]
        table = arrays["block_table"][:sequences * width].reshape(sequences, width)[filled]
        for name, used, limit in [*checks, ("block_table", table, self._memory.pages)]:
            least = self.least_token if name == "tokens" else 0
            if len(used) and (used.min() < least or used.max() >= limit):
                raise AssertionError(f"input {name} names {used.min()}..{used.max()}, outside {least}..{limit - 1}")

    def _pointer(self, arg: Arg, plan: Plan) -> int:
        if arg.kind in ("workspace", "output"):
            return self._base + arg.offset
        if arg.kind == "weight":
            return self._weights.address(arg.name)
        if arg.kind == "state" and (arg.name, arg.part) in self._caches:
            return self._caches[arg.name, arg.part]
        if arg.kind == "input" and arg.name in self._places:
            return self._places[arg.name]
        raise ArtifactError(f"plan {plan.name} has an argument this runtime does not know: {arg.kind} {arg.name} "
                            f"{arg.part}".rstrip() + "; build again with the qcn-compile of this version")


def _capacities(plans: Sequence[Plan]) -> tuple[Capacity, ...]:
    return tuple(Capacity(plan.tokens, plan.sequences, plan.rows) for plan in plans)


class Executable(Plans):
    """Runs the plans on the CPU over caches of its own. Plans are bound to addresses on first use."""

    def __init__(self, build: Path, manifest: Manifest, device: CpuDevice, weights: Weights,
                 memory: MemoryPlan, communicator: SharedMemory | None = None) -> None:
        super().__init__(build, manifest, memory)
        self._device, self._weights, self._communicator = device, weights, communicator
        self._tables: dict[tuple[str, str], tuple[np.ndarray, list[np.ndarray]]] = {}
        self._workspace = allocate(self.workspace_bytes)
        self._base = address(self._workspace)
        most = max((plan.tokens for plan in self._draft_plans), default=0)
        self._hidden_in = allocate(4 * most * manifest.hidden_size).view(np.float32).reshape(most, manifest.hidden_size)
        arrays = {**self._inputs.arrays, "hidden": self._hidden_in}
        self._places = {name: address(array) for name, array in arrays.items()}
        self._memory_of_caches = self._allocate_caches(manifest)
        self._caches = {key: address(array) for key, array in self._memory_of_caches.items()}
        states = [array for (_, part), array in self._memory_of_caches.items() if not part]
        pages = [array for (_, part), array in self._memory_of_caches.items() if part]
        self.rows: Rows = CacheRows([array.reshape(memory.pages, -1) for array in pages],
                                    [array.reshape(memory.all_slots, -1) for array in states])
        self._last = self._plans[0]

    def run(self, spans: Sequence[Span]) -> np.ndarray:
        """Run one step. Returns the wanted rows' logits, f32 [R, vocab], valid until the next step.

        Raises CapacityError when no plan holds it, DeviceError naming the kernel and op that failed.
        """
        return self._step(spans, self._plans)[:, :self._vocab]

    def hidden(self) -> np.ndarray:
        """Hidden states of the last step, f32 [T, hidden], valid until the next."""
        return self._output("hidden", int(self._inputs.arrays["counts"][0]))

    def draft(self, spans: Sequence[Span], hidden: np.ndarray, rounds: int = 1) -> np.ndarray:
        """Rounds of the draft head from tokens and the hidden states f32 [T, hidden] of those before them.

        Returns the wanted rows' likeliest tokens, i32 [rounds, R]. Raises as `run`.
        """
        def once(spans: Sequence[Span], hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            logits, after = self.draft_logits(spans, hidden)
            return logits.argmax(-1), after

        return in_turn(once, spans, hidden, rounds)

    def draft_logits(self, spans: Sequence[Span], hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One round: logits, f32 [R, vocab], and all hidden states, f32 [T, hidden], valid until the next step."""
        self._hidden_in[:len(hidden)] = hidden
        return self._step(spans, self._draft_plans)[:, :self._vocab], self.hidden()

    def _step(self, spans: Sequence[Span], plans: Sequence[Plan]) -> np.ndarray:
        plan = self._last = self.select(*demand(spans), plans)
        rows = self._inputs.fill(spans)
        if self.team is not None:
            parts = [self._inputs.packed()]
            if plan.entry == DRAFT:
                parts.append(self._hidden_in[:plan.tokens].view(np.int32).reshape(-1))
            self.team.step(plan.key, np.concatenate(parts))
        self._launch(plan)
        return self._output("logits", rows)

    def region_seconds(self) -> float:
        """What an empty parallel region costs on this device's threads."""
        return self._device.region_seconds()

    def follow(self, name: str, step: np.ndarray) -> None:
        """Run a step of rank 0: plan of that key on its packed inputs, then a draft's hidden states."""
        plan = next(plan for plan in self._every if plan.key == name)
        end = self._inputs.unpack(step)
        if plan.entry == DRAFT:
            hidden = step[end:].view(np.float32).reshape(plan.tokens, -1)
            self._hidden_in[:plan.tokens] = hidden
        self._launch(plan)

    def _output(self, name: str, rows: int) -> np.ndarray:
        """Rows of a result of the last step, f32."""
        output = self._last.outputs[name]
        start, width = output["offset"], output["width"]
        return self._workspace[start:start + 4 * rows * width].view(np.float32).reshape(rows, width)

    def _launch(self, plan: Plan) -> None:
        """All launches of a plan on the inputs as they are."""
        table = self._bound(plan)
        seconds, began = None if self.profile is None else np.zeros(len(table)), time.perf_counter()
        watched = self.routing is not None and plan.entry == MAIN
        failed = self._watched(plan, table, seconds) if watched else self._device.run(table, seconds)
        if failed >= 0:
            launch = plan.launches[failed]
            if launch.collective is not None:
                raise RankError(self._device.error())
            raise DeviceError(f"kernel {launch.kernel} of op {launch.op} ({launch.location}) failed in plan {plan.name}"
                              f": {self._device.error()}; check the build with qcn-run --verify, or build it again")
        if self.profile is not None and seconds is not None:
            self.profile.add(plan, seconds, began)

    def _watched(self, plan: Plan, table: np.ndarray, seconds: np.ndarray | None) -> int:
        """The launches with a halt after every router, whose choices are counted; what `CpuDevice.run` returns."""
        assert self.routing is not None
        tokens, start = int(self._inputs.arrays["counts"][0]), 0
        for route in plan.routes:
            stop = route.launch + 1
            failed = self._device.run(table[start:stop], None if seconds is None else seconds[start:stop])
            if failed >= 0:
                return start + failed
            ids = self._workspace[route.offset:route.offset + 4 * tokens * route.slots].view(np.int32)
            self.routing.add(route, ids.reshape(tokens, route.slots))
            start = stop
        self.routing.tokens += tokens
        failed = self._device.run(table[start:], None if seconds is None else seconds[start:])
        return start + failed if failed >= 0 else -1

    def _allocate_caches(self, manifest: Manifest) -> dict[tuple[str, str], np.ndarray]:
        caches = {}
        for cache in manifest.caches:
            if cache.kind == "kv":
                for part in ("k", "v"):
                    caches[cache.name, part] = allocate(self._memory.pages * page_part_bytes(cache))
            else:
                caches[cache.name, ""] = allocate(self._memory.all_slots * cache.unit_bytes)
        return caches

    def _bound(self, plan: Plan) -> np.ndarray:
        """The plan's LAUNCH table with every pointer resolved."""
        key = plan.entry, plan.name
        if key not in self._tables:
            table = np.zeros(len(plan.launches), LAUNCH)
            keep = []
            for row, launch in zip(table, plan.launches, strict=True):
                row["function"], first = self._function(launch)
                args = np.zeros(len(first) + len(launch.args), ANY)
                args["type_index"] = POINTER
                args["pointer"] = [*first, *(self._pointer(arg, plan) for arg in launch.args)]
                row["args"], row["n_args"] = address(args), len(args)
                keep.append(args)
            self._tables[key] = table, keep
        return self._tables[key][0]

    def _function(self, launch: Launch) -> tuple[int, list[int]]:
        """Address of what a launch calls, and pointers that come before its arguments."""
        if launch.collective is None:
            return self._device.symbol(launch.kernel), []
        if self._communicator is None:
            raise ArtifactError(f"{launch.op}: a plan of several ranks was loaded for one; build again")
        return self._device.host.ranks_launch, [self._communicator.descriptor(launch.collective)]
