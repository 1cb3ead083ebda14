"""Lowering of what ranks exchange. The runtime may run the kernel of an all_reduce, or leave the sum to a library."""

from __future__ import annotations

from qcn_compile.artifact import PEER_ROWS
from qcn_compile.targets.base import Call, Kernel, Param, Ref
from qcn_compile.targets.triton.lowering.site import COUNTS, Site, call, inner, power, result, scratch

PEERS = Ref("input", name="peers")
BLOCK = 4096


def all_reduce(site: Site) -> list[Call]:
    """Arguments of the launch: x, y, peers, counts; without a grid where there is no kernel for so many rows."""
    x = site.activation(0)
    width, capacity = inner(x.shape), site.capacity(x.shape)
    if capacity > PEER_ROWS or width > BLOCK or width % 2:
        return [Call(Kernel.make("all_reduce"), (site.ref(0), result(), PEERS, COUNTS))]
    if site.bucket.fused:
        return [_with_norm(site, [], NORM=False, NARROW=False, EPS=0.0)]
    return [call("all_reduce", [site.ref(0), result(), PEERS, COUNTS], (capacity,), D=width, BD=power(width),
                 SLOTS=PEER_ROWS, RANKS=site.integer("ranks"), PHASES=3, WARPS=min(8, max(1, width // 256)),
                 **site.rows(x.shape))]


def all_reduce_norm(site: Site) -> list[Call]:
    """Arguments of the collective, then those of the norm: w, n, and with `codes` these and their scales."""
    codes = site.op.attrs["codes"] is True
    args = [site.ref(1), *(result(i) for i in range(1, 4 if codes else 2))]
    return [_with_norm(site, args, NORM=True, NARROW=codes, EPS=site.real("eps"))]


def _with_norm(site: Site, args: list[Ref], **params: Param) -> Call:
    x = site.activation(0)
    width, ranks = inner(x.shape), site.integer("ranks")
    if width > BLOCK or width % 2:
        raise site.fail(f"rows of {width} are too wide for a sum with its norm", "build with fewer columns")
    return call("all_reduce_norm", [site.ref(0), result(), PEERS, *args, COUNTS], (site.capacity(x.shape),), D=width,
                BD=power(width), SLOTS=PEER_ROWS, RANKS=ranks, RP=power(ranks), PHASES=3,
                WARPS=min(8, max(1, width // 256)), **params, **site.rows(x.shape))


def all_gather(site: Site) -> list[Call]:
    """Arguments of the collective: x, y, peers, counts; y [ranks, rows, width] is put in order by a kernel."""
    x, ranks = site.activation(0), site.integer("ranks")
    width, capacity = inner(x.shape), site.capacity(x.shape)
    if capacity == 1:
        return [Call(Kernel.make("all_gather"), (site.ref(0), result(), PEERS, COUNTS))]
    parts = scratch("parts", ranks * capacity * width, "bf16")
    return [Call(Kernel.make("all_gather"), (site.ref(0), parts, PEERS, COUNTS)),
            call("interleave", [parts, result(), COUNTS], (capacity, ranks), D=width, BD=min(BLOCK, power(width)),
                 RANKS=ranks, CAPACITY=capacity, **site.rows(x.shape))]
