"""Kernels compiled on the card's machine, to explore: times launches of a lowering and their variants.

For people who write kernels; the product is compiled ahead of time. Needs a card, torch and Triton.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "targets" / "triton")]

from harness_gpu import Case  # noqa: E402

from qcn_compile.ir.graph import Op, Value  # noqa: E402
from qcn_compile.ir.types import DType, StateRef  # noqa: E402
from qcn_compile.targets.base import Call, Kernel, Ref  # noqa: E402
from qcn_compile.targets.triton.emit import PACKAGE  # noqa: E402
from qcn_compile.targets.triton.families import FAMILIES, constants, options  # noqa: E402
from qcn_compile.targets.triton.target import GpuTarget  # noqa: E402

TORCH = {"bf16": torch.bfloat16, "f32": torch.float32, "i32": torch.int32, "fp8": torch.float8_e4m3fn}
DEVICE = "cuda"


@dataclass
class Memory:
    """The buffers of one case: inputs and weights by value name, batch arrays and caches by name."""

    case: Case
    lengths: Sequence[int]
    contexts: Sequence[int] = ()
    data: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        tokens, count = sum(self.lengths), len(self.lengths)
        self.contexts = list(self.contexts) or [0] * count
        self.sizes = {"T": tokens, "S": count, "R": 1}
        for value, kind in self.case.values.items():
            if kind[0] == "weight":
                self._weight(value, kind)
            else:
                self._input(value, kind)
        page = 32
        used = [-(-(c + n) // page) for c, n in zip(self.contexts, self.lengths, strict=True)]
        self.pages, wide = sum(used) + 1, max(used)
        order, table, at = torch.randperm(self.pages).tolist(), torch.zeros((count, wide), dtype=torch.int32), 0
        for s, n in enumerate(used):
            table[s, :n] = torch.tensor(order[at:at + n], dtype=torch.int32)
            at += n
        cu = [0]
        for n in self.lengths:
            cu.append(cu[-1] + n)
        arrays = {"cu_seqlens": cu, "context_lens": self.contexts, "block_table": table.flatten().tolist(),
                  "slots": list(range(count)), "into": list(range(count)), "counts": [tokens, count, 1, wide],
                  "token_seq": [s for s, n in enumerate(self.lengths) for _ in range(n)]}
        for name, rows in arrays.items():
            self.data[f"input {name}"] = torch.tensor(rows, dtype=torch.int32, device=DEVICE)

    def _shape(self, value: Value) -> list[int]:
        return [d if isinstance(d, int) else d.at(self.sizes) for d in value.tensor.shape]

    def _input(self, value: Value, kind: tuple[Any, ...]) -> None:
        shape = self._shape(value)
        if kind[2] is not None:
            high = self.sizes[kind[2][1]] if isinstance(kind[2][1], str) else kind[2][1]
            self.data[value.name] = torch.randint(kind[2][0], high, shape, dtype=torch.int32, device=DEVICE)
        else:
            dtype = torch.bfloat16 if value.tensor.dtype is DType.bf16 else torch.float32
            self.data[value.name] = (torch.randn(shape, device=DEVICE) * kind[3]).to(dtype)

    def _weight(self, value: Value, kind: tuple[Any, ...]) -> None:
        shape = self._shape(value)
        if kind[1].format == "fp8":
            codes = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
            blocks = [*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)]
            self.data[value.name] = codes
            self.data[f"{value.name} s"] = (0.5 + torch.rand(blocks, device=DEVICE)) * kind[2]
        else:
            dtype = torch.bfloat16 if kind[1].format == "bf16" else torch.float32
            self.data[value.name] = (torch.randn(shape, device=DEVICE) * kind[2]).to(dtype)

    def wide(self, name: str) -> torch.Tensor:
        """A value in fp32, an fp8 weight times its scales."""
        data = self.data[name].float()
        if f"{name} s" in self.data:
            s = self.data[f"{name} s"].repeat_interleave(128, -2).repeat_interleave(128, -1)
            data = data * s[..., :data.shape[-2], :data.shape[-1]]
        return data

    def buffer(self, op: Op, ref: Ref, dtype: str, target: GpuTarget) -> torch.Tensor:
        """The buffer of an argument, made when first named; results and scratch start as NaN."""
        if ref.kind in ("operand", "blob"):
            value = op.operands[ref.index]
            assert value is not None
            if ref.layout == "channels" and f"{value.name} t" not in self.data:
                self.data[f"{value.name} t"] = self.data[value.name].t().contiguous()
            mark = " t" if ref.layout == "channels" else " s" if ref.part == "s" else ""
            return self.data[value.name + mark]
        if ref.kind == "input":
            return self.data[f"input {ref.name}"]
        name = f"{ref.kind} {op.results[0].name} {ref.name}{ref.index}{ref.part}"
        if ref.kind == "state":
            attr = op.attrs[ref.name]
            assert isinstance(attr, StateRef)
            name = f"state {attr.name} {ref.part}"
        elif ref.kind == "result":
            name = op.results[ref.index].name
        if name not in self.data:
            self.data[name] = self._fresh(op, ref, dtype, target)
        return self.data[name]

    def _fresh(self, op: Op, ref: Ref, dtype: str, target: GpuTarget) -> torch.Tensor:
        if ref.kind == "state":
            attr = op.attrs[ref.name]
            assert isinstance(attr, StateRef)
            state = self.case.states[attr.name]
            count = self.pages if ref.part else len(self.lengths)
            unit, _ = target.cache_unit(state, target.page_size)
            return (torch.randn((count, *unit), device=DEVICE) * 0.5).to(TORCH[dtype])
        if ref.kind == "result":
            return torch.full(self._shape(op.results[ref.index]), -1, device=DEVICE).to(TORCH[dtype])
        raw = torch.full((ref.bytes,), 0xFF, dtype=torch.uint8, device=DEVICE)
        return raw.view(TORCH[dtype])


def launch(memory: Memory, op: Op, call: Call, target: GpuTarget, kernel: Kernel | None = None,
           grid: Sequence[int] | None = None, warm: bool = False) -> Callable[[], None]:
    """A launch, bound."""
    kernel = kernel or call.kernel
    family = FAMILIES[kernel.family]
    function = getattr(import_module(f"{PACKAGE}.{family.module}"), kernel.family)
    present, absent = family.pointers(kernel)
    given = {p.name: memory.buffer(op, ref, p.dtype, target) for p, ref in zip(present, call.args, strict=True)}
    chosen = options(kernel)
    whole = (*(grid or call.grid), 1, 1)[:3]

    def run() -> None:
        if warm:
            function.warmup(**given, **dict.fromkeys(absent), **constants(kernel), PDL=False, **chosen, grid=whole)
            return
        function[whole](**given, **dict.fromkeys(absent), **constants(kernel), PDL=False, **chosen)

    return run


def microseconds(run: Callable[[], None], times: int = 8, before: Callable[[], None] | None = None) -> float:
    """Mean time of a launch in a graph, the second cache emptied before each. `before` makes it repeatable: a kernel
    that counts up (moe_rank) would else write beyond what one run needs."""
    before = before or _nothing
    before()
    run()
    if not _SLAB:
        _SLAB.append(torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE))
    torch.cuda.synchronize()
    both = _graph(lambda: (_flush(), before(), run()), times)
    alone = _graph(lambda: (_flush(), before()), times)
    return max(_replayed(both) - _replayed(alone), 1e-3) / times


def _nothing() -> None: ...


_SLAB: list[torch.Tensor] = []


def _flush() -> None:
    _SLAB[0].zero_()


def _graph(work: Callable[[], Any], times: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            work()
    return graph


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds, the lesser of two."""
    found = []
    for _ in range(3):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        found.append(1e3 * first.elapsed_time(last))
    return min(found[1:])


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2."""
    got, want = got.float().flatten(), want.float().flatten()
    return float((got - want).norm() / want.norm())


Change = dict[str, Any]
OUTPUT = {"gemm": "y", "gemm_few": "y", "quantize_rows": "q", "moe_up": "h", "moe_down": "y", "moe_up_tiles": "h",
          "moe_down_tiles": "o", "moe_combine": "y", "delta_mix": "mixed", "delta_solve": "w", "delta_scan": "o",
          "delta_norm": "y", "attention_prefill": "y"}


def resized(kernel: Kernel, old: Kernel, grid: Sequence[int]) -> tuple[int, ...]:
    """The grid of a kernel whose tiles changed."""
    p, q = dict(kernel.params), dict(old.params)

    def share(count: int, name: str) -> int:
        return -(-count // int(p[name]))

    match kernel.family:
        case "gemm":
            token_tiles = grid[0] // -(-int(q["N"]) // (int(q["BN"]) * int(q["SIDE"]))) * int(q["BT"])
            group, wide = int(p["GROUP"]), int(p["BN"]) * int(p["SIDE"])
            return (-(-int(p["N"]) // wide) * -(-share(token_tiles, "BT") // group) * group,)
        case "quantize_rows":
            return share(grid[0] * int(q["BR"]), "BR"), share(int(p["K"]), "BK")
        case "moe_up_tiles":
            return (grid[0] // -(-int(q["F"]) // int(q["BF"])) * share(int(p["F"]), "BF"),)
        case "moe_down_tiles":
            return (grid[0] // -(-int(q["H"]) // int(q["BH"])) * share(int(p["H"]), "BH"),)
        case "moe_combine":
            return grid[0], share(int(p["H"]), "BH")
        case "gemm_few":
            return (share(int(p["N"]), "BN"),)
        case "moe_up":
            return share(int(p["F"]), "BF"), *grid[1:]
        case "moe_down":
            return share(int(p["H"]), "BH"), *grid[1:]
        case "delta_mix":
            return share(grid[0] * int(q["BT"]), "BT"), grid[1]
        case "delta_scan":
            return grid[0], share(int(p["DV"]), "BV"), grid[2]
        case "delta_norm":
            return (share(grid[0] * int(q["BR"]), "BR"),)
        case "attention_prefill":
            return share(grid[0] * int(q["BT"]), "BT"), grid[1]
    return tuple(grid)


@dataclass
class Trial:
    """A launch to time, with what it stands for."""

    op: Op
    call: Call
    kernel: Kernel
    grid: tuple[int, ...]
    label: str


def trials(calls: Sequence[tuple[Op, Call]], changes: dict[str, list[Change]]) -> list[Trial]:
    """Every launch and its variants, the lowering's own first."""
    found = []
    for op, call in calls:
        for change in ({}, *changes.get(call.kernel.family, [])):
            kernel = Kernel.make(call.kernel.family, **{**dict(call.kernel.params), **change})
            label = " ".join(f"{k}={v}" for k, v in change.items()) or "own"
            found.append(Trial(op, call, kernel, resized(kernel, call.kernel, call.grid), label))
    return found


