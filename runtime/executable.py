"""The plans of a build, bound to memory: one step is the input arrays and one call into the host library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from qcn_compile.artifact import Arg, Launch, Manifest, Plan, Route, read_plan
from qcn_compile.errors import ArtifactError, CapacityError, DeviceError
from qcn_compile.runtime.batch import Capacity, InputArrays, Span
from qcn_compile.runtime.communicator import SharedMemory
from qcn_compile.runtime.device import ANY, LAUNCH, POINTER, CpuDevice, address, allocate
from qcn_compile.runtime.memory import MemoryPlan, page_part_bytes
from qcn_compile.runtime.prefix.rows import CacheRows, Rows
from qcn_compile.runtime.profile import Profile
from qcn_compile.runtime.routing import Routing
from qcn_compile.runtime.weights import Weights


class Team(Protocol):
    """The other ranks of a build, as rank 0 sees them. `on_failure` is called from a thread when one dies."""

    on_failure: Callable[[DeviceError], None]

    def step(self, plan: str, inputs: np.ndarray) -> None:
        """Let them run the step that rank 0 is about to run."""
        ...

    def close(self) -> None: ...


class Addressed(Protocol):
    """Weights, wherever they are."""

    nbytes: int

    def address(self, name: str) -> int: ...


class Plans:
    """The `main` plans of one build, smallest first, the input arrays of a step, and where arguments lie.

    A device's executable fills in the addresses: `_base` of the workspace, `_caches` and `_places` of the inputs.
    """

    _weights: Addressed
    _base: int

    def __init__(self, build: Path, manifest: Manifest, memory: MemoryPlan) -> None:
        plans = [plan for name in manifest.plans if (plan := read_plan(build, name)).entry == "main"]
        if not plans:
            raise ArtifactError(f"{build} has no plan of the entry main; build again with qcn-compile")
        self._memory, self._vocab = memory, manifest.vocab_size
        self._plans = sorted(plans, key=lambda plan: (plan.tokens, plan.sequences, plan.rows))
        self._inputs = InputArrays(self.capacities, -(-memory.context_length // memory.page_size))
        self._caches: dict[tuple[str, str], int] = {}
        self._places: dict[str, int] = {}
        self.workspace_bytes = max(plan.workspace_bytes for plan in plans)
        self.profile: Profile | None = None
        self.routing: Routing | None = None
        self.team: Team | None = None  # the other ranks, which run every step of rank 0, too

    @property
    def capacities(self) -> tuple[Capacity, ...]:
        """What each plan holds, smallest first."""
        return tuple(Capacity(plan.tokens, plan.sequences, plan.rows) for plan in self._plans)

    @property
    def weight_bytes(self) -> int:
        return self._weights.nbytes

    @property
    def routes(self) -> tuple[Route, ...]:
        """The routers of the smallest plan; the others have the same layers."""
        return self._plans[0].routes

    def select(self, tokens: int, sequences: int, rows: int) -> Plan:
        """The smallest plan that holds a step. Raises CapacityError when none does."""
        for plan, capacity in zip(self._plans, self.capacities, strict=True):
            if capacity.holds(tokens, sequences, rows):
                return plan
        raise CapacityError(f"a step of {tokens} tokens, {sequences} sequences and {rows} rows of logits fits no plan "
                            f"of the build ({', '.join(p.name for p in self._plans)})"
                            "; split it, or build larger buckets")

    def check_integrity(self) -> None:
        """The last step's inputs name only tokens, pages and slots that exist."""
        arrays = self._inputs.arrays
        tokens, sequences, rows, width = (int(n) for n in arrays["counts"])
        limits = {"tokens": (tokens, self._vocab), "slots": (sequences, self._memory.slots), "rows": (rows, tokens),
                  "block_table": (sequences * width, self._memory.pages)}
        for name, (count, limit) in limits.items():
            used = arrays[name][:count]
            if count and (used.min() < 0 or used.max() >= limit):
                raise AssertionError(f"input {name} names {used.min()}..{used.max()}, outside 0..{limit - 1}")

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


