"""Prefill kernels at the sizes of Qwen3-Coder-Next: variants timed, results against plain torch. See explore.py."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from explore import DEVICE, Memory, error, explore
from harness_gpu import BF16, FP8, Case

from qcn_compile.ir.types import DType, StateKind
from qcn_compile.targets.base import Bucket

HIDDEN, EXPERTS, INNER = 2048, 513, 512


def bucket(tokens: int, sequences: int = 0) -> Bucket:
    return Bucket(f"prefill-{tokens}", tokens, sequences or min(tokens, 256), min(tokens, 512))


def linear(tokens: int, n: int, k: int, encoding: Any = FP8, add: bool = False) -> Case:
    case = Case(f"linear {encoding.format} {n}x{k}", bucket(tokens))
    x, w = case.input("x", f"bf16[T,{k}]"), case.weight("w", (n, k), encoding, scale=0.02)
    case.op("linear_add" if add else "linear", [x, w, *([case.input("r", f"bf16[T,{n}]")] if add else [])])
    return case


def moe(tokens: int) -> Case:
    case = Case("moe", bucket(tokens))
    ids, weights = case.op("moe_route", [case.input("l", f"bf16[T,{EXPERTS}]")], top_k=10, normalize=True, shared=True)
    x = case.input("x", f"bf16[T,{HIDDEN}]")
    case.op("moe_add", [x, ids, weights, case.weight("up", (EXPERTS, 2 * INNER, HIDDEN), FP8, scale=0.02),
                        case.weight("down", (EXPERTS, HIDDEN, INNER), FP8, scale=0.02),
                        case.input("r", f"bf16[T,{HIDDEN}]")], activation="silu")
    return case


def delta(tokens: int, sequences: int) -> Case:
    case = Case("delta", bucket(tokens, sequences))
    conv = case.state("conv", StateKind.conv, DType.bf16, (8192, 3))
    state = case.state("delta", StateKind.delta, DType.f32, (32, 128, 128))
    case.op("delta_net", [case.input("qkv", "bf16[T,8192]"), case.input("z", "bf16[T,4096]"),
                          case.input("b", "bf16[T,32]"), case.input("a", "bf16[T,32]"),
                          case.weight("c", (8192, 4), scale=0.5), case.weight("decay", (32,)),
                          case.weight("dt", (32,)), case.weight("dn", (128,)), case.batch],
            key_heads=16, value_heads=32, key_dim=128, value_dim=128, eps=1e-6, conv=conv, delta=state)
    return case


def attention(tokens: int, sequences: int) -> Case:
    case = Case("attention", bucket(tokens, sequences))
    kv = case.state("kv", StateKind.kv, DType.bf16, (2, 256))
    q = case.op("rope_append", [case.input("q", "bf16[T,16,256]"), case.input("k", "bf16[T,2,256]"),
                                case.input("v", "bf16[T,2,256]"), case.weight("qn", (256,)), case.weight("kn", (256,)),
                                case.input("cos", "f32[T,32]"), case.input("sin", "f32[T,32]"), case.batch],
                eps=1e-6, state=kv)
    case.op("paged_attention", [q, case.input("g", "bf16[T,4096]"), case.batch], scale=0.0625, state=kv)
    return case


def realistic(memory: Memory) -> None:
    """Decays as trained models have them."""
    memory.data["decay"] = -16 * torch.rand(32, device=DEVICE)
    memory.data["dt"] = torch.log(torch.expm1(torch.exp(torch.empty(32, device=DEVICE).uniform_(-6.9, -2.3))))
    memory.data["a"] *= 0.5


def check_linear(memory: Memory) -> None:
    if os.environ.get("EXPLORE_COMPILE"):
        return
    name = "linear_add.0.0" if "r" in memory.data else "linear.0.0"
    want = memory.wide("x") @ memory.wide("w").t()
    if "r" in memory.data:
        want += memory.wide("r")
    print(f"  relative L2 {error(memory.data[name], want):.2e}")


def check_moe(memory: Memory) -> None:
    if os.environ.get("EXPLORE_COMPILE"):
        return
    ids, weights = memory.data["moe_route.0.0"].long(), memory.data["moe_route.0.1"]
    x, want = memory.wide("x"), memory.wide("r").clone()
    for e in range(EXPERTS):
        token, slot = torch.where(ids == e)
        if len(token):
            up, down = (memory.data[n][e].float() * memory.data[f"{n} s"][e].repeat_interleave(128, 0)
                        .repeat_interleave(128, 1) for n in ("up", "down"))
            gate, right = (x[token] @ up.t()).chunk(2, -1)
            out = (torch.nn.functional.silu(gate) * right) @ down.t()
            want.index_add_(0, token, out * weights[token, slot, None])
    r = memory.wide("r")
    print(f"  relative L2 without residual {error(memory.data['moe_add.1.0'].float() - r, want - r):.2e}")


def delta_reference(memory: Memory, before: torch.Tensor, ring: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and states, token by token in fp64."""
    wide = {name: memory.data[name].double() for name in ("qkv", "z", "b", "a", "c", "decay", "dt", "dn")}
    outs, states, at = [], [], 0
    for s, n in enumerate(memory.lengths):
        rows, context = slice(at, at + n), memory.contexts[s]
        none = torch.zeros(8192, device=DEVICE).double()
        past = torch.stack([ring[s, (context - j) % 16].double() if context >= j else none for j in (3, 2, 1)])
        full = torch.cat([past, wide["qkv"][rows]])
        y = sum(full[i:i + n] * wide["c"][:, i] for i in range(4)).bfloat16()
        y = torch.nn.functional.silu(y.double()).bfloat16().double()
        q, k, v = y[:, :2048].view(n, 16, 128), y[:, 2048:4096].view(n, 16, 128), y[:, 4096:].view(n, 32, 128)
        q, k = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
        q, k = (q * 128 ** -0.5).repeat_interleave(2, 1), k.repeat_interleave(2, 1)
        g = (wide["decay"] * torch.nn.functional.softplus(wide["a"][rows] + wide["dt"])).exp()
        beta = torch.sigmoid(wide["b"][rows]).bfloat16().double()
        st = before[s].double() if context else torch.zeros_like(before[s]).double()
        for t in range(n):
            st = st * g[t][:, None, None]
            change = (v[t] - torch.einsum("hkv,hk->hv", st, k[t])) * beta[t][:, None]
            st = st + k[t][:, :, None] * change[:, None, :]
            outs.append(torch.einsum("hkv,hk->hv", st, q[t]))
        states.append(st)
        at += n
    out = torch.stack(outs)
    out = out * torch.rsqrt((out * out).mean(-1, keepdim=True) + 1e-6) * wide["dn"]
    out *= torch.nn.functional.silu(wide["z"]).view(-1, 32, 128)
    return out.reshape(-1, 4096), torch.stack(states)


