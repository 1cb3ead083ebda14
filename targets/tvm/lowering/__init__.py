"""Ops to kernel calls: one function an op, chosen by name. Imports no TVM."""

from __future__ import annotations

from collections.abc import Callable

from qcn_compile.targets.base import Call
from qcn_compile.targets.files import kernel_for
from qcn_compile.targets.tvm.lowering import linear, mixer, rows
from qcn_compile.targets.tvm.lowering.site import Site

UNARY = ("neg", "exp", "sigmoid", "silu", "softplus", "rsqrt", "add_scalar", "mul_scalar")
BINARY = ("add", "mul", "sub", "div", "silu_mul", "mul_sigmoid")
LOWERINGS: dict[str, Callable[[Site], list[Call]]] = {
    **dict.fromkeys(UNARY, rows.unary), **dict.fromkeys(BINARY, rows.binary),
    "rms_norm": rows.rms_norm, "add_rms_norm": rows.add_rms_norm, "gated_rms_norm": rows.gated_rms_norm,
    "concat": rows.concat, "gather_rows": rows.gather_rows, "embedding": rows.embedding,
    "linear": linear.linear, "linear_add": linear.linear, "moe_route": linear.moe_route,
    "local_experts": linear.local_experts, "moe_experts": linear.moe, "moe_add": linear.moe,
    "rope_table": mixer.rope_table, "rope_append": mixer.rope_append, "paged_attention": mixer.paged_attention,
    "delta_net": mixer.delta_net,
}
CURES = {
    "causal_conv1d": "keep the pass fuse-deltanet in the pipeline",
    "gated_delta_rule": "keep the pass fuse-deltanet in the pipeline",
    "delta_gate": "keep the pass fuse-deltanet in the pipeline",
    "attention": "keep the pass fuse-attention in the pipeline",
    "rope": "keep the pass fuse-attention in the pipeline",
}


def lower(site: Site) -> list[Call]:
    """The launches that compute an op. Raises LoweringError naming op, place and cure."""
    found = LOWERINGS.get(site.op.name)
    if found is None:
        cure = CURES.get(site.op.name) or kernel_for(site.op.name, "cpu", LOWERINGS)
        raise site.fail("the CPU target has no kernel for it", cure)
    return found(site)