class Executable(Plans):
    """Runs the plans on the CPU over caches of its own. Plans are bound to addresses on first use."""

    def __init__(self, build: Path, manifest: Manifest, device: CpuDevice, weights: Weights,
                 memory: MemoryPlan, communicator: SharedMemory | None = None) -> None:
        super().__init__(build, manifest, memory)
        self._device, self._weights, self._communicator = device, weights, communicator
        self._tables: dict[str, tuple[np.ndarray, list[np.ndarray]]] = {}
        self._workspace = allocate(self.workspace_bytes)
        self._base = address(self._workspace)
        self._places = {name: address(array) for name, array in self._inputs.arrays.items()}
        self._memory_of_caches = self._allocate_caches(manifest)
        self._caches = {key: address(array) for key, array in self._memory_of_caches.items()}
        states = [array for (_, part), array in self._memory_of_caches.items() if not part]
        pages = [array for (_, part), array in self._memory_of_caches.items() if part]
        self.rows: Rows = CacheRows([array.reshape(memory.pages, -1) for array in pages],
                              [array.reshape(memory.all_slots, -1) for array in states])

    def run(self, spans: Sequence[Span]) -> np.ndarray:
        """Run one step. Returns the wanted rows' logits, f32 [R, vocab], valid until the next step.

        Raises CapacityError when no plan holds it, DeviceError naming the kernel and op that failed.
        """
        plan = self.select(sum(len(s.tokens) for s in spans), len(spans), sum(s.wanted for s in spans))
        rows = self._inputs.fill(spans)
        if self.team is not None:
            self.team.step(plan.name, self._inputs.packed())
        self._launch(plan)
        output = plan.outputs["logits"]
        start, width = output["offset"], output["width"]
        logits = self._workspace[start:start + 4 * rows * width].view(np.float32).reshape(rows, width)
        return logits[:, :self._vocab]

    def follow(self, name: str, step: np.ndarray) -> None:
        """Run a step of rank 0: the plan of that name on its packed inputs."""
        self._inputs.unpack(step)
        self._launch(next(plan for plan in self._plans if plan.name == name))

    def _launch(self, plan: Plan) -> None:
        """All launches of a plan on the inputs as they are."""
        table = self._bound(plan)
        seconds = None if self.profile is None else np.zeros(len(table))
        failed = self._device.run(table, seconds) if self.routing is None else self._watched(plan, table, seconds)
        if failed >= 0:
            launch = plan.launches[failed]
            if launch.collective is not None:
                raise DeviceError(self._device.error())
            raise DeviceError(f"kernel {launch.kernel} of op {launch.op} ({launch.location}) failed in plan {plan.name}"
                              f": {self._device.error()}; check the build with qcn-run --verify, or build it again")
        if self.profile is not None and seconds is not None:
            self.profile.add(plan, seconds)

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
        if plan.name not in self._tables:
            table = np.zeros(len(plan.launches), LAUNCH)
            keep = []
            for row, launch in zip(table, plan.launches, strict=True):
                row["function"], first = self._function(launch)
                args = np.zeros(len(first) + len(launch.args), ANY)
                args["type_index"] = POINTER
                args["pointer"] = [*first, *(self._pointer(arg, plan) for arg in launch.args)]
                row["args"], row["n_args"] = address(args), len(args)
                keep.append(args)
            self._tables[plan.name] = table, keep
        return self._tables[plan.name][0]

    def _function(self, launch: Launch) -> tuple[int, list[int]]:
        """Address of what a launch calls, and pointers that come before its arguments."""
        if launch.collective is None:
            return self._device.symbol(launch.kernel), []
        if self._communicator is None:
            raise ArtifactError(f"{launch.op}: a plan of several ranks was loaded for one; build again")
        return self._device.host.ranks_launch, [self._communicator.descriptor(launch.collective)]