def run_delta(lengths: list[int], contexts: list[int], changes: dict[str, list[dict[str, Any]]], check: bool) -> None:
    kept: dict[str, torch.Tensor] = {}

    def prepare(memory: Memory) -> None:
        realistic(memory)
        count = len(lengths)
        memory.data["state conv "] = torch.randn((count, 16, 8192), device=DEVICE).bfloat16()
        memory.data["state delta "] = torch.randn((count, 32, 128, 128), device=DEVICE) * 0.2
        kept["ring"], kept["state"] = memory.data["state conv "].clone(), memory.data["state delta "].clone()

    memory = explore(delta(sum(lengths), len(lengths)), lengths, contexts, changes, prepare)
    if not check or os.environ.get("EXPLORE_COMPILE"):
        return
    from explore import launch

    from qcn_compile.targets.triton.target import GpuTarget

    memory.data["state conv "].copy_(kept["ring"])
    memory.data["state delta "].copy_(kept["state"])
    target = GpuTarget("h100")
    for op, call in memory.case.lower(target):
        launch(memory, op, call, target)()
    out, states = delta_reference(memory, kept["state"], kept["ring"])
    got, state = memory.data["delta_net.0.0"], memory.data["state delta "]
    heads = ((state - states).norm(dim=(2, 3)) / states.norm(dim=(2, 3))).max()
    print(f"  relative L2: output {error(got, out):.2e}, last 64 tokens {error(got[-64:], out[-64:]):.2e}, state "
          f"{error(state, states):.2e}, worst head {float(heads):.2e}")


