"""Time CPU kernels at the shapes of Qwen3-Coder-Next, beside a kernel that only reads: python tests/targets/bench.py

Weights come from memory, not from a cache: each launch reads another copy until the copies pass `--megabytes`. Best and
median of all launches; bandwidth counts weight bytes (codes and scales) for decode, FLOPs for prefill.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from harness import Host, Program
from tvm.tirx.script.builder import ir as T

from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.types import DType, StateKind, StateType
from qcn_compile.targets.base import Bucket, Call, Kernel
from qcn_compile.targets.cpu import CpuTarget
from qcn_compile.targets.tvm.kernels import FAMILIES
from qcn_compile.targets.tvm.kernels.core import Function, Machine, f32, let, local, loop, parallel, prefetch

FORMATS = {"f32": Encoding("f32"), "bf16": Encoding("bf16"), "int8": Encoding("int8", 32, "int8"),
           "int4": Encoding("int4", 32, "int8"), "int8f": Encoding("int8"), "int4f": Encoding("int4")}
BITS = {"f32": 32.0, "bf16": 16.0, "int8": 8.5, "int4": 4.5}


def read(symbol: str, m: Machine, *, size: int) -> Function:
    """Sum of a float array, the upper bound of what any kernel can read."""
    f = Function(symbol, w="float32", y="float32", counts="int32")
    chunk = 16384
    with f as a, parallel("i", size // chunk) as i:
        acc = local("acc", "float32", 4 * m.lanes)
        acc[0, 4 * m.lanes] = f32(0.0, 4 * m.lanes)
        with loop("k", chunk // (4 * m.lanes)) as k:
            at = let("at", i * chunk + k * 4 * m.lanes)
            for c in range(4):
                if c * m.lanes % 16 == 0:
                    prefetch(a.w, at + c * m.lanes + 512)
                acc[c * m.lanes, m.lanes] = acc[c * m.lanes, m.lanes] + a.w[at + c * m.lanes, m.lanes]
        a.y[i * 4 * m.lanes, 4 * m.lanes] = acc[0, 4 * m.lanes]
    return f


def flops(symbol: str, m: Machine, *, steps: int) -> Function:
    """Fused multiply-adds on registers, the upper bound of what one thread can compute in f32."""
    f = Function(symbol, x="float32", y="float32", counts="int32")
    chains = 12
    with f as a:
        acc = [local(f"acc{c}", "float32", m.lanes) for c in range(chains)]
        x = let("x", a.x[0, m.lanes])
        for c in range(chains):
            acc[c][0, m.lanes] = a.x[c, m.lanes]
        with loop("k", steps):
            for c in range(chains):
                acc[c][0, m.lanes] = T.fma(acc[c][0, m.lanes], x, x)
        for c in range(chains):
            a.y[c * m.lanes, m.lanes] = acc[c][0, m.lanes]
    return f


def memory(size: int) -> np.ndarray:
    """Anonymous memory on huge pages."""
    area = mmap.mmap(-1, size + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(area, np.uint8)
    return whole[-whole.ctypes.data % (2 << 20):][:size]


@dataclass
class Case:
    """One op at one size: its launches, bytes of weights read and FLOPs."""

    name: str
    calls: list[Call]
    tokens: int
    weights: dict[tuple[int, str], int]
    read: float
    flops: float
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    context: int = 0
    ids: tuple[int, int] = (0, 0)  # experts, slots


def linear(target: CpuTarget, n: int, k: int, form: str, tokens: int) -> Case:
    bucket = Bucket("b", tokens, tokens, tokens)
    p = Program("bench", bucket)
    p.op("linear", [p.input("x", f"f32[T,{k}]"), p.weight("w", (n, k), FORMATS[form])])
    parts = blobs(target, form, 1, (n, k))
    return Case(f"linear {n}x{k} {form}", [c for _, c in p.lower(target)], tokens, parts, sum(parts.values()),
                2.0 * n * k * tokens)


def blobs(target: CpuTarget, form: str, index: int, shape: tuple[int, ...]) -> dict[tuple[int, str], int]:
    """(operand, part) -> bytes of a weight."""
    return {(index, part): size for part, (_, size) in target.packed_sizes("tiles", FORMATS[form], shape).items()}


def moe(target: CpuTarget, experts: int, hidden: int, inner: int, slots: int, form: str, tokens: int) -> Case:
    bucket = Bucket("b", tokens, tokens, tokens)
    p = Program("bench", bucket)
    p.op("moe_add", [p.input("x", f"f32[T,{hidden}]"), p.input("ids", f"i32[T,{slots}]", ints=(0, experts)),
                     p.input("weights", f"f32[T,{slots}]"), p.weight("u", (experts, 2 * inner, hidden), FORMATS[form]),
                     p.weight("d", (experts, hidden, inner), FORMATS[form]), p.input("r", f"f32[T,{hidden}]")],
         activation="silu")
    parts = blobs(target, form, 3, (experts, 2 * inner, hidden)) | blobs(target, form, 4, (experts, hidden, inner))
    share = min(1.0, tokens * slots / experts)
    return Case(f"moe {experts}x{inner}x{hidden} top {slots} {form}", [c for _, c in p.lower(target)], tokens,
                parts, share * sum(parts.values()), 6.0 * slots * tokens * inner * hidden, ids=(experts, slots))


def delta(target: CpuTarget, tokens: int) -> Case:
    p = Program("bench", Bucket("b", tokens, 1, tokens))
    kh, vh, kd, vd = 16, 32, 128, 128
    channels = 2 * kh * kd + vh * vd
    p.op("delta_net", [p.input("qkv", f"f32[T,{channels}]"), p.input("z", f"f32[T,{vh * vd}]"),
                       p.input("b", f"f32[T,{vh}]"), p.input("a", f"f32[T,{vh}]"),
                       p.weight("conv_w", (channels, 4)), p.weight("decay", (vh,)), p.weight("dt", (vh,)),
                       p.weight("n", (vd,)), p.batch], key_heads=kh, value_heads=vh, key_dim=kd,
         value_dim=vd, eps=1e-6, conv=p.state("conv", StateType(StateKind.conv, DType.f32, (channels, 3))),
         delta=p.state("delta", StateType(StateKind.delta, DType.f32, (vh, kd, vd))))
    return Case("delta_net 16/32x128", [c for _, c in p.lower(target)], tokens,
                {(4, "w"): channels * 16, (5, "w"): 128, (6, "w"): 128, (7, "w"): 512}, 2.0 * vh * kd * vd * 4,
                tokens * vh * kd * vd * 7.0, context=5)


def attention(target: CpuTarget, tokens: int, context: int) -> Case:
    p = Program("bench", Bucket("b", tokens, 1, tokens))
    heads, kv, dim = 16, 2, 256
    state = p.state("kv", StateType(StateKind.kv, DType.f32, (kv, dim)))
    q = p.op("rope_append", [p.input("q", f"f32[T,{heads},{dim}]"), p.input("k", f"f32[T,{kv},{dim}]"),
                             p.input("v", f"f32[T,{kv},{dim}]"), p.weight("qw", (dim,)), p.weight("kw", (dim,)),
                             p.input("cos", "f32[T,32]"), p.input("sin", "f32[T,32]"), p.batch], eps=1e-6, state=state)
    p.op("paged_attention", [q, p.input("g", f"f32[T,{heads * dim}]"), p.batch], scale=0.06, state=state)
    mean = context + tokens / 2
    return Case(f"attention 16/2x256 after {context}", [c for _, c in p.lower(target)][1:], tokens,
                {}, 2.0 * (context + tokens) * kv * dim * 4, tokens * mean * heads * dim * 4, context=context)


class Bench:
    """Compiles cases and times them."""

    def __init__(self, target: CpuTarget, cases: Sequence[Case], megabytes: int) -> None:
        FAMILIES.update(read=read, flops=flops)
        self.lanes = Machine.of(target.hardware.features).lanes
        self.flops_kernel = Kernel.make("flops", steps=100_000)
        self.size = megabytes << 20
        self.read_kernel = Kernel.make("read", size=self.size // 4)
        kernels = [c.kernel for case in cases for c in case.calls] + [self.read_kernel, self.flops_kernel]
        self.folder = Path(tempfile.mkdtemp())
        host, library = target.emit(kernels, self.folder)
        self.host = Host(self.folder / host)
        self.library = self.host.load(self.folder / library)
        self.pool = memory(self.size * 2)
        rng = np.random.default_rng(0)
        block = rng.integers(0, 256, 4 << 20, dtype=np.uint8)
        for start in range(0, len(self.pool), len(block)):
            self.pool[start:start + len(block)] = block[:len(self.pool) - start]
        self.rng, self.keep = rng, []

    def array(self, data: np.ndarray) -> int:
        area = memory(data.nbytes + 64)
        area[:data.nbytes] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self.keep.append(area)
        return int(area.ctypes.data)

    def place(self, size: int, offset: int) -> int:
        if size > len(self.pool):
            raise SystemExit(f"weights of {size >> 20} MB need --megabytes {size >> 20}")
        at = offset % max(len(self.pool) - size, 1) // 4096 * 4096
        return int(self.pool.ctypes.data) + at

    def time(self, case: Case, threads: int, repeat: int) -> np.ndarray:
        """Seconds of each repetition, all launches of the op together."""
        self.host.start(threads)
        self.keep = []
        tables, step = [], sum(case.weights.values()) or (8 << 20)
        fixed = self._fixed(case)
        for i in range(repeat):
            for call in case.calls:
                tables.append((call.kernel.symbol, [self._address(case, fixed, ref, i * step) for ref in call.args]))
        rows = self.host.table(self.library, tables)
        seconds = np.zeros(len(rows))
        assert self.host.c.qcn_host_run(ctypes.byref(rows), len(rows), seconds.ctypes.data) == 0, self.host.error()
        return seconds.reshape(repeat, len(case.calls))

    def _fixed(self, case: Case) -> dict[str, int]:
        t, c = case.tokens, case.context
        pages = -(-(c + t) // 32)
        arrays = {"counts": [t, 1, t, pages], "token_seq": [0] * t, "cu_seqlens": [0, t], "context_lens": [c],
                  "slots": [0], "into": [0], "block_table": list(range(pages))}
        made = {name: self.array(np.array(data, np.int32)) for name, data in arrays.items()}
        made["f32"] = self.array(self.rng.standard_normal(max(16384 * t, 1 << 20)).astype(np.float32))
        self.pages = pages
        return made

    def _address(self, case: Case, fixed: dict[str, int], ref, shift: int) -> int:
        if ref.kind == "input":
            return fixed[ref.name]
        key = (ref.kind, ref.index, ref.name, ref.part)
        if ref.kind == "blob":
            size = case.weights[ref.index, ref.part]
            if size < 1 << 16:
                return fixed["f32"]
            if ref.part == "s":
                return fixed.setdefault(f"s{ref.index}", self.array(np.full(size // 2, 0.01, np.float16)))
            return self.place(size, shift + ref.index * 77_777_777)
        if ref.kind == "operand" and ref.index == 1 and case.ids[0]:
            experts, slots = case.ids
            ids = np.stack([self.rng.permutation(experts)[:slots] for _ in range(case.tokens)])
            return self.array(ids.astype(np.int32))
        if ref.kind == "operand":
            return fixed["f32"]
        size = ref.bytes if ref.kind == "scratch" else 4 * max(1 << 20, self.pages * 32768, 160000 * case.tokens)
        name = str(key)
        if name not in fixed:
            fixed[name] = self.array(np.zeros(size // 4 + 64, np.float32))
        return fixed[name]

    def bandwidth(self, threads: int) -> float:
        """Best GB/s of the reading kernel."""
        self.host.start(threads)
        y, counts = self.array(np.zeros(self.size // 128, np.float32)), self.array(np.zeros(4, np.int32))
        rows = self.host.table(self.library, [(self.read_kernel.symbol, [int(self.pool.ctypes.data), y, counts])] * 6)
        seconds = np.zeros(len(rows))
        assert self.host.c.qcn_host_run(ctypes.byref(rows), len(rows), seconds.ctypes.data) == 0
        return self.size / seconds.min() / 1e9


    def peak(self) -> float:
        """GFLOP/s of one thread on registers, now."""
        rows = self.host.table(self.library, [(self.flops_kernel.symbol, [self.array(np.zeros(64, np.float32)),
                                               self.array(np.zeros(512, np.float32)), 0])] * 3)
        seconds = np.zeros(len(rows))
        assert self.host.c.qcn_host_run(ctypes.byref(rows), len(rows), seconds.ctypes.data) == 0
        return 100_000 * 12 * 2 * self.lanes / seconds.min() / 1e9


def overhead(target: CpuTarget, threads: Sequence[int]) -> None:
    """Time of one launch that does next to nothing, without and with a parallel region."""
    kernels = {name: Kernel.make("unary", op="neg", rows="T", times=1, width=16, stride=0, threads=parallel_)
               for name, parallel_ in (("serial", False), ("parallel", True))}
    host, library = target.emit(list(kernels.values()), folder := Path(tempfile.mkdtemp()))
    machine = Host(folder / host)
    handle = machine.load(folder / library)
    x, counts = np.zeros(4096, np.float32), np.array([8, 1, 1, 1], np.int32)
    for n in threads:
        machine.start(n)
        for name, kernel in kernels.items():
            launch = (kernel.symbol, [x.ctypes.data, x.ctypes.data + 8192, counts.ctypes.data])
            rows = machine.table(handle, [launch] * 500)
            times = []
            for _ in range(50):
                start = time.perf_counter()
                machine.c.qcn_host_run(ctypes.byref(rows), len(rows), None)
                times.append((time.perf_counter() - start) / len(rows))
            print(f"{n}T {name:9s} launch: best {min(times) * 1e6:.3f} us, median {np.median(times) * 1e6:.3f} us")
    machine.c.qcn_host_shutdown()


def report(bench: Bench, cases: Sequence[Case], threads: int, repeat: int, detail: bool) -> None:
    for case in cases:
        roof = bench.bandwidth(threads)
        peak = bench.peak()
        parts = bench.time(case, threads, repeat)
        total = parts.sum(1)
        best, mid = total.min(), float(np.median(total))
        line = f"{threads}T {case.name:42s} T={case.tokens:<4d} best {best * 1e6:9.1f} us, median {mid * 1e6:9.1f}"
        line += f" | {case.read / best / 1e9:5.1f} GB/s ({case.read / mid / 1e9:5.1f}), read {roof:5.1f}"
        line += f" = {100 * case.read / best / 1e9 / roof:3.0f} % | {case.flops / best / 1e9:6.1f} GFLOP/s"
        line += f", fma {peak:5.1f}"
        print(line, flush=True)
        if detail and len(case.calls) > 1:
            for call, seconds in zip(case.calls, np.median(parts, 0), strict=True):
                print(f"      {seconds * 1e6:9.1f} us  {call.kernel.family}")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--tokens", default="1")
    options.add_argument("--formats", default="bf16,int8,int4")
    options.add_argument("--threads", default="1,2")
    options.add_argument("--only", default="")
    options.add_argument("--megabytes", type=int, default=256)
    options.add_argument("--repeat", type=int, default=12)
    options.add_argument("--mcpu", default=None)
    options.add_argument("--experts", type=int, default=65)
    options.add_argument("--overhead", action="store_true")
    options.add_argument("--detail", action="store_true")
    o = options.parse_args()
    target = CpuTarget(o.mcpu)
    if o.overhead:
        overhead(target, [int(n) for n in o.threads.split(",")])
        return
    cases = []
    for tokens in map(int, o.tokens.split(",")):
        for form in o.formats.split(","):
            cases += [linear(target, 2048, 2048, form, tokens), linear(target, 12288, 2048, form, tokens),
                      linear(target, 2048, 4096, form, tokens), moe(target, o.experts, 2048, 512, 9, form, tokens)]
        cases += [linear(target, 513, 2048, "f32", tokens), delta(target, tokens), attention(target, tokens, 0),
                  attention(target, tokens, 4096)]
    cases = [c for c in cases if o.only in c.name]
    bench = Bench(target, cases, o.megabytes)
    for threads in map(int, o.threads.split(",")):
        report(bench, cases, threads, o.repeat, o.detail)
    bench.host.c.qcn_host_shutdown()


if __name__ == "__main__":
    main()
