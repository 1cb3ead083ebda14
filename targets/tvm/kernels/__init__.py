"""Kernel sources: a family is a pure function (symbol, machine, parameters) -> Function. Importing this needs TVM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qcn_compile.errors import LoweringError
from qcn_compile.targets.base import Kernel
from qcn_compile.targets.tvm.kernels import attention, deltanet, linear, moe, norm, rows
from qcn_compile.targets.tvm.kernels.core import Machine

FAMILIES: dict[str, Callable[..., Any]] = {
    family.__name__: family for family in (
        rows.unary, rows.binary, rows.concat, rows.gather_rows, rows.embedding,
        norm.rms_norm, norm.add_rms_norm, norm.gated_rms_norm,
        linear.linear, linear.quantize,
        moe.moe_route, moe.local_experts, moe.moe_sort, moe.moe_up, moe.moe_down, moe.moe_combine,
        attention.rope_table, attention.rope_append, attention.paged_attention, attention.attention_parts,
        attention.attention_merge,
        deltanet.delta_conv, deltanet.delta_rule,
    )
}


def source(kernel: Kernel, machine: Machine) -> Any:
    """The PrimFunc of a kernel."""
    if kernel.family not in FAMILIES:
        raise LoweringError(f"no CPU kernel family named {kernel.family!r}; there are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kernel.family](kernel.symbol, machine, **dict(kernel.params)).result
