"""Ops to kernel calls: one function an op, chosen by name. Imports no Triton."""

from __future__ import annotations

from collections.abc import Callable

from qcn_compile.targets.base import Call
from qcn_compile.targets.files import kernel_for
from qcn_compile.targets.triton.lowering import gemm, linear, mixer, moe, ranks, rows, sample, single
from qcn_compile.targets.triton.lowering.site import Site


def _linear(site: Site) -> list[Call]:
    return (single.linear if site.capacity(site.activation(0).shape) == 1 else linear.linear)(site)


UNARY = ("neg", "exp", "sigmoid", "silu", "softplus", "rsqrt", "add_scalar", "mul_scalar", "cast")
BINARY = ("add", "mul", "sub", "div", "silu_mul", "mul_sigmoid")
LOWERINGS: dict[str, Callable[[Site], list[Call]]] = {
    **dict.fromkeys(UNARY, rows.unary), **dict.fromkeys(BINARY, rows.binary),
    "rms_norm": rows.norm, "narrow_rms_norm": rows.norm, "add_rms_norm": rows.norm, "gated_rms_norm": rows.norm,
    "concat": rows.concat, "gather_rows": rows.gather_rows, "embedding": rows.embedding,
    "linear": _linear, "linear_add": _linear, "narrow_linear": gemm.narrow_linear,
    "norm_linear": single.norm_linear, "norm_linear_pair": single.norm_linear_pair,
    "rope_attention": single.rope_attention,
    "moe_route": moe.route, "local_experts": moe.local, "moe_experts": moe.experts, "moe_add": moe.experts,
    "narrow_experts": moe.experts, "narrow_delta_net": mixer.delta_net,
    "rope_table": mixer.rope_table, "rope_append": mixer.rope_append, "paged_attention": mixer.paged_attention,
    "delta_net": mixer.delta_net, "sample": sample.sample,
    "all_reduce": ranks.all_reduce, "all_reduce_norm": ranks.all_reduce_norm, "all_gather": ranks.all_gather,
}
CURES = {
    **dict.fromkeys(("causal_conv1d", "gated_delta_rule", "delta_gate"), "keep the pass fuse-deltanet in the pipeline"),
    **dict.fromkeys(("attention", "rope"), "keep the pass fuse-attention in the pipeline"),
}


def lower(site: Site) -> list[Call]:
    """The launches that compute an op. Raises LoweringError naming op, place and cure."""
    found = LOWERINGS.get(site.op.name)
    if found is None:
        cure = CURES.get(site.op.name) or kernel_for(site.op.name, "gpu", LOWERINGS)
        raise site.fail("the GPU targets have no kernel for it", cure)
    return found(site)