def compile_all(memory: Memory, every: Sequence[Trial], target: GpuTarget, workers: int = 14) -> None:
    """Compile side by side."""
    from concurrent.futures import ThreadPoolExecutor

    from triton.runtime._async_compile import AsyncCompileMode

    with ThreadPoolExecutor(workers) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for trial in every:
            try:
                launch(memory, trial.op, trial.call, target, trial.kernel, trial.grid, warm=True)()
            except Exception as problem:
                print("compile", trial.kernel.family, trial.label, str(problem)[-200:], flush=True)


def explore(case: Case, lengths: Sequence[int], contexts: Sequence[int] = (),
            changes: dict[str, list[Change]] | None = None,
            prepare: Callable[[Memory], None] = lambda memory: None, card: str = "h100", top: int = 4) -> Memory:
    """Run every launch of a case in order, timing its variants; prints the lowering's own and the fastest others."""
    target = GpuTarget(card)
    memory = Memory(case, lengths, contexts)
    prepare(memory)
    every = trials(case.lower(target), changes or {})
    compile_all(memory, every, target)
    if os.environ.get("EXPLORE_COMPILE"):  # fill Triton's cache, so that a later run only times
        return memory
    total, rows, wanted = 0.0, list[tuple[float, str]](), None
    fresh = _nothing
    for trial in every:
        name = trial.kernel.family
        try:
            run = launch(memory, trial.op, trial.call, target, trial.kernel, trial.grid)
            took = microseconds(run, before=fresh if name == "moe_rank" else _nothing)
            fresh = run if name == "moe_clear" else fresh
            if name == "moe_rank":  # the last thing measured was the clearing alone
                fresh()
                run()
        except Exception as problem:
            print(f"  FAIL {name} {trial.label}: {str(problem)[-160:]}", flush=True)
            continue
        pointers = [p.name for p in FAMILIES[name].pointers(trial.kernel)[0]]
        away = ""
        if name in OUTPUT:
            ref = trial.call.args[pointers.index(OUTPUT[name])]
            got = memory.buffer(trial.op, ref, "", target).float().nan_to_num()
            if trial.label == "own":
                wanted = got
            elif wanted is not None:
                away = f" differs {error(got, wanted):.1e}"
        if trial.label == "own":
            _say(rows, top)
            rows, total = [], total + took
            print(f"  {name:18s} {took:9.1f} us own {dict(trial.kernel.params).get('N', '')}", flush=True)
        else:
            rows.append((took, f"  {name:18s} {took:9.1f} us {trial.label}{away}"))
    _say(rows, top)
    print(f"{case.name} {sum(lengths)} tokens of {len(lengths)}: {total:.1f} us together", flush=True)
    return memory


def _say(rows: list[tuple[float, str]], top: int) -> None:
    for _, text in sorted(rows)[:top]:
        print(text, flush=True)