def check_attention(memory: Memory) -> None:
    """Against torch in fp32 from the pages."""
    q, at, worst = memory.data["rope_append.0.0"].float(), 0, 0.0
    table = memory.data["input block_table"].view(len(memory.lengths), -1).long()
    got = memory.data["paged_attention.1.0"].view(-1, 16, 256)
    for s, n in enumerate(memory.lengths):
        total = memory.contexts[s] + n
        k, v = (memory.data[f"state kv {p}"][table[s]].transpose(1, 2).reshape(-1, 2, 256)[:total].float()
                for p in "kv")
        for h in range(0, 16, 5):
            scores = q[at:at + n, h] @ k[:, h // 8].t() * 0.0625
            limit = memory.contexts[s] + torch.arange(n, device=DEVICE)[:, None]
            scores.masked_fill_(torch.arange(total, device=DEVICE)[None] > limit, float("-inf"))
            want = scores.softmax(-1) @ v[:, h // 8]
            want *= torch.sigmoid(memory.data["g"][at:at + n].float().view(n, 16, 256)[:, h])
            worst = max(worst, error(got[at:at + n, h], want))
        at += n
    print(f"  relative L2, worst head {worst:.2e}")


def tiles(**choices: list[Any]) -> list[dict[str, Any]]:
    """All combinations."""
    found: list[dict[str, Any]] = [{}]
    for name, values in choices.items():
        found = [{**old, name: value} for old in found for value in values]
    return found


def section(work: Any) -> None:
    try:
        work()
    except Exception as problem:
        print(f"SECTION FAILED {type(problem).__name__}: {str(problem)[-300:]}", flush=True)
    torch.cuda.empty_cache()


def peaks() -> None:
    """What the card does at its best: copy and the library's products."""
    from explore import microseconds

    a = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    print(f"{torch.cuda.get_device_name()}: copy {2 * a.numel() / microseconds(lambda: b.copy_(a)) / 1e3:.0f} GB/s")
    x, w = torch.randn(8192, 8192, device=DEVICE).bfloat16(), torch.randn(8192, 8192, device=DEVICE).bfloat16()
    print(f"bf16 product {2 * 8192 ** 3 / microseconds(lambda: x @ w.t()) / 1e6:.0f} TFLOP/s")
    x8, w8, one = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn), torch.ones((), device=DEVICE)
    took = microseconds(lambda: torch._scaled_mm(x8, w8.t(), one, one, out_dtype=torch.bfloat16))
    print(f"fp8 product {2 * 8192 ** 3 / took / 1e6:.0f} TFLOP/s")


def main() -> None:
    """The sections named on the command line, or all."""
    wanted = sys.argv[1:]
    every = {"peaks": peaks, "delta": run_deltas, "moe": run_moes, "small": run_small, "linear": run_linears,
             "attention": run_attentions, "few-moe": run_few_moes,
             "once": run_once}
    for name, work in every.items():
        if not wanted or name in wanted:
            print(f"== {name}", flush=True)
            section(work)


def run_deltas() -> None:
    changes = {"delta_solve": tiles(WARPS=[8]),
               "delta_scan": [*tiles(BV=[16, 32, 64], WARPS=[4], PIPE=[2, 3]), *tiles(BV=[64], WARPS=[8], PIPE=[2, 3])]}
    section(lambda: run_delta([1000, 24, 1, 500], [0, 3, 700, 64], {}, True))
    section(lambda: run_delta([1] * 16, [100] * 16, {}, True))
    section(lambda: run_delta([8192], [0], changes, False))


def run_moes() -> None:
    up = [*tiles(WARPS=[8], STAGES=[3, 4]), *tiles(WARPS=[4], STAGES=[2])]
    down = [*tiles(WARPS=[4], STAGES=[2, 3, 4]), *tiles(WARPS=[8], STAGES=[3]), *tiles(BH=[64], WARPS=[4], STAGES=[3])]
    for tokens in (8192, 2048):
        section(lambda tokens=tokens: check_moe(explore(moe(tokens), [tokens], changes={
            "moe_up_tiles": up, "moe_down_tiles": down})))


def run_few_moes() -> None:
    """Experts of few tokens: pair by pair, and in tiles."""
    from qcn_compile.targets.triton.lowering import site

    few = site.FEW
    section(lambda: check_moe(explore(moe(4), [4], changes={
        "moe_up": tiles(BF=[2, 4, 8], WARPS=[2, 4, 8]), "moe_down": tiles(BH=[4, 8, 16], WARPS=[4, 8])}, top=5)))
    site.FEW = 1
    for tokens in (4, 8, 32, 128):
        section(lambda t=tokens: check_moe(explore(moe(t), [t], changes={
            "moe_up_tiles": tiles(WARPS=[4], STAGES=[4, 5, 6]),
            "moe_down_tiles": tiles(BH=[64, 128], WARPS=[4], STAGES=[3, 4])}, top=3)))
    site.FEW = few


def run_small() -> None:
    """Products of few tokens."""
    narrow = [*tiles(PARTS=[4], BN=[8, 16, 32], WARPS=[4], STAGES=[4, 6]), *tiles(PARTS=[8], WARPS=[4, 8], STAGES=[3]),
              *tiles(PARTS=[2], WARPS=[2, 4], STAGES=[6, 8])]
    plain = tiles(PARTS=[2, 4, 8], BN=[8, 16], WARPS=[4], STAGES=[2, 3])
    swapped = tiles(SWAP=[True], BN=[64, 128], WARPS=[4], STAGES=[3, 4, 5])
    for tokens in (4, 8, 32):
        for n, k, encoding, add in ((12288, 2048, FP8, False), (2048, 4096, FP8, True), (513, 2048, BF16, False),
                                    (64, 2048, BF16, False)):
            section(lambda t=tokens, n=n, k=k, e=encoding, a=add: check_linear(explore(
                linear(t, n, k, e, a), [t], changes={
                    "gemm_few": narrow if e is FP8 else plain, "gemm": swapped if e is FP8 else [],
                    "matmul": tiles(STAGES=[3, 6])}, top=4)))


def run_linears() -> None:
    wide = [*tiles(SIDE=[1, 2], BT=[128], BN=[128], WARPS=[8], STAGES=[3], GROUP=[8, 16]),
            *tiles(SIDE=[1], BT=[64], BN=[128], WARPS=[4], STAGES=[3, 4], GROUP=[16])]
    section(lambda: check_linear(explore(linear(8192, 12288, 2048), [8192], changes={"gemm": wide}, top=8)))
    section(lambda: check_linear(explore(linear(8192, 2048, 4096, add=True), [8192], changes={"gemm": wide}, top=5)))
    section(lambda: check_linear(explore(linear(1024, 12288, 2048), [1024], changes={"gemm": wide}, top=5)))
    section(lambda: check_linear(explore(linear(1024, 2048, 4096, add=True), [1024], changes={"gemm": wide}, top=5)))


def run_once() -> None:
    """For a profiler."""
    section(lambda: explore(linear(8192, 12288, 2048), [8192]) and None)
    section(lambda: explore(moe(8192), [8192]) and None)


def run_attentions() -> None:
    changes = {"attention_prefill": [*tiles(BT=[8], BS=[32, 64], WARPS=[4], PIPE=[2, 3]),
                                     *tiles(BT=[16], BS=[32, 64], WARPS=[8], PIPE=[1, 2, 3])]}
    section(lambda: check_attention(explore(attention(2048, 2), [1500, 548], [0, 300])))
    section(lambda: explore(attention(8192, 1), [8192], changes=changes) and None)


if __name__ == "__main__":
    main()
