"""Lowering of what ranks exchange. The runtime may run the kernel of an all_reduce, or leave the sum to a library."""

from __future__ import annotations

from qcn_compile.artifact import PEER_ROWS
from qcn_compile.targets.base import Call, Kernel, Ref
from qcn_compile.targets.triton.lowering.site import COUNTS, Site, call, inner, power, result, scratch

PEERS = Ref("input", name="peers")
BLOCK = 4096


def all_reduce(site: Site) -> list[Call]:
    """Arguments of the launch: x, y, peers, counts; without a grid where there is no kernel for so many rows."""
    x = site.activation(0)
    width, capacity = inner(x.shape), site.capacity(x.shape)
    if capacity > PEER_ROWS or width > BLOCK or width % 2:
        return [Call(Kernel.make("all_reduce"), (site.ref(0), result(), PEERS, COUNTS))]
    return [call("all_reduce", [site.ref(0), result(), PEERS, COUNTS], (capacity,), D=width, BD=power(width),
                 SLOTS=PEER_ROWS, RANKS=site.integer("ranks"), PHASES=3, WARPS=min(8, max(1, width // 256)),
                 **site.rows(x.shape))]


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
